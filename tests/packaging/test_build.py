"""What a build leaves: wheels by build isolation, native modules that know no torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastnas

ROOT = Path(__file__).resolve().parents[2]
NATIVE = sorted(Path(fastnas.__file__).parent.glob("_*.so"))


def wheel(out, wish):
    """A wheel built as pip builds it for a user: an isolated environment without torch.

    Unoptimised, a third of the work: the installed modules are the optimised ones.
    """
    copy = out / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.so", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, copy]
    environment = os.environ | {"FASTNAS_BUILD": wish, "CMAKE_BUILD_TYPE": "None"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, next(iter(out.glob("*.whl")), None)


@pytest.mark.slow
def test_wheel_with_the_cpu_module(tmp_path):
    done, path = wheel(tmp_path, "cpu")
    assert path is not None, done.stderr
    names = zipfile.ZipFile(path).namelist()
    assert any(n.startswith("fastnas/_C.") for n in names)
    for name in ("fastnas/kernels/mixed_sum.py", "fastnas/benchmarks/harness/run.py"):
        assert name in names
    assert not any(n.startswith(("tests/", "kernels/", "benchmarks/", "csrc/")) for n in names)
    site = tmp_path / "site"
    zipfile.ZipFile(path).extractall(site)
    check = (
        "import torch, fastnas, fastnas.kernels, fastnas.benchmarks;"
        f"assert fastnas.__file__.startswith({str(site)!r}), fastnas.__file__;"
        "x = [torch.ones(3)] * 2;"
        "print(fastnas.mixed_sum(x, torch.tensor([1.0, 2.0]), backend='cpu').tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[3.0, 3.0, 3.0]", done.stderr


@pytest.mark.slow
def test_wheel_without_native_modules(tmp_path):
    done, path = wheel(tmp_path, "python")
    assert path is not None, done.stderr
    assert not any(n.endswith(".so") for n in zipfile.ZipFile(path).namelist())
    assert "py3-none-any" in path.name


def test_an_unknown_wish_is_refused():
    environment = os.environ | {"FASTNAS_BUILD": "rust"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "FASTNAS_BUILD is 'rust'; allowed: auto, python, cpu, cuda" in done.stderr


def test_cuda_wished_without_nvcc_fails(tmp_path):
    """In a copy of find_nvcc's world: nothing on PATH, in CUDA_HOME or in /usr/local/cuda."""
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is at /usr/local/cuda/bin, where setup.py looks")
    environment = os.environ | {"FASTNAS_BUILD": "cuda", "PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "no nvcc" in done.stderr


@pytest.mark.skipif(not NATIVE, reason="no native module was built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("path", NATIVE, ids=lambda p: p.name.split(".")[0])
def test_native_modules_know_no_torch_and_share_no_vector_code(path):
    symbols = subprocess.run(
        ["nm", "-D", "-C", path], capture_output=True, text=True, check=True
    ).stdout
    assert not [s for s in symbols.splitlines() if "torch" in s or "c10::" in s or " at::" in s]
    linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libtorch" not in linked and "libcudart" not in linked and "libcuda.so" not in linked
    # A weak kernel symbol could be the AVX-512 copy serving the baseline.
    local = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=False).stdout
    kernels = [s for s in local.splitlines() if "fastnas::" in s and " W " in s]
    assert not [s for s in kernels if "avx" in s or "baseline" in s or "philox" in s]
