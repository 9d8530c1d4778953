"""`make gpu` without a GPU: what it refuses, and its parts' Python at toy sizes on the CPU."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastnas.benchmarks import predictions, profile, sanitize
from fastnas.benchmarks.harness import stock
from fastnas.benchmarks.harness.kernels import kernels
from fastnas.benchmarks.harness.roofline import _run, fma_probe
from fastnas.benchmarks.harness.schema import current_conditions, new_row, read_csv, write_csv
from fastnas.benchmarks.harness.timing import Timing
from fastnas.benchmarks.model.report import read_profile
from fastnas.benchmarks.ops.mixed_edges import CellCase, MixedOpCase, edge_fma
from fastnas.benchmarks.search import whole
from fastnas.benchmarks.search.providers import SIZES, Size

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
CONDITIONS = current_conditions("cpu")
NOTES_CALL = 'echo "$FASTNAS_BUILD $FASTNAS_CUDA_ARCHITECTURES $*" >>"$CALLS"'


def gpu_sh(*arguments, script=SCRIPT, **environment):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def fake_gpu(tmp_path):
    """A PATH where nvidia-smi lists a GPU, a python that says yes to every question, sources."""
    commands, root = tmp_path / "bin", tmp_path / "checkout"
    texts = {"nvidia-smi": "echo 9.0", "nvcc": "exit 0", "python": NOTES_CALL}
    files = {commands / name: f"#!/bin/sh\n{text}\n" for name, text in texts.items()}
    files |= {root / "csrc" / "a.cu": "", root / "CMakeLists.txt": "", root / "setup.py": ""}
    files |= {root / "fastnas" / "_cuda.so": "built", root / "benchmarks" / "gpu.sh": ""}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(SCRIPT, root / "benchmarks")
    return {
        "script": root / "benchmarks" / "gpu.sh",
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(commands / "python"),
        "CALLS": str(tmp_path / "calls"),
        "TORCHINDUCTOR_CACHE_DIR": "",  # torch sets it where it is imported, as in this process
    }


def test_an_unknown_part_is_refused(tmp_path):
    done = gpu_sh(tmp_path / "out", "bench")
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu: unknown part 'bench'; allowed: quick build smoke")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", ["all", "build", "tests", "step", "search"])
def test_without_a_gpu_it_says_what_it_needs(tmp_path, part):
    done = gpu_sh(tmp_path / "out", part)
    assert done.returncode == 2
    assert "make gpu: needs an NVIDIA GPU with its driver" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_search_needs_its_images(tmp_path, fake_gpu):
    done = gpu_sh(tmp_path / "out", "search", **fake_gpu, DATA="")
    assert done.returncode == 2
    assert "make gpu: needs DATA=FILE.npz" in done.stderr


def test_without_compute_sanitizer_it_says_so(tmp_path, fake_gpu):
    if shutil.which("compute-sanitizer", path=fake_gpu["PATH"] + ":/usr/local/cuda/bin"):
        pytest.skip("compute-sanitizer is here")
    done = gpu_sh(tmp_path / "out", "sanitizer", **fake_gpu)
    assert done.returncode == 2
    assert "make gpu: needs compute-sanitizer" in done.stderr


def test_missing_modules_are_named(tmp_path, fake_gpu):
    asks = 'case "$*" in *find_spec*) echo rich yaml;; esac'
    Path(fake_gpu["PYTHON"]).write_text(f"#!/bin/sh\n{asks}\n")
    done = gpu_sh(tmp_path / "out", "kernels", **fake_gpu)
    assert done.returncode == 2
    assert "and downloads nothing: rich yaml" in done.stderr


def test_parts_hand_their_settings_on(tmp_path, fake_gpu):
    settings = {"BATCH": "256", "DTYPE": "bfloat16", "METHOD": "rome", "DATA": "cifar10.npz"}
    out = tmp_path / "out"
    for part in ("step", "search"):
        assert gpu_sh(out, part, **fake_gpu, **settings).returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert f"-m fastnas.benchmarks.search.whole cifar10.npz {out} --method rome" in calls
    assert "-m fastnas bench search --batch 256 --dtype bfloat16" in calls
    assert f"--device cuda --out {out}/step-256-bfloat16.csv" in calls


def test_a_part_that_fails_does_not_end_the_others(tmp_path, fake_gpu):
    fails = r'case "$*" in *pytest*|*fastnas\ bench*) exit 1;; esac'
    Path(fake_gpu["PYTHON"]).write_text(f"#!/bin/sh\n{fails}\n")
    done = gpu_sh(tmp_path / "out", **fake_gpu, DATA="")
    assert done.returncode == 1
    failed = [line.rpartition(": ")[2] for line in done.stderr.splitlines() if "failed" in line]
    assert {"smoke", "tests", "kernels", "step 64 float32", "compile-max 256 bfloat16"} <= {*failed}
    assert "predictions" not in failed and "no search: DATA=FILE.npz" in done.stdout


def test_quick_runs_what_is_worth_most(tmp_path, fake_gpu):
    done = gpu_sh(tmp_path / "out", "quick", **fake_gpu, BATCH="256")
    assert done.returncode == 0, done.stderr
    calls = [c for c in (tmp_path / "calls").read_text().splitlines() if " -m " in c]
    kinds = ["pip install", "-m pytest", "bench search", "benchmarks.profile", "predictions"]
    assert [next(kind for kind in kinds if kind in call) for call in calls] == kinds
    assert calls[0].startswith("cuda 90-real ") and "test_mixed_edges.py" in calls[1]
    assert "--batch 256 --dtype float32 --only fastnas-graph,fastnas,eager-graph" in calls[2]
    assert f"{tmp_path}/out/profile-256-float32.csv --batch 256 --dtype float32" in calls[3]


def test_a_second_build_of_the_same_sources_builds_nothing(tmp_path, fake_gpu):
    built = Path(fake_gpu["script"]).parents[1] / "fastnas" / "_cuda.so"
    wishes = []
    for source in ("", "", "changed"):
        (built.parents[1] / "csrc" / "a.cu").write_text(source)
        # Another part may have left a module of other sources in the checkout meanwhile.
        built.write_text("of other sources" if wishes else "built")
        assert gpu_sh(tmp_path / "out", "build", **fake_gpu).returncode == 0
        calls = (tmp_path / "calls").read_text().splitlines()
        wishes.append(next(c.split()[0] for c in reversed(calls) if "pip install" in c))
        assert built.read_text() == ("of other sources" if source else "built")
    assert wishes == ["cuda", "python", "cuda"]


def test_results_are_packed_and_kept(tmp_path, fake_gpu):
    """A part that is run again leaves what it wrote before under another name."""
    writes = """case "$*" in *fastnas\\ bench*) while [ "$1" != --out ]; do shift; done
      [ ! -e "$2" ] && echo "$TORCHINDUCTOR_CACHE_DIR" >"$2";; esac"""
    Path(fake_gpu["PYTHON"]).write_text(f"#!/bin/sh\n{writes}\n")
    out = tmp_path / "out"
    (out / "kept" / "inductor").mkdir(parents=True)
    for _ in range(3):
        assert gpu_sh(out, "paths", **fake_gpu).returncode == 0
    names = ["paths.csv", "paths.csv.before", "paths.csv.before.~1~"]
    assert sorted(path.name for path in out.glob("paths.csv*")) == names
    assert (out / "paths.csv").read_text() == f"{out}/kept/inductor\n"
    with tarfile.open(out / "results.tar.gz") as archive:
        packed = {Path(name).name for name in archive.getnames()}
    assert {*names, "paths.log"} <= packed and not {"kept", "inductor", "results.tar.gz"} & packed


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_sanitizer_runs_every_op(capsys):
    assert sanitize.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(len(table) for table in sanitize.cases().values()) + 1
    assert lines[-1] == "search step on sampled paths"
    assert not any(": 0 providers" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_drivers_without_a_gpu(tmp_path, capsys):
    assert sanitize.main([]) == 2
    assert stock.main([str(tmp_path / "stock.json")]) == 2
    assert profile.main([str(tmp_path / "profile.csv")]) == 2
    error = capsys.readouterr().err.splitlines()
    names = ("sanitize", "stock", "profile")
    assert error == [f"{name}: torch finds no CUDA device" for name in names]


def test_a_result_that_is_not_finite_fails_the_sanitizer(monkeypatch):
    import fastnas.benchmarks.ops.mixed_sum as cases

    broken = float("nan")
    monkeypatch.setattr(cases, "mixed_sum", lambda x, w, **_: broken * sum(x) * w.sum())
    with pytest.raises(RuntimeError, match="y is not finite"):
        sanitize.main(["--device", "cpu", "--op", "mixed_sum"])


def test_roofline_on_the_cpu(tmp_path):
    out = tmp_path / "roofline.csv"
    command = [sys.executable, "-m", "fastnas", "bench", "roofline", "--quick", "--device", "cpu"]
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    rows = read_csv(out)
    assert [row.op for row in rows] == ["copy"] * 3 + ["matmul"] * 2
    assert {row.verified for row in rows} == {"yes"}
    assert all((row.GBps is None) != (row.GFMAps is None) for row in rows)
    assert rows[3].fma == 256**3


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
def test_the_fma_kernel_counts_what_it_does():
    pytest.importorskip("triton")
    probe = fma_probe(programs=2, turns=3, device="cpu")
    assert probe.fma == 2 * 1024 * 3 * 16
    assert _run(probe, "cpu")[1] == "yes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
def test_a_turn_too_few_is_seen(monkeypatch):
    kernels = pytest.importorskip("fastnas.benchmarks.harness.fma")
    right = kernels.run
    monkeypatch.setattr(kernels, "run", lambda x, y, turns: right(x, y, turns - 1))
    assert _run(fma_probe(programs=2, turns=3, device="cpu"), "cpu")[1].startswith("no: off by")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from fastnas.benchmarks.harness.fma import BLOCK, UNROLLED, WARPS, fma_kernel

kinds = {"x_ptr": "*fp32", "y_ptr": "*fp32", "turns": "i32"}
kinds |= {"BLOCK": "constexpr", "UNROLLED": "constexpr"}
source = triton.compiler.ASTSource(fma_kernel, kinds, {"BLOCK": BLOCK, "UNROLLED": UNROLLED})
target = GPUTarget("cuda", 90, 32)
compiled = triton.compile(source, target=target, options={"num_warps": WARPS})
print(compiled.asm["ptx"].count("fma.rn.f32"), BLOCK // (32 * WARPS) * UNROLLED)
"""


def test_the_fma_kernel_compiles_to_fma_alone(kept_folder):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(kept_folder("fastnas_triton"))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=True
    )
    found, expected = done.stdout.split()
    assert found == expected == "128"


def test_multiply_adds_of_the_cases():
    """Of an edge: 102 depthwise and 6 C pointwise an element of the output, forward."""
    shape = (64, 16, 32, 32)
    assert MixedOpCase(shape).fma("fwd") == 64 * 16 * 32 * 32 * (102 + 6 * 16)
    assert MixedOpCase(shape, 2).fma("fwd") == 64 * 16 * 16 * 16 * (102 + 7 * 16)
    assert MixedOpCase(shape).fma("fwd+bwd") == 3 * MixedOpCase(shape).fma("fwd")
    preprocessing = 2 * 64 * 64 * 32 * 32 * 16
    assert CellCase(shape).fma("fwd") == 14 * edge_fma(shape, 1) + preprocessing
    reduced = 8 * edge_fma(shape, 2) + 6 * edge_fma((64, 16, 16, 16), 1)
    assert CellCase(shape, "reduce").fma("fwd") == reduced + preprocessing


def step_row(backend, ms, **columns):
    settings = {"suite": "search", "op": predictions.STEP, "pass_": "step", "dtype": "float32"}
    settings |= {"shape": "64x3x32x32", "K": 8, "layout": "contiguous"} | columns
    return new_row(
        CONDITIONS, backend=backend, verified="yes", timing=Timing(ms, ms, ms), **settings
    )


def test_predictions_beside_what_was_measured(tmp_path, capsys):
    rows = [step_row("eager", 100.0), step_row("eager-graph", 50.0), step_row("compile", 90.0)]
    rows += [step_row("fastnas-graph", 1e3), step_row("eager", 5e3, dtype="bfloat16")]
    write_csv(rows, tmp_path / "made-up.csv")
    kernels = [{"name": "void at::batch_norm_backward_kernel<float>", "median_us": 90.0}]
    (tmp_path / "stock.json").write_text(json.dumps({"kernels": kernels}))
    profile = 'case,kernel,calls,us\nstep float32 64,"void a::sum_kernel<A, 2>(Plan)",8,500\n'
    (tmp_path / "profile.csv").write_text(profile + "step float32 64,ampere_gemm,1,3000\n")
    files = [str(tmp_path / name) for name in ("made-up.csv", "stock.json", "profile.csv")]
    assert predictions.main(files) == 0
    lines = capsys.readouterr().out.splitlines()
    case = f"{predictions.STEP} float32 64x3x32x32"
    assert f"| {case} | eager | 200 | 137 to 340 | 100 | below |" in lines
    assert f"| {case} | compile | 84 | 42 to 168 | 90 | within |" in lines
    assert any(
        f"| {case} | fastnas-graph |" in line and "| 1e+03 | above |" in line for line in lines
    )
    # Eight calls of 500 us, beside what the model counts of the kernel.
    assert any(line.startswith("| `sum_kernel` |") and line.endswith("| 4.00 |") for line in lines)
    # What the model does not count stands apart.
    assert any(line.startswith("| `all` |") and line.endswith("| 4.00 |") for line in lines)
    assert any(line.startswith("| others |") and line.endswith("| 3.00 |") for line in lines)
    assert f"| {case} | compile-graph | 68 | 56 to 94 | not measured |  |" in lines
    assert "| float32 64x3x32x32 | at most 1.5 | 2.00 | above |" in lines
    assert "| batch_norm_backward | 83 | 40 to 170 | 90 | within |" in lines
    assert sum("not measured" in line for line in lines) == len(predictions.PREDICTIONS) - 5 + 2


def test_a_profile_is_written_case_by_case(tmp_path, monkeypatch):
    """Whatever stops it: here the third case."""
    events = [SimpleNamespace(name="a::b_kernel<2>(int)", device_time=us) for us in (10.0, 2.0)]
    events += [SimpleNamespace(name="cudaLaunchKernel", device_time=99.0)]
    for event, kind in zip(events, ("CUDA", "CUDA", "CPU")):
        event.device_type = getattr(torch.autograd.DeviceType, kind)
    ran = []

    def profiled(call, calls):
        if len(ran) == 2:
            raise torch.OutOfMemoryError
        ran.append(call())
        return kernels(events, 2)

    monkeypatch.setattr(profile, "profiled", profiled)
    monkeypatch.setitem(SIZES, "default", Size(C=4, layers=3, batch=4, pixels=8, space="S2"))
    out = tmp_path / "profile.csv"
    shapes = [(2, *stage) for stage in ((4, 8, 8), (8, 4, 4))]
    monkeypatch.setattr(profile, "BATCH", 2)
    monkeypatch.setattr(profile, "STAGES", [shape[1:] for shape in shapes])
    written = profile.written(out, profile.cases(4, "float32", "cpu"))
    for case, found in islice(written, 2):
        assert "| `a::b_kernel<2>(int)` | 1 | 6.0 | 100.0% |" in profile.lines(case, found)
    with pytest.raises(torch.OutOfMemoryError):
        next(written)
    assert read_profile(out) == {
        "step float32 4": {"b_kernel": 6.0}, "mixed op 2x4x8x8": {"b_kernel": 6.0}
    }  # fmt: skip


def test_predictions_without_results(capsys, tmp_path):
    assert predictions.main([]) == 0
    assert "| all | at most 1.5 | not measured | |" in capsys.readouterr().out
    assert predictions.main([str(tmp_path / "absent.csv")]) == 2
    (tmp_path / "list.json").write_text("[]")
    assert predictions.main([str(tmp_path / "list.json")]) == 2


def test_a_whole_search_and_its_record(tmp_path, capfd):
    method = "rome"  # another than the default, which the test below starts
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
    labels = np.arange(64) % 2
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    command = [str(tmp_path / "images.npz"), str(tmp_path / "out"), "--device", "cpu"]
    command += ["--epochs", "2", "--space", "S2", "--channels", "2", "--layers", "3"]
    command += ["--batch-size", "8", "--crop", "1", "--method", method]
    assert whole.main(command) == 0, capfd.readouterr().err
    found = json.loads((tmp_path / "out" / f"{method}.json").read_text())
    assert found["finished"] and found["epochs_done"] == 2
    assert [figures["epoch"] for figures in found["epochs"]] == [0, 1]
    assert {"skips_normal", "skips_reduce", "valid_accuracy"} <= {*found["epochs"][0]}
    assert found["genotype"].startswith("Genotype(") and found["wall_seconds"] > 0
    assert found["config"]["method"] == method
    assert found["supernet_accuracy"] == found["epochs"][-1]["valid_accuracy"]


def test_a_search_stopped_before_its_first_epoch(tmp_path, capfd):
    command = ["digits", str(tmp_path / "out"), "--device", "cpu", "--seconds", "0.5"]
    assert whole.main(command) == 1
    assert "no epoch was finished in time" in capfd.readouterr().err
    assert not list((tmp_path / "out").glob("*.json"))
