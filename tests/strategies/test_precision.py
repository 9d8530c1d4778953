"""Scaled losses: the rule of GradScaler, gradients to the bit, and steps that are skipped."""

import math

import pytest
import torch
from torch import nn

from fastnas.strategies import precision
from fastnas.strategies.precision import INITIAL, LEAST, HalfStep, LossScale, Precision


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_moves_as_that_of_gradscaler(monkeypatch, seed):
    monkeypatch.setattr(precision, "INTERVAL", 3)
    generator = torch.Generator().manual_seed(seed)
    theirs = torch.amp.GradScaler("cpu", init_scale=INITIAL, growth_interval=3)
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizers = [torch.optim.SGD([t], lr=0.25, momentum=0.9) for t in (p, q)]
    half = HalfStep(torch.float16)
    for overflows in (torch.rand(60, generator=generator) < 0.2).tolist():
        factor = math.inf if overflows else 0.5
        for optimizer in optimizers:
            optimizer.zero_grad()
        theirs.scale((factor * p).sum()).backward()
        theirs.step(optimizers[0])
        theirs.update()
        loss = (factor * q).sum()
        half.backward(loss)
        half.finish([q], 1e30)
        half.move([q], torch.zeros(()), optimizers[1].step)
        assert half.scaling.scale == theirs.get_scale()
        assert torch.equal(p, q)
    assert half.scaling.skipped > 5 and half.scaling.scale != INITIAL


def test_the_scale_stays_where_float32_has_it_and_above_0():
    scale = LossScale()
    scale.scale = 2.0**127
    scale.clean = precision.INTERVAL - 1
    scale.update(True)
    assert scale.scale == 2.0**127 and scale.clean == 0
    found = Precision("fp16")
    for _ in range(30):
        assert found.problem() is None
        found.logits.scaling.update(False)
    assert found.logits.scaling.scale == LEAST
    found.logits.scaling.update(False)
    assert found.problem() == "the gradients of the logits are not finite at any scale of the loss"
    for _ in range(2000):
        found.logits.scaling.update(False)
    assert found.logits.scaling.scale == LEAST / 2


def test_a_gradient_that_float16_cannot_hold_arrives():
    """1e-8 is 0 in float16, and 6.6e-4 with the scale."""
    layer, x = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
    found = []
    for half in (HalfStep(torch.float16), HalfStep(torch.bfloat16)):
        half.dtype = torch.float16
        with half.autocast():
            loss = (layer(x).float() * 1e-8).sum()
        (gradient,) = half.grad(loss, [layer.weight])
        assert gradient.dtype == torch.float32
        found.append(gradient)
    scaled, plain = found
    assert not plain.any()
    torch.testing.assert_close(scaled, torch.full((1, 2), 1e-8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", [1.0, math.nan])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_of_gradients_that_are_not_finite_is_not_made(loss, value):
    found = Precision("fp16")
    p, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))
    p.grad = torch.tensor([1.0, value, 1.0])
    calls = []
    found.weights.move([p, unused], torch.tensor(loss), lambda: calls.append(1))
    assert not calls and found.weights.scaling.scale == INITIAL / 2
    assert found.logits.scaling.scale == INITIAL  # each half has its own
    assert found.figures() == {"skipped_weight_steps": 1, "skipped_logit_steps": 0}
    assert found.lost("train_loss") == (loss != 1) and found.lost("valid_loss") == 0
    found.end_epoch()
    assert found.figures() == {"skipped_weight_steps": 0, "skipped_logit_steps": 0}
    p.grad = torch.ones(3)
    found.weights.move([p, unused], torch.tensor(1.0), lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_others_move_always_and_hold_nothing(name):
    found = Precision(name)
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.tensor([math.nan])
    calls = []
    found.weights.move([p], torch.tensor(math.nan), lambda: calls.append(1))
    assert calls == [1] and found.parts() == {} and found.figures() == {}
    assert found.holds({"loss": torch.tensor(math.nan)}) and found.problem() is None


def test_a_state_is_put_back_and_others_are_refused():
    found, other = Precision("fp16"), Precision("fp16")
    found.weights.scaling.update(False, lost=True)
    found.logits.scaling.update(True)
    other.load_state_dict(found.state_dict())
    assert other.state_dict() == found.state_dict()
    good = {"scale": 4.0, "clean": 0, "skipped": 0, "lost": 0}
    for name, value in (
        *(("scale", v) for v in (0.0, -1.0, math.inf, math.nan, 1, "4", None)),
        *(("clean", -1), ("skipped", 0.5), ("lost", True)),
    ):
        with pytest.raises(ValueError, match=r"of a (scaled )?loss"):
            other.load_state_dict({"weight": {**good, name: value}, "logit": good})


@pytest.mark.parametrize("name", ["fp64", "", "FP16", "half"])
def test_a_precision_that_there_is_not(name):
    with pytest.raises(ValueError, match=r"precision is .*; allowed: fp32, bf16, fp16"):
        Precision(name)


def test_a_device_without_autocast_is_refused():
    with pytest.raises(ValueError, match="precision is 'bf16', which meta does not have"):
        Precision("bf16", "meta")
    assert Precision("fp32", "meta").dtype is None
