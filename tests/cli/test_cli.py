"""The command line: wrong input is one line on stderr, exit code 2, and nothing is written."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastnas import __version__, cli
from fastnas.backends import BACKENDS
from fastnas.backends.registry import forget_choices
from fastnas.blackbox.config import StudyConfig
from fastnas.search.checkpoint import load_checkpoint, save_checkpoint
from fastnas.search.config import SearchConfig, TrainConfig
from fastnas.search.fields import settings_of

GENOTYPE = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)
NB201 = "|none~0|+|skip_connect~0|none~1|+|none~0|nor_conv_1x1~1|none~2|"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--method", "enas"], "method is 'enas'; allowed: anasod-darts"),
        (
            ["search", "--method", "random"],
            "evaluator is ''; nas-bench-graph:DATA, supernet:FOLDER, table:FILE",
        ),
        (["search", "--method", "random", "--epochs", "3"], "unknown setting 'epochs'. Allowed:"),
        (["search", "--method", "random", "--evaluator", "table:absent.csv"], "table absent.csv"),
        (["search", "--method", "random", "--evaluator", "table:unknown.yaml"], "no column 'arch"),
        (["search", "--method", "local", "--initial", "3"], "method local does not take"),
        (["search", "--space", "S9"], "no search space 'S9'; there are S0, S1, S2, S3, S4"),
        (["search", "--epochs", "0"], "epochs is 0; a whole number is needed, 1 to"),
        (
            ["search", "--epochs", "many"],
            "epochs is 'many'; a whole number is needed, 1 to 1000000",
        ),
        (["search", "--epochs", "1_0"], "epochs is '1_0'; a whole number is needed"),
        (["search", "--epochs", "9" * 5000], "a whole number is needed, 1 to 1000000"),
        (["search", "--lr", "inf"], "lr is 'inf'; a number is needed, above 0 to 1e+30"),
        (["search", "--lr", ".nan"], "lr is nan; a number is needed, above 0 to 1e+30"),
        (["search", "--momentum", ".inf"], "momentum is inf; a number is needed, 0 to 1"),
        (["search", "--seed", str(2**64)], "seed is 18446744073709551616; a whole number is"),
        (["search", "--threads", "100000000"], "threads is 100000000; a whole number is needed"),
        (["search", "--device", "cpu:7"], "device is 'cpu:7'; cpu, cuda, cuda:N and auto"),
        (["search", "--device", "cuda:99"], "device is 'cuda:99'; there are 0 CUDA devices"),
        (["search", "--device", "meta"], "device is 'meta'; cpu, cuda, cuda:N and auto"),
        (["search", "--precision", "fp64"], "precision is 'fp64'; allowed: fp32, bf16, fp16"),
        (["search", "--cost", "macs:"], "cost is 'macs:'; macs:NUMBER, params:NUMBER or latency:"),
        (["search", "--cost", "flops:3"], "cost is 'flops:3'; macs:NUMBER, params:NUMBER or"),
        (["search", "--cost", "macs:-1"], "cost is 'macs:-1'; macs:NUMBER, params:NUMBER or"),
        (["search", "--cost", "latency:12"], "cost is 'latency:12'; macs:NUMBER, params:NUMBER or"),
        (["search", "--cost-weight", "2"], "cost_weight is 2.0, but there is no cost"),
        (
            ["search", "--precision", "fp16", "--backend", "cpu"],
            "mixed_edges has no float16 kernel on cpu",
        ),
        (["search", "--noise-facto", "1"], "No such option"),
        (["search", "--method", "darts", "--noise-factor", "1"], "method darts does not take"),
        (
            ["search", "--backend", "tpu"],
            "backend is 'tpu'; allowed: auto, eager, cpu, cuda, triton",
        ),
        (["search", "--device", "abacus"], "device is 'abacus'"),
        (["search", "--data", "mnist"], "unknown data set 'mnist'"),
        (["search", "--data", "absent.npz"], "absent.npz"),
        (["search", "--batch-size", "5000"], "batch_size is 5000; at most 719 is allowed"),
        (
            ["search", "--config", "absent.yaml"],
            "config file absent.yaml cannot be read: No such file",
        ),
        (["search", "--config", "unknown.yaml"], "unknown setting 'epoch'; did you mean epochs?"),
        (["search", "--data", "text.npz"], "text.npz"),
        (["search", "--data", "tables.npz"], "tables.npz"),
        (["search", "--data", "cifar10"], "torchvision"),
        (["search", "--out", "full"], "full is not empty and holds no run"),
        (["search", "--out", "unknown.yaml/run"], "cannot hold a run"),
        (["train"], "genotype is empty"),
        (["train", "absent.json"], "genotype file absent.json cannot be read"),
        (["train", "unknown.yaml"], "genotype file unknown.yaml:"),
        (["train", GENOTYPE.replace("sep_conv_3x3", "conv_9x9")], "conv_9x9"),
        (["train", NB201, "--auxiliary"], "auxiliary is True; the network of a NAS-Bench-201 cell"),
        (["train", NB201, "--drop-path", "0.1"], "drop_path is 0.1; the network of a NAS-Bench"),
        (["train", NB201, "--auxiliary-weight", "0.4"], "auxiliary_weight is 0.4; the network"),
        (["train", NB201.replace("none~2", "none~3")], "genotype: node 3"),
        (["train", "full"], "genotype file full cannot be read: Is a directory"),
        (["draw", GENOTYPE, "cell.gif"], "cell.gif"),
        (["draw", GENOTYPE, "no/cell.png"], "no/cell.png cannot be written: No such file"),
        (["draw", GENOTYPE, "x" * 300 + ".png"], "cannot be written: File name too long"),
        (["draw", "a (1)|{}.txt", "cell.png"], "genotype file a (1)|{}.txt cannot be read"),
        (["search", "--config", "full"], "config file full cannot be read: Is a directory"),
        (["search", "--data", "full.npz"], "full.npz: cannot be read: Is a directory"),
        (["search", "--method", "random", "--evaluator", "table:full"], "full cannot be read: Is"),
        (["sample", "absent.json"], "absent.json cannot be read: No such file"),
        (["sample", "absent.json", "--count", "0"], "count is 0; a whole number is needed"),
        (["sample", "absent.json", "--seed", "-1"], "seed is -1; a whole number is needed"),
        (["bench", "--skip", "jax"], "skip has 'jax'; allowed in 'ops': eager-stack"),
        (["bench", "search", "--only", "jax"], "only has 'jax'; allowed: eager, "),
        (["bench", "--op", "jax"], "op is 'jax'; allowed: mixed_sum, "),
        (["bench", "--threads", "1e9"], "threads is 1000000000.0; a whole number is needed"),
        (["draw", GENOTYPE, "full/kept.png"], "exists; --force replaces it"),
        (["draw", "Genotype(normal=", "cell.png"], "genotype"),
        (["bench", "everything"], "everything"),
        (["paint"], "No such command 'paint'"),
    ],
)
def test_wrong_input(fastnas, tmp_path, arguments, message):
    (tmp_path / "unknown.yaml").write_text("epoch: 3\n")
    (tmp_path / "text.npz").write_text("not a zip")
    np.savez(tmp_path / "tables.npz", prices=np.ones(3))
    (tmp_path / "full").mkdir()
    (tmp_path / "full.npz").mkdir()
    (tmp_path / "full/kept.png").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    code, _, error = fastnas(*arguments)
    assert code == 2, error
    assert error.startswith("fastnas: error: ") and error.count("\n") == 1
    assert message in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full/kept.png").read_text() == "kept"


@pytest.mark.parametrize("damage", ["truncated", "other network", "missing key", "not ours"])
def test_broken_checkpoint(fastnas, tmp_path, damage):
    flags = ["--out=run", "--space=S2", "--channels=2", "--layers=1", "--images=64"]
    flags += ["--batch-size=16", "--epochs=1", "--train-epochs=0", "--compare-steps=0"]
    flags += ["--no-tensorboard"]
    code, _, error = fastnas("search", *flags)
    assert code == 0, error
    path = tmp_path / "run/search.pt"
    state = load_checkpoint(path, "search")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "other network":
        state["network"]["classifier.weight"] = torch.ones(3, 3)
        save_checkpoint(path, "search", state)
    elif damage == "missing key":
        del state["augment"]
        save_checkpoint(path, "search", state)
    else:
        torch.save([1, 2, 3], path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, _, error = fastnas("search", *flags, "--resume")
    assert code == 2
    assert error.startswith("fastnas: error: ") and error.count("\n") == 1
    assert "checkpoint run/search.pt" in error or "run/search.pt is no" in error
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_flags_and_file_build_one_config(fastnas, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("fastnas.runs.search.run_search", lambda config, **_: seen.append(config))
    (tmp_path / "a.yaml").write_text("epochs: 3\nseed: 5\nflip: true\n")
    code, _, error = fastnas("search", "--config", "a.yaml", "--seed", "7", "--no-flip")
    assert code == 0, error
    assert (seen[0].epochs, seen[0].seed, seen[0].flip) == (3, 7, False)
    assert seen[0].tensorboard is True


def test_draw(fastnas, tmp_path):
    for name in ("cell.png", "cell.svg"):
        code, _, error = fastnas("draw", GENOTYPE, name)
        assert code == 0, error
        assert (tmp_path / name).stat().st_size > 1000
    (tmp_path / "genotype.json").write_text(
        json.dumps(
            {
                "normal": [["skip_connect", 0], ["skip_connect", 1]],
                "normal_concat": [2],
                "reduce": [["skip_connect", 0], ["skip_connect", 1]],
                "reduce_concat": [2],
            }
        )
    )
    assert fastnas("draw", "genotype.json", "cell.png", "--force")[0] == 0
    assert fastnas("draw", NB201, "nb201.svg")[0] == 0
    assert "nor_conv_1x1" in (tmp_path / "nb201.svg").read_text()


def test_info(fastnas):
    code, out, _ = fastnas("info")
    assert code == 0
    for word in ("eager", "triton", "mixed_sum", "float64", torch.__version__):
        assert word in out


def test_info_cuts_no_path(fastnas, monkeypatch):
    path = "/" + "a" * 200 + "/libgomp.so.1"
    monkeypatch.setattr("fastnas.info._openmp_libraries", lambda: [path])
    monkeypatch.setenv("COLUMNS", "80")
    assert path in fastnas("info")[1]


def test_info_names_the_variable_that_is_wrong(fastnas, monkeypatch):
    monkeypatch.setenv("FASTNAS_BACKEND", "gpu")
    forget_choices()
    code, out, error = fastnas("info")
    forget_choices()
    assert code == 2 and "mixed_sum" in out
    assert error == (
        f"fastnas: error: FASTNAS_BACKEND is 'gpu'; allowed: {', '.join([*BACKENDS, 'auto'])}\n"
    )


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["search", "-h"], ["bench", "-h"]])
def test_help(fastnas, arguments):
    code, out, error = fastnas(*arguments)
    assert code == 0 and "Usage: fastnas" in out and not error


def test_version(fastnas):
    assert fastnas("--version")[:2] == (0, f"fastnas {__version__}\n")


@pytest.mark.parametrize("kind", [SearchConfig, StudyConfig, TrainConfig])
def test_help_shows_settings_and_their_bounds(kind):
    command = "train" if kind is TrainConfig else "search"
    result = CliRunner().invoke(cli.command_line(), [command, "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0 and "--resume" in result.output
    for name, setting in settings_of(kind).items():
        if name == "genotype":
            continue
        (line,) = (
            line for line in result.output.splitlines()
            if f"│ --{name.replace('_', '-')} " in line
        )  # fmt: skip
        assert setting.bounds is None or str(setting.bounds) in line


def test_an_error_is_one_line_of_bounded_length_that_moves_no_cursor(fastnas):
    code, _, error = fastnas("search", "--data", "\x1b[31m\r" + "x" * 100_000)
    assert code == 2 and error.count("\n") == 1 and len(error) < 4000
    assert error[:-1].isprintable()
