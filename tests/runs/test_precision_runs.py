"""Searches and trainings in bf16 and fp16: resumed, overflowing, and what is refused."""

import contextlib
import math

import pytest
import torch
from rich.console import Console

from fastnas.backends.registry import BackendError
from fastnas.runs.search import run_search
from fastnas.search.build import Answers
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import SearchConfig, TrainConfig, make_config
from fastnas.search.diverged import DivergedError
from fastnas.search.searcher import Searcher
from fastnas.search.trainer import Trainer
from fastnas.spaces import parse

QUIET = Console(quiet=True)
TINY = {
    "space": "S2",
    "channels": 2,
    "layers": 3,
    "images": 64,
    "batch_size": 8,
    "epochs": 2,
    "train_epochs": 0,
    "compare_steps": 0,
    "tensorboard": False,
    "threads": 1,
}
DARTS = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)
TRAINING = {name: TINY[name] for name in ("channels", "layers", "images", "batch_size", "epochs")}
TRAINING |= {"tensorboard": False, "threads": 1, "genotype": DARTS}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build(kind, **settings):
    if kind == "search":
        return Searcher(make_config(SearchConfig, {**TINY, "method": "darts", **settings}))
    return Trainer(make_config(TrainConfig, {**TRAINING, **settings}), parse(DARTS))


def go(run, out, steps=None):
    """Runs to the end, or ends before that step of the run as if it were killed."""
    make, made = run.run_step, []

    def run_step():
        if len(made) == steps:
            raise InterruptedError
        make()
        made.append(1)

    run.run_step = run_step
    try:
        run.search(out, QUIET) if isinstance(run, Searcher) else run.train(out, QUIET)
    except InterruptedError:
        assert steps is not None
    found = load_checkpoint(out / run.checkpoint, run.kind)
    return {name: value for name, value in found.items() if name != "seconds"}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["search", "train"])
def test_forward_runs_in_it_and_the_state_is_float32(monkeypatch, tmp_path, kind, name):
    run = build(kind, precision=name, epochs=1)
    seen, answered = [], []
    classifier = run.network.classifier
    classifier.register_forward_hook(
        lambda module, given, y: seen.append((y.dtype, module.training))
    )
    monkeypatch.setattr(Answers, "add", lambda self, logits, labels: answered.append(logits.dtype))
    with contextlib.suppress(ZeroDivisionError):
        go(run, tmp_path)
    assert {dtype for dtype, _ in seen} == {TYPES[name]} and set(answered) == {TYPES[name]}
    assert {training for _, training in seen} == {True, False}
    optimizers = [part for part in run.checkpointed().values() if hasattr(part, "param_groups")]
    moments = [v for o in optimizers for state in o.state.values() for v in state.values()]
    assert moments and {m.dtype for m in moments if m is not None} == {torch.float32}


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["search", "train"])
def test_it_resumes_in_the_middle_to_the_same_bits(tmp_path, kind, name):
    """In fp16 with scales that have overflowed before, and with the counts of that."""

    def start():
        run = build(kind, precision=name, checkpoint_every=1)
        for scaling in run.precision.scales.values():
            scaling.scale = 2.0**40
        return run

    whole = go(start(), tmp_path / "whole")
    go(start(), tmp_path / "killed", steps=5 if kind == "search" else 9)
    again = build(kind, precision=name, checkpoint_every=1)
    again.resume(tmp_path / "killed" / again.checkpoint)
    assert again.step > 0 and again.epoch < 2
    assert same(go(again, tmp_path / "killed"), whole)
    if name == "fp16":
        assert sum(row["skipped_weight_steps"] for row in whole["history"]) > 2
        assert whole["precision"]["weight"]["scale"] < 2.0**40
    assert all(math.isfinite(row["train_loss"]) for row in whole["history"])


def test_an_overflow_skips_the_step_of_its_half_alone():
    run = build("search", precision="fp16")
    run.start_epoch()
    weights, logits = run.precision.weights.scaling, run.precision.logits.scaling
    before = [p.detach().clone() for p in run.network.parameters()]
    alphas = [p.detach().clone() for p in run.arch.parameters()]
    weights.scale = 2.0**100
    run.run_step()
    assert all(map(torch.equal, before, run.network.parameters()))
    assert not all(map(torch.equal, alphas, run.arch.parameters()))
    assert not run.params_optimizer.state_dict()["state"]
    assert (weights.scale, weights.skipped, weights.lost) == (2.0**99, 1, 0)
    assert (logits.scale, logits.skipped) == (2.0**16, 0)
    assert math.isfinite(float(run.sums["train_loss"]))
    weights.scale, logits.scale = 2.0**8, 2.0**100
    run.run_step()
    assert not any(map(torch.equal, before[-2:], list(run.network.parameters())[-2:]))
    assert logits.skipped == 1 and weights.skipped == 1


def lose(run, at):
    """Makes the loss of the weights' half NaN in these steps."""
    forward, calls = run.network.classifier.forward, iter(range(10**6))

    def poisoned(x):
        y = forward(x)
        return y * math.nan if torch.is_grad_enabled() and next(calls) in at else y

    run.network.classifier.forward = poisoned


def test_a_lost_loss_is_left_out_of_the_mean_in_fp16_and_ends_bf16(tmp_path):
    """Every other pass is that of the weights."""
    for name in ("bf16", "fp16"):
        run = build("search", precision=name, epochs=1)
        for scaling in run.precision.scales.values():
            scaling.scale = 2.0**8  # where nothing else overflows
        lose(run, {3})
        if name == "bf16":
            with pytest.raises(DivergedError, match="train_loss is nan in epoch 1, step 2 of 4"):
                go(run, tmp_path / name)
    row = go(run, tmp_path / "fp16")["history"][0]
    assert row["skipped_weight_steps"] == 1 and 1 < row["train_loss"] < 4
    assert row["train_accuracy"] * 3 * 8 == pytest.approx(round(row["train_accuracy"] * 3 * 8))


@pytest.mark.parametrize("epochs", [1, 20])
def test_what_no_scale_cures_ends_the_run(tmp_path, epochs):
    """At the end of an epoch without a single loss, or where the scale has become too small."""
    run = build("train", precision="fp16", epochs=epochs, batch_size=8 if epochs == 1 else 2)
    lose(run, range(10**6))
    wanted = (
        "train_loss is nan in epoch 1" if epochs == 1 else "not finite at any scale of the loss"
    )
    with pytest.raises(DivergedError, match=wanted):
        go(run, tmp_path)


def test_precision_is_part_of_what_a_run_is(tmp_path):
    config = make_config(SearchConfig, {**TINY, "out": str(tmp_path / "run"), "epochs": 1})
    run_search(config, console=QUIET)
    settings = {**TINY, "out": str(tmp_path / "run"), "epochs": 1, "precision": "bf16"}
    other = make_config(SearchConfig, settings)
    with pytest.raises(ValueError, match="another run: precision 'fp32' -> 'bf16'"):
        run_search(other, resume=True, console=QUIET)


def test_a_backend_without_it_is_refused_before_the_data_are_read(tmp_path):
    settings = {**TINY, "precision": "fp16", "backend": "cpu", "data": "absent.npz"}
    with pytest.raises(BackendError, match="mixed_edges has no float16 kernel on cpu"):
        Searcher(make_config(SearchConfig, settings))


def test_a_lost_auxiliary_loss_takes_its_figures_with_it(monkeypatch):
    """The loss without the auxiliary one is finite, but its step is skipped: no mean holds it."""
    text = (
        "Genotype(normal=[('skip_connect', 0), ('skip_connect', 1)], normal_concat=[2],"
        " reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1)], reduce_concat=[2])"
    )
    genotype = parse(text)
    config = TrainConfig(
        genotype=text, channels=2, layers=3, images=32, batch_size=8, precision="fp16"
    )
    trainer = Trainer(config, genotype)
    trainer.start_epoch()
    logits_of, turn = trainer._logits, []

    def logits(images):
        turn.append(1)
        found, auxiliary = logits_of(images)
        return found, auxiliary * (float("inf") if len(turn) % 2 else 1.0)

    monkeypatch.setattr(trainer, "_logits", logits)
    for _ in range(4):
        trainer.make_step()
    assert trainer.precision.lost("train_loss") == 2
    assert 1.5 < trainer.means()["train_loss"] < 3.5
