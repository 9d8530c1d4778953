"""The landscape of a finished search: directions, values, files, refusals."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from fastnas.runs.landscape import FILES, directions, landscape, leave_landscape
from fastnas.runs.landscape_settings import LandscapeSettings
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.config import ConfigError, SearchConfig, config_text, make_config
from fastnas.search.opened import open_search
from fastnas.search.recalibrate import recalibrated
from fastnas.search.searcher import Searcher

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Console(quiet=True)
TINY = {
    "space": "S2", "channels": 2, "layers": 1, "images": 64, "batch_size": 16, "epochs": 1,
    "tensorboard": False, "threads": 1, "validate_every": 0, "arch_lr": 0.5,
}  # fmt: skip
SMALL = LandscapeSettings(steps=3, extent=2.0)


def searched(folder, **settings):
    """A folder with what `open_search` reads of a run."""
    config = make_config(SearchConfig, {**TINY, "out": str(folder), **settings})
    Searcher(config).search(folder, QUIET)
    (folder / "config.json").write_text(config_text(config))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("darts"), method="darts")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_directions_are_orthogonal_and_as_long_as_the_logits_of_each_cell():
    logits = {"normal": 3 * torch.randn(14, 8), "reduce": 0.01 * torch.randn(14, 8)}
    first, second = directions(logits, seed=0)
    for alpha, d, e in zip(logits.values(), first, second):
        norm = float(alpha.double().norm())
        assert float(d.norm()) == pytest.approx(norm) == float(e.norm())
        assert abs(float((d * e).sum())) <= 1e-12 * norm**2
    same, other = directions(logits, seed=0), directions(logits, seed=1)
    assert torch.equal(same[0][0], first[0]) and torch.equal(same[1][1], second[1])
    assert not torch.equal(other[0][0], first[0])


@pytest.mark.parametrize(("logits", "message"), [
    (torch.zeros(14, 8), "are all 0, which gives no scale"), (torch.ones(1, 1), "are one number"),
])  # fmt: skip
def test_logits_without_directions_are_refused(logits, message):
    with pytest.raises(ConfigError, match=f"the logits normal {message}"):
        directions({"normal": logits}, 0)


def test_a_point_is_the_validation_at_its_logits(run):
    searcher = open_search(run)
    found = landscape(searcher, SMALL, QUIET)
    assert found.offsets == [-2.0, 0.0, 2.0] and found.images == 32
    alphas = dict(searcher.arch.named_parameters())
    first, second = directions({k: p.detach() for k, p in alphas.items()}, 0)
    index = searcher.evaluation_index
    [(_, batch)] = searcher.plain(index)
    labels = searcher.images.train_labels[index]
    network = searcher.network.eval()
    for i, x in enumerate(found.offsets):
        for j, y in enumerate(found.offsets):
            weights = {
                name: (p.detach().double() + x * d + y * e).float().softmax(-1)
                for (name, p), d, e in zip(alphas.items(), first, second)
            }
            with torch.no_grad():
                out = network(batch, weights)
            assert float(found.loss[i, j]) == pytest.approx(
                float(cross_entropy(out.double(), labels)), rel=1e-6
            )
            right = float((out.argmax(-1) == labels).double().mean())
            assert float(found.accuracy[i, j]) == pytest.approx(right)
    # The middle is what the search has validated itself.
    assert float(found.accuracy[1, 1]) == searcher.history[-1]["valid_accuracy"]
    assert len({float(v) for v in found.loss.flatten()}) == 9


def test_the_search_is_left_as_it_was(run):
    searcher = open_search(run)
    tensors = [*searcher.arch.parameters(), *searcher.network.state_dict().values()]
    before = [t.detach().clone() for t in tensors]
    landscape(searcher, SMALL, QUIET)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors)) and searcher.network.training


def test_of_sampled_paths_a_point_is_its_likeliest_path(tmp_path):
    """As the search validates it: with statistics of that path."""
    searcher = open_search(searched(tmp_path, method="rome", samples=2))
    found = landscape(searcher, replace(SMALL, images=16), QUIET)
    assert found.images == 16
    weights = searcher.strategy.validation_weights(searcher.arch)
    batches = (batch for _, batch in searcher.plain(searcher.recalibration_index))
    network = recalibrated(searcher.network, weights, batches).eval()
    index = searcher.evaluation_index[:16]
    [(_, batch)] = searcher.plain(index)
    with torch.no_grad():
        out = network(batch, weights)
    expected = cross_entropy(out.double(), searcher.images.train_labels[index])
    assert float(found.loss[1, 1]) == pytest.approx(float(expected), rel=1e-6)


def test_what_it_leaves(run, tmp_path):
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    before = {path.name for path in run.iterdir()}
    found = leave_landscape(run, SMALL, console=console)
    assert {path.name for path in run.iterdir()} - before == set(FILES)
    rows = list(csv.DictReader((run / "landscape.csv").open()))
    assert len(rows) == 9
    assert [float(row["x"]) for row in rows] == [-2, -2, -2, 0, 0, 0, 2, 2, 2]
    assert [float(row["y"]) for row in rows] == [-2, 0, 2] * 3
    for row, loss, accuracy in zip(rows, found.loss.flatten(), found.accuracy.flatten()):
        assert float(row["loss"]) == pytest.approx(float(loss), rel=1e-8)
        assert float(row["accuracy"]) == pytest.approx(float(accuracy))
    assert "3 x 3 points on 32 images" in console.export_text()
    first = [(run / name).read_bytes() for name in FILES]
    with pytest.raises(ConfigError, match=r"landscape\.csv exists; --force replaces it"):
        leave_landscape(run, SMALL, console=QUIET)
    leave_landscape(run, SMALL, force=True, console=QUIET)
    assert [(run / name).read_bytes() for name in FILES] == first
    leave_landscape(run, replace(SMALL, seed=1), force=True, console=QUIET)
    assert (run / "landscape.csv").read_bytes() != first[0]


def test_what_is_no_finished_search_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="holds no search"):
        leave_landscape(tmp_path, SMALL, console=QUIET)
    with pytest.raises(ConfigError, match="images is 33; at most 32 is allowed"):
        leave_landscape(run, replace(SMALL, images=33), console=QUIET)
    settings = make_config(SearchConfig, {**TINY, "out": str(run), "method": "darts", "epochs": 2})
    searcher = Searcher(settings)
    searcher.save(run / "search.pt")
    (run / "config.json").write_text(config_text(settings))
    with pytest.raises(ConfigError, match="not finished: 0 of 2 epochs are done"):
        leave_landscape(run, SMALL, console=QUIET)
    (run / "search.pt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        leave_landscape(run, SMALL, console=QUIET)
    assert not set(FILES) & {path.name for path in run.iterdir()}


def test_of_other_data_it_is_refused(run):
    settings = make_config(SearchConfig, {**TINY, "out": str(run), "method": "darts", "seed": 1})
    (run / "config.json").write_text(config_text(settings))
    with pytest.raises(ConfigError, match="is of another run: seed 0 -> 1"):
        leave_landscape(run, SMALL, console=QUIET)


@pytest.mark.parametrize(("settings", "message"), [
    ({"steps": 1}, "steps is 1"), ({"steps": 2.5}, "steps is 2.5"), ({"extent": 0.0}, "extent is"),
    ({"extent": float("nan")}, "extent is nan"), ({"images": 0}, "images is 0"),
    ({"seed": -1}, "seed is -1"),
])  # fmt: skip
def test_settings_out_of_bounds_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LandscapeSettings(**settings)
