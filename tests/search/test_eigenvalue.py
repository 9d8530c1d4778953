"""The eigenvalue measured in a search, and searches that stop early by it and are resumed."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from fastnas import reference
from fastnas.search.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    save_checkpoint,
)
from fastnas.search.config import ConfigError, SearchConfig, make_config
from fastnas.search.diverged import DivergedError
from fastnas.search.early_stop import EarlyStop
from fastnas.search.eigenvalue import EigenvalueMonitor
from fastnas.search.hessian import Eigenvalue
from fastnas.search.searcher import Searcher
from fastnas.spaces import layout_of

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

QUIET = Console(quiet=True)
TINY = {
    "method": "darts", "space": "S2", "channels": 2, "layers": 1, "images": 64, "batch_size": 16,
    "epochs": 3, "tensorboard": False, "threads": 1, "validate_every": 0,
}  # fmt: skip
STOPPING = {
    "eigenvalue_every": 1, "early_stop": "eigenvalue", "epochs": 20, "layers": 1, "images": 32,
    "arch_lr": 0.05,
}  # fmt: skip
RISING = [1.0] * 13 + [1.5] * 7
"""By the rule it stops after epoch 16, counted from 0, and goes back to epoch 10."""


def searcher(out, **settings):
    return Searcher(make_config(SearchConfig, {**TINY, "out": str(out), **settings}))


def left(search):
    states = [search.network, search.arch, search.params_optimizer, search.arch_optimizer]
    leaves = torch.utils._pytree.tree_leaves([part.state_dict() for part in states])
    drawn = [random_state()["torch"], search.pipeline.generator.get_state()]
    return [t for t in leaves if isinstance(t, torch.Tensor)] + drawn


def same(ours, expected):
    return len(ours) == len(expected) and all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.parametrize("method", ["darts", "noisy-darts", "darts-minus", "drnas"])
def test_a_measurement_changes_no_bit_of_the_search(tmp_path, method):
    settings = {"method": method}
    if method == "noisy-darts":
        settings["skip_drop_path"] = 0.3  # which draws in the middle of a forward pass
    plain, watched = (
        searcher(tmp_path, **settings, eigenvalue_every=every) for every in (0, 2)
    )  # fmt: skip
    finished = []
    for search in (plain, watched):
        torch.manual_seed(0)
        search.search(tmp_path / "out", QUIET)
        finished.append(left(search))
    assert [h.get("eigenvalue") is None for h in watched.history] == [False, True, False]
    for before, now in zip(plain.history, watched.history):
        assert {k: v for k, v in now.items() if not k.startswith("eigenvalue")} == before
    assert same(finished[1], finished[0])


def test_the_last_epoch_is_measured_whatever_its_number(tmp_path):
    monitor = searcher(tmp_path, eigenvalue_every=3, epochs=6).eigenvalue
    assert [epoch for epoch in range(6) if monitor.is_due(epoch)] == [0, 3, 5]


def test_it_is_that_of_the_full_hessian(tmp_path):
    """Of the reference in float64, on the batch that was measured; the weight decay included."""
    search = searcher(tmp_path, eigenvalue_every=1, layers=3, arch_weight_decay=0.5)
    with torch.no_grad():
        for alpha in search.arch.parameters():
            alpha.copy_(torch.randn_like(alpha))
    found = search.eigenvalue._measure(search)
    seed = torch.Generator().manual_seed(0)
    images, labels = search.eigenvalue._batch(search, seed)
    assert len(images) == 16 and set(labels.tolist()) <= set(range(10))
    network = reference.SEARCH_NETWORKS["darts"](search.space, 2, 10, 3, in_channels=1).double()
    network.load_state_dict(search.network.state_dict())
    alphas = {k: a.detach().double().requires_grad_() for k, a in search.arch.alphas().items()}
    logits = list(alphas.values())
    out = network(images.double(), {cell: a.softmax(-1) for cell, a in alphas.items()})
    gradient = torch.autograd.grad(cross_entropy(out, labels), logits, create_graph=True)
    rows = [
        torch.cat([h.flatten() for h in torch.autograd.grad(g, logits, retain_graph=True)])
        for part in gradient for g in part.flatten()
    ]  # fmt: skip
    full = torch.stack(rows) + 0.5 * torch.eye(len(rows), dtype=torch.float64)
    true = float(torch.linalg.eigvalsh((full + full.T) / 2)[-1])
    assert found.value == pytest.approx(true, rel=0.01) and true > 0.51
    assert found.products <= 20


def test_each_epoch_has_other_images_and_noise(tmp_path):
    search = searcher(tmp_path, eigenvalue_every=1, eigenvalue_images=8, method="noisy-darts")
    first = search.eigenvalue._measure(search)
    assert search.eigenvalue._measure(search) == first
    search.epoch = 1
    assert search.eigenvalue._measure(search) != first


def test_more_images_than_there_are_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="eigenvalue_images is 33; at most 32 is allowed"):
        searcher(tmp_path, eigenvalue_every=1, eigenvalue_images=33)
    assert searcher(tmp_path, eigenvalue_every=1, eigenvalue_images=32).eigenvalue.images == 32


def test_a_hessian_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    def broken(self, search):
        raise ValueError("product 1 with the matrix is not finite")

    monkeypatch.setattr(EigenvalueMonitor, "_measure", broken)
    with pytest.raises(DivergedError, match="logits is not finite in epoch 1, step 2 of 2"):
        searcher(tmp_path, eigenvalue_every=1).search(tmp_path, QUIET)


class KilledError(Exception):
    """Ends a run as a kill does: nothing more is written."""


@pytest.fixture
def rising(monkeypatch):
    """In place of what the tiny network has: a series by which a search stops."""

    def measured(self, search):
        return Eigenvalue(RISING[search.epoch], 0.0, 1)

    monkeypatch.setattr(EigenvalueMonitor, "_measure", measured)


def test_it_stops_and_goes_back(tmp_path, rising):
    search, logits = searcher(tmp_path, **STOPPING), []
    end_epoch = search.end_epoch

    def end():
        logits.append({name: t.clone() for name, t in search.arch.state_dict().items()})
        return end_epoch()

    search.end_epoch = end
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    search.search(tmp_path / "run", console)
    stop = search.early_stop
    assert stop == EarlyStop(16, 10, pytest.approx(1.4)) and search.finished
    assert search.epoch == len(search.history) == 17
    for name, t in search.arch.state_dict().items():
        assert torch.equal(t, logits[10][name]) and not torch.equal(t, logits[16][name])
    assert str(search.genotype()) and search.history[10]["eigenvalue"] == 1.0
    assert (
        "stopped early after epoch 17 of 20: the eigenvalue has grown 1.40-fold; back to the"
        " logits of epoch 11" in console.export_text()
    )
    # The same series stops nothing where nobody has asked for it.
    without = {**STOPPING, "early_stop": "none"}
    search = searcher(tmp_path, **without)
    search.search(tmp_path / "whole", QUIET)
    assert search.epoch == 20 and search.early_stop is None
    assert "kept_logits" not in search.extra_state()


def test_the_genotype_is_that_of_the_epoch(tmp_path, rising):
    """Whatever the later epochs would derive."""
    search = searcher(tmp_path, **{**STOPPING, "arch_lr": 0.5})
    search.search(tmp_path / "run", QUIET)
    genotype = search.genotype()
    assert layout_of(genotype).text(genotype) == search.history[10]["genotype"]
    assert search.history[16]["genotype"] != search.history[10]["genotype"]


@pytest.mark.parametrize("killed_after", [5, 12, 16])
def test_resumed_it_ends_in_the_same_bits(tmp_path, rising, killed_after):
    whole = searcher(tmp_path, **STOPPING)
    whole.search(tmp_path / "whole", QUIET)
    stopped = searcher(tmp_path, **STOPPING)
    run_step = stopped.run_step

    def step():
        if stopped.epoch > killed_after - 1 and stopped.step == 0:
            raise KilledError
        run_step()

    stopped.run_step = step
    with pytest.raises(KilledError):
        stopped.search(tmp_path / "killed", QUIET)
    torch.manual_seed(99)
    again = searcher(tmp_path, **STOPPING)
    again.resume(tmp_path / "killed" / "search.pt")
    assert again.epoch == killed_after and not again.finished
    again.search(tmp_path / "killed", QUIET)
    assert again.history == whole.history and same(left(again), left(whole))


def test_a_search_that_has_stopped_is_finished_for_good(tmp_path, rising):
    whole = searcher(tmp_path, **STOPPING)
    whole.search(tmp_path / "run", QUIET)
    again = searcher(tmp_path, **STOPPING)
    again.resume(tmp_path / "run" / "search.pt")
    assert again.finished and again.early_stop == whole.early_stop
    again.search(tmp_path / "run", QUIET)
    assert again.epoch == 17 and same(left(again)[:-2], left(whole)[:-2])


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state["kept_logits"].pop(), "kept_logits are those of 0 epochs, not of 1"),
    (lambda state: state["kept_logits"][0].update(normal=torch.full((14, 2), math.nan)),
     "kept_logits are not finite"),
    (lambda state: state.pop("kept_logits"), "kept_logits is missing"),
    (lambda state: state["history"][0].pop("eigenvalue"), "eigenvalue of epoch 0 is None"),
])  # fmt: skip
def test_a_state_without_what_it_needs_is_refused(tmp_path, rising, change, message):
    search = searcher(tmp_path, **STOPPING)
    search.start_epoch()
    for _ in range(search.steps_per_epoch):
        search.make_step()
    search.history.append({"epoch": 0, **search.means(), **search.end_epoch()})
    search.sums = dict.fromkeys(search.summed, 0.0)
    search.epoch, search.step = 1, 0
    search.save(tmp_path / "good.pt")
    state = load_checkpoint(tmp_path / "good.pt", "search")
    del state["kind"]
    searcher(tmp_path, **STOPPING).resume(tmp_path / "good.pt")
    change(state)
    save_checkpoint(tmp_path / "bad.pt", "search", state)
    with pytest.raises(CheckpointError, match=message):
        searcher(tmp_path, **STOPPING).resume(tmp_path / "bad.pt")
