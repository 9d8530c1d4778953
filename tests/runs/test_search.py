"""Whole runs: every method and order, the report, what is refused."""

import json

import pytest
import torch
from rich.console import Console

from fastnas.nn import EvalNetwork, count_parameters
from fastnas.nn.cost import count_macs
from fastnas.runs.search import run_search, run_train
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import SearchConfig, TrainConfig, make_config
from fastnas.search.run_folder import RunFolderError
from fastnas.spaces import parse

TINY = {
    "space": "S2",
    "channels": 2,
    "layers": 3,
    "images": 128,
    "batch_size": 16,
    "epochs": 2,
    "train_epochs": 1,
    "train_channels": 2,
    "train_layers": 3,
    "train_batch_size": 64,
    "compare_steps": 1,
    "tensorboard": False,
    "threads": 1,
}
DARTS = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)
QUIET = Console(quiet=True)
KEYS = {
    "method",
    "space",
    "data",
    "seed",
    "genotype",
    "test_accuracy",
    "search_seconds",
    "step_speedup_vs_eager",
    "saved_bytes_ratio_vs_eager",
    "backend",
}


def search(out, **settings):
    config = make_config(SearchConfig, {**TINY, "out": str(out), **settings})
    return run_search(config, console=QUIET)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("method", ["darts", "noisy-darts", "fair-darts"])
def test_every_method_and_order(tmp_path, method, order):
    """What is derived is trained once: that does not depend on the order."""
    settings = {"method": method, "order": order, "epochs": 1, "images": 64}
    report = search(tmp_path / "run", **settings, train_epochs=2 - order)
    assert set(report) >= KEYS
    assert json.loads((tmp_path / "run/report.json").read_text()) == report
    assert str(parse(report["genotype"])) == str(
        parse((tmp_path / "run/genotype.json").read_text())
    )
    assert order == 2 or 0 <= report["test_accuracy"] <= 1
    assert report["step_speedup_vs_eager"] > 0


@pytest.mark.parametrize("method", ["rome", "rome-v1", "gdas", "single-path-darts"])
def test_every_single_path_method(tmp_path, method):
    """Compared is the one that `test_compare.py` does not compare."""
    options = {"samples": 2} if method == "rome" else {}
    settings = {"epochs": 1, "images": 64, "train_epochs": 0, **options}
    compared = method == "single-path-darts"
    report = search(tmp_path / "run", method=method, compare_steps=int(compared), **settings)
    assert len(parse(report["genotype"]).normal) == 4
    assert not compared or report["step_speedup_vs_eager"] > 0


def test_what_a_run_leaves(tmp_path):
    report = search(tmp_path / "run", tensorboard=True)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "search.pt",
        "train.pt",
        "genotype.json",
        "cell.png",
        "cell.svg",
        "history.png",
        "report.json",
        "report.md",
        "tensorboard",
        "tensorboard-train",
    }
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    text = (tmp_path / "run/report.md").read_text()
    assert f"{report['test_accuracy']:.4f}" in text and "saved for backward" in text
    # Eight steps of 3e-4 move no logit beyond what its noise of 1e-3 N(0, 1) may have been.
    assert set(report["undecided"]) == {"normal", "reduce"}
    assert f"**Undecided**: {report['undecided']['normal']} of the normal cell are" in text


def test_a_seed_fixes_the_search(tmp_path):
    first = search(tmp_path / "a", train_epochs=0, compare_steps=0)
    again = search(tmp_path / "b", train_epochs=0, compare_steps=0)
    other = search(tmp_path / "c", train_epochs=0, compare_steps=0, seed=1)
    states = [load_checkpoint(tmp_path / n / "search.pt", "search") for n in "abc"]
    assert first["genotype"] == again["genotype"]
    assert torch.equal(states[0]["arch"]["normal"], states[1]["arch"]["normal"])
    assert not torch.equal(states[0]["arch"]["normal"], states[2]["arch"]["normal"])
    assert other["test_accuracy"] is None


def test_arch_start_epoch_holds_the_logits(tmp_path):
    search(tmp_path / "run", arch_start_epoch=2, train_epochs=0, compare_steps=0)
    state = load_checkpoint(tmp_path / "run/search.pt", "search")
    assert state["arch_optimizer"]["state"] == {}
    assert all(epoch["valid_loss"] is None for epoch in state["history"])


def test_train(tmp_path):
    search(tmp_path / "run", train_epochs=0, compare_steps=0)
    settings = {
        "genotype": str(tmp_path / "run/genotype.json"),
        "out": str(tmp_path / "train"),
        "channels": 4,
        "layers": 3,
        "epochs": 2,
        "batch_size": 64,
        "images": 128,
        "tensorboard": False,
    }
    report = run_train(make_config(TrainConfig, settings), console=QUIET)
    assert json.loads((tmp_path / "train/report.json").read_text()) == report
    assert report["parameters"] > 0 and 0 <= report["test_accuracy"] <= 1
    again = run_train(make_config(TrainConfig, settings), resume=True, console=QUIET)
    assert again["test_accuracy"] == report["test_accuracy"]


NB201 = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_1x1~2|"
SMALL = {"channels": 2, "layers": 1, "images": 64, "batch_size": 32, "tensorboard": False}


def test_train_a_nas_bench_201_cell(tmp_path):
    settings = {"genotype": NB201, "out": str(tmp_path / "run"), "epochs": 2, **SMALL}
    report = run_train(make_config(TrainConfig, settings), console=QUIET)
    assert report["genotype"] == NB201
    assert parse((tmp_path / "run/genotype.json").read_text()) == parse(NB201)
    assert "| normal | 3 | skip_connect from 0, avg_pool_3x3 from 1, nor_conv_1x1 from 2 |" in (
        (tmp_path / "run/report.md").read_text()
    )
    state = load_checkpoint(tmp_path / "run/train.pt", "training")
    assert state["network"]["cells.0.layers.0.op.1.weight"].shape == (2, 2, 3, 3)
    assert state["optimizer"]["param_groups"][0]["nesterov"] is True
    again = run_train(make_config(TrainConfig, settings), resume=True, console=QUIET)
    assert again["test_accuracy"] == report["test_accuracy"]


@pytest.mark.parametrize(
    ("text", "channels", "epochs", "weight_decay", "nesterov"),
    [(NB201, 16, 200, 5e-4, True), (DARTS, 36, 600, 3e-4, False)],
)
def test_training_defaults_follow_the_kind_of_genotype(
    text, channels, epochs, weight_decay, nesterov
):
    config = make_config(TrainConfig, {"layers": 3}).completed(parse(text))
    assert (config.channels, config.layers, config.epochs) == (channels, 3, epochs)
    assert (config.weight_decay, config.nesterov) == (weight_decay, nesterov)
    assert config.resolved("auxiliary") == (text == DARTS)


def test_a_run_killed_while_it_made_its_folder_resumes(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.json.partial").write_text('{"out": "ru')
    report = search(tmp_path / "run", epochs=1, train_epochs=0, compare_steps=0)
    assert report["genotype"]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    search(tmp_path / "run", epochs=1, train_epochs=0, compare_steps=0)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    with pytest.raises(RunFolderError, match="holds a run; continue it with --resume"):
        search(tmp_path / "run", epochs=1)
    config = make_config(SearchConfig, {**TINY, "out": str(tmp_path / "run"), "epochs": 3})
    with pytest.raises(RunFolderError, match="another run: epochs 1 -> 3"):
        run_search(config, resume=True, console=QUIET)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}


def test_reports_tell_what_the_network_costs(tmp_path):
    """Whether or not it is trained, by the counts of `fastnas.nn.cost`."""
    off = search(tmp_path / "run", epochs=1, images=64, train_epochs=0, compare_steps=0)
    genotype = parse(off["genotype"])
    network = EvalNetwork(genotype, 2, 10, 3, in_channels=1)
    settings = {"genotype": str(tmp_path / "run/genotype.json"), "out": str(tmp_path / "train")}
    settings |= {"channels": 2, "layers": 3, "epochs": 1, "batch_size": 32, "images": 64}
    config = make_config(TrainConfig, {**settings, "tensorboard": False, "threads": 1})
    for report, folder in ((off, "run"), (run_train(config, console=QUIET), "train")):
        assert report["macs"] == count_macs(network, (1, 8, 8))
        assert report["parameters"] == count_parameters(network)
        assert report["latency_ms"] > 0 and report["latency_threads"] == 1
        assert report["latency_device"] == report["environment"]["device"]
        assert report["network"] == {"channels": 2, "layers": 3, "image": [1, 8, 8]}
        text = (tmp_path / folder / "report.md").read_text()
        assert f"{report['macs']:,} multiply-adds for an image of 1x8x8, " in text
        assert f"{report['parameters']:,} parameters" in text
