"""Whole runs of the MobileNet-like space: methods, report, resuming, what is refused."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from fastnas.reference import mobilenet as eager_mobilenet
from fastnas.runs import eager_memory, mobile_compare
from fastnas.runs.derived import derived_cost
from fastnas.runs.mobile import run_mobile_search
from fastnas.runs.mobile_compare import compare_mobile, eager_mobile_bytes
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import ConfigError, make_config
from fastnas.search.mobile_config import CHAINS, MobileConfig
from fastnas.search.mobile_searcher import MobileSearcher
from fastnas.search.run_folder import RunFolderError
from fastnas.spaces import MobileGenotype
from fastnas.spaces.mobile_genotype import read_column

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

QUIET = Console(quiet=True)
TINY = {
    "space": "mobilenet", "width": 0.05, "images": 32, "batch_size": 8, "epochs": 1,
    "train_epochs": 0, "compare_steps": 0, "tensorboard": False, "threads": 1,
}  # fmt: skip
METHODS = {
    "darts": {"order": 2},
    "noisy-darts": {"noise_kind": "uniform", "noise_mixture": "multiplicative", "order": 2},
    "fair-darts": {"zero_one_weight": 3.0},
    "gdas": {"samples": 2, "tau_schedule": "exponential", "tau_start": 5.0, "tau_end": 1.0},
}


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    """Sixty images of 8x8 pixels in four classes, of which twelve test."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(60) % 4)
    TINY["data"] = str(path)
    yield
    del TINY["data"]


def config(out, **settings):
    return make_config(MobileConfig, {**TINY, "out": str(out), **settings})


def search(out, **settings):
    return run_mobile_search(config(out, **settings), console=QUIET)


def left(searcher):
    """All that a search leaves, as tensors and figures."""
    states = [searcher.network.state_dict(), searcher.optimizer_pair[1].state_dict()["state"]]
    moments = [m for state in states[1].values() for m in state.values()]
    return [*states[0].values(), *moments], [{**figures} for figures in searcher.history]


def test_there_is_a_case_for_every_method():
    assert METHODS.keys() == CHAINS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_what_its_options_do(tmp_path, method):
    """Options reach the search: with others its logits end elsewhere."""
    given, plain = (
        MobileSearcher(config(tmp_path / name, method=method, images=16, **options))
        for name, options in (("given", METHODS[method]), ("plain", {}))
    )
    strategy = given.strategy
    assert {name: getattr(strategy, name) for name in METHODS[method]} == METHODS[method]
    ends = []
    for searcher in (given, plain):
        torch.manual_seed(0)
        for choice in searcher.network.choices:  # at 0 the zero-one loss has no gradient
            choice.logits.data = torch.linspace(-1, 1, len(choice.names))
        searcher.start_epoch()
        searcher.run_step()
        searcher.step = 1
        searcher.check_finite()
        ends.append(torch.cat([p.detach().flatten() for p in searcher.network.parameters()]))
    assert not torch.equal(*ends)


def test_the_schedules_of_an_epoch_reach_the_layers(tmp_path):
    noisy = MobileSearcher(config(tmp_path, noise_decay="cosine", epochs=4))
    gdas = MobileSearcher(config(tmp_path, method="gdas", epochs=3))
    noisy.epoch, gdas.epoch = 2, 1
    noisy.start_epoch()
    gdas.start_epoch()
    assert {choice.noise_amplitude for choice in noisy.network.choices} == {0.5}
    assert {choice.tau for choice in gdas.network.choices} == {(10.0 + 0.1) / 2}
    assert all("skip" in c.noise for c in noisy.network.choices if "skip" in c.names)
    expected = (0.05 + 0.001) / 2
    assert noisy.optimizer_pair[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_the_logits_wait_for_their_first_epoch(tmp_path):
    searcher = MobileSearcher(config(tmp_path, arch_start_epoch=1, epochs=2, validate_every=0))
    before = [choice.logits.clone() for choice in searcher.network.choices]
    searcher.start_epoch()
    searcher.make_step()
    assert all(torch.equal(a, c.logits) for a, c in zip(before, searcher.network.choices))
    assert searcher.sums["valid_loss"] == 0.0 and searcher.sums["train_loss"] > 0
    searcher.epoch, searcher.step = 1, 0
    searcher.run_step()
    assert not any(torch.equal(a, c.logits) for a, c in zip(before, searcher.network.choices))


class KilledError(Exception):
    """Ends a run as a kill does: nothing more is written."""


def test_a_search_of_paths_that_was_killed_ends_in_the_same_bits(tmp_path):
    """In its second epoch, which has a temperature of its own; tests of the command do mixtures."""
    settings = {"method": "gdas", "epochs": 2, "checkpoint_every": 1, "batch_size": 4, "images": 16}
    settings["validate_every"] = 0
    whole = MobileSearcher(config(tmp_path / "whole", **settings))
    whole.search(tmp_path / "whole", QUIET)
    assert whole.steps_per_epoch == 2
    stopped, done = MobileSearcher(config(tmp_path, **settings)), []
    run_step = stopped.run_step

    def step():
        if len(done) == 3:
            raise KilledError
        run_step()
        done.append(1)

    stopped.run_step = step
    with pytest.raises(KilledError):
        stopped.search(tmp_path, QUIET)
    torch.manual_seed(99)
    again = MobileSearcher(config(tmp_path, **settings))
    again.resume(tmp_path / "search.pt")
    again.search(tmp_path, QUIET)
    ours, expected = left(again), left(whole)
    assert ours[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(ours[0], expected[0], strict=True))


def test_a_run_from_its_config_to_its_report_and_on(tmp_path):
    """Whether and how what it found is trained may be decided after the search."""
    out = tmp_path / "run"
    searched = search(out)
    assert searched["test_accuracy"] is None and searched["parameters"] > 0
    last = {"train_epochs": 1, "squeeze": True, "activation": "swish", "compare_steps": 1}
    report = run_mobile_search(config(out, **last), resume=True, console=QUIET)
    assert json.loads((out / "report.json").read_text()) == report
    genotype = read_column((out / "genotype.json").read_text())
    assert genotype.text == report["genotype"] == searched["genotype"] and genotype.width == 0.05
    layers = report["layers"]
    blocks = [row["name"] for row in layers]
    assert blocks == ["stem", *report["genotype"].split(), "head", "classifier"]
    assert report["parameters"] == sum(row["parameters"] for row in layers)
    assert report["parameters"] > searched["parameters"]
    assert 0 <= report["test_accuracy"] <= 1 and report["test_images"] == 12
    assert report["step_speedup_vs_eager"] > 0 and report["not_compared"] is None
    # By default one candidate of a layer is held in place of six.
    assert report["saved_bytes_ratio_vs_eager"] > 3
    text = (out / "report.md").read_text()
    for shown in (
        f"{report['parameters']:,} parameters",
        "| 1 | k",
        "squeeze True, activation swish",
        "Undecided",
    ):
        assert shown in text, shown
    names = {path.name for path in out.iterdir()}
    drawn = {"column.png", "column.svg", "history.png"}
    assert names >= {"config.json", "search.pt", "train.pt", "genotype.json", *drawn}
    assert any(
        "squeeze" in name for name in load_checkpoint(out / "train.pt", "training")["network"]
    )
    for wrong in ({"squeeze": False}, {"width": 0.1}):
        (name,) = wrong
        with pytest.raises(RunFolderError, match=f"holds another run: {name} "):
            run_mobile_search(config(out, **last | wrong), resume=True, console=QUIET)
    again = run_mobile_search(
        config(out, **last | {"compare_steps": 0}), resume=True, console=QUIET
    )
    for name in ("genotype", "test_accuracy", "supernet_accuracy"):
        assert again[name] == report[name]


def test_the_estimate_is_what_eager_saves(tmp_path):
    searcher = MobileSearcher(config(tmp_path))
    before = torch.get_rng_state()
    estimate = eager_mobile_bytes(searcher)
    assert torch.equal(before, torch.get_rng_state())
    assert estimate == compare_mobile(searcher, 1)["eager_saved_bytes"]


def test_no_sampled_path_holds_more_than_the_estimate(tmp_path):
    searcher = MobileSearcher(config(tmp_path, method="gdas"))
    measured = compare_mobile(searcher, 1)["eager_saved_bytes"]
    assert measured <= eager_mobile_bytes(searcher) < 4 * measured


def test_a_comparison_that_does_not_fit_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(eager_memory, "free_bytes", lambda device: 0)
    monkeypatch.setattr(mobile_compare, "compare_mobile", None)
    report = search(tmp_path / "run", images=16, compare_steps=1)
    assert report["not_compared"].startswith("the eager step needs about ")
    assert f"Not compared: {report['not_compared']}." in (tmp_path / "run/report.md").read_text()


def test_settings_of_the_network_reach_it(tmp_path):
    searcher = MobileSearcher(config(tmp_path, memory="minimal", stem_stride=1, width=0.3))
    network = searcher.network
    assert network.memory == "minimal" and network.stem[0].stride == (1, 1)
    assert network.space == MobileGenotype(network.derive(), 0.3, 1).space
    assert [choice.mixing for choice in network.choices] == ["softmax"] * 19


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rome"}, "method is 'rome'; space mobilenet is searched by darts, fair-darts"),
        ({"method": "fair-darts", "threshold": 0.5}, "threshold given, which method fair-darts do"),
        ({"skip_drop_path": 0.1}, "skip_drop_path given, which method noisy-darts does not have"),
        ({"method": "gdas", "order": 1}, "order given, which method gdas does not have in space"),
        ({"method": "gdas", "tau_schedule": "constant", "tau_end": 1.0}, "tau_end is 1.0, but tau"),
        ({"channels": 8}, "unknown setting 'channels'"),
        ({"space": "S0"}, "space is 'S0'; allowed: mobilenet"),
        ({"width": 0.0}, "width is 0.0; a number is needed, above 0 to 16"),
        ({"memory": "fast"}, "memory is 'fast'; allowed: eager, lean, recompute, minimal"),
        ({"activation": "relu"}, "activation is 'relu'; allowed: relu6, swish"),
    ],
)
def test_what_a_config_refuses(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1, "image_size": 4}, "batch_size is 1; at least 2 is needed for images"),
        ({"batch_size": 17}, "batch_size is 17; at most 16 is allowed, the images for the weights"),
        ({"train_epochs": 1, "train_batch_size": 5000}, "train_batch_size is 5000; at most 48"),
    ],
)
def test_what_is_refused_before_a_folder_is_made(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        search(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_the_eager_network_takes_the_weights_of_ours(tmp_path):
    searcher = MobileSearcher(config(tmp_path))
    eager = eager_mobilenet.MobileNetSearchNetwork(4, space=searcher.space, in_channels=1)
    assert eager.state_dict().keys() == searcher.network.state_dict().keys()


def test_the_cost_is_paid_for_and_told(tmp_path):
    """The expected multiply-adds of the supernet's blocks are those of the derived network."""
    settings = {"cost": "macs:1", "cost_weight": 1e-9, "compare_steps": 0, "precision": "bf16"}
    report = run_mobile_search(config(tmp_path / "run", **settings), console=QUIET)
    assert report["precision"] == "bf16"
    cost = report["cost"]
    assert (cost["kind"], cost["target"]) == ("macs", 1)
    searcher = MobileSearcher(config(tmp_path / "run", **settings))
    with torch.no_grad():
        for choice in searcher.network.choices:
            best = torch.full_like(choice.logits, -100.0)
            best[0] = 100.0
            choice.logits.copy_(best)
    derived = derived_cost(searcher, searcher.genotype())
    assert float(searcher.cost.expected()) == pytest.approx(derived["macs"], rel=1e-9)
    assert "multiply-adds" in (tmp_path / "run/report.md").read_text()
