"""Where the weights of a Choice come from: logits of its own, samples, noise; choices of inputs."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from mixture_cases import EXACT, MEMORIES, assert_same, conv_bn, few, image, step, weights
from torch import nn
from torch.autograd import grad

from fastnas.nn import Choice, InputChoice
from fastnas.ops import draw_rng
from fastnas.reference import SkipNoise, mixed_sum, sample_paths

KINDS = ("gaussian", "uniform")
MIXTURES = ("additive", "multiplicative")


def logits(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("mixing", ["softmax", "sigmoid"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_weights_follow_the_logits(memory: str, mixing: str) -> None:
    alpha = logits(0.3, -1, 2, 0, 0.5)
    choice = Choice(few(), mixing=mixing, memory=memory, logits=alpha)
    torch.manual_seed(4)
    choice(image()).square().mean().backward()
    w = getattr(torch, mixing)(alpha, *([-1] if mixing == "softmax" else []))
    torch.manual_seed(4)
    loss = Choice(few(), memory="eager")(image(), w).square().mean()
    torch.testing.assert_close(alpha.grad, grad(loss, alpha)[0])


def test_new_logits() -> None:
    pair = [nn.Identity(), nn.ReLU()]
    assert torch.equal(Choice(pair, mixing="sigmoid").logits, torch.zeros(2))
    for mixing in ("softmax", "gdas"):
        alpha = Choice(pair, mixing=mixing).logits
        assert alpha.requires_grad and 0 < alpha.abs().max() < 0.01
    assert Choice(pair).logits is None and not Choice(pair).state_dict()


@pytest.mark.parametrize("memory", MEMORIES)
def test_gdas_is_the_hard_sample_of_the_reference(memory: str) -> None:
    alpha = logits(0.3, -1, 0.4, 0, 0.5)
    choice = Choice(few(), mixing="gdas", memory=memory, tau=0.7, logits=alpha)
    chosen = set()
    for seed in range(12):
        choice.zero_grad()
        torch.manual_seed(seed)
        y = choice(image())
        y.square().mean().backward()
        torch.manual_seed(seed)
        op, weight = sample_paths(alpha[None], None, (1,), "none", 0.7, draw_rng()[0], 1)
        name = choice.names[int(op)]
        chosen.add(name)
        out = few()[name](image())
        torch.testing.assert_close(y, out * weight.detach().squeeze())
        cotangent = (2 * y / y.numel() * out).sum().detach()
        torch.testing.assert_close(alpha.grad, grad(weight.squeeze() * cotangent, alpha)[0])
        for other, candidate in choice.candidates.items():
            assert all((p.grad is not None) == (other == name) for p in candidate.parameters())
    assert len(chosen) >= 4


def test_gdas_samples_as_often_as_softmax_says() -> None:
    alpha = logits(1.0, 0.0, -1.0)
    choice = Choice([nn.Identity()] * 3, mixing="gdas", logits=alpha)
    drawn = Counter(int(choice.weights().choice) for _ in range(2000))
    for k, p in enumerate(alpha.detach().softmax(0).tolist()):
        assert abs(drawn[k] / 2000 - p) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_of_narrow_logits(dtype: torch.dtype) -> None:
    choice = Choice([nn.Identity()] * 2, mixing="gdas").to(dtype)
    choice(torch.ones(2, dtype=dtype)).sum().backward()
    assert choice.logits.grad.dtype == dtype
    assert InputChoice(3).to(dtype)([torch.ones(2, dtype=dtype)] * 3).shape == (2,)


def test_gdas_takes_the_most_probable_in_evaluation() -> None:
    choice = Choice(few(), mixing="gdas", logits=logits(0, 0.1, 2, 0.3, 0)).eval()
    with torch.no_grad():
        assert torch.equal(choice(image()), choice.candidates["conv5"](image()))
    name, op = choice.best()
    assert name == "conv5" and op is choice.candidates["conv5"]


def test_no_best_of_logits_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Choice(few(), mixing="softmax", logits=logits(0, 1, float("nan"), 0, 0)).best()


def test_given_weights_take_the_place_of_the_logits() -> None:
    choice, w = Choice(few(), mixing="softmax").eval(), weights(5)
    assert torch.equal(choice(image(), w=w), Choice(few()).eval()(image(), w))


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_that_of_the_reference(kind: str, mixture: str) -> None:
    noise = {"skip": SkipNoise(kind, mixture), "scaled": SkipNoise(kind, mixture, factor=0.5)}
    found = []
    for memory in MEMORIES:
        choice, w = Choice(few(), memory=memory, noise=noise), weights(5)
        choice.noise_amplitude = 0.7
        found.append(step(choice, choice, (image(),), w))
    for other in found[1:]:
        assert_same(other, found[0])
    torch.manual_seed(4)
    streams = draw_rng(2)
    ops, y = few(), 0
    for w_k, (name, op) in zip(w.detach(), ops.items()):
        o = op(image())
        if name in noise:
            n, rng = noise[name], streams[list(noise).index(name)]
            y = y + mixed_sum([o], w_k[None], [0], n.form, n.level(0.7), rng)
        else:
            y = y + w_k * o
    torch.testing.assert_close(found[0]["y"], y.detach(), rtol=EXACT, atol=EXACT)


def test_noise_is_fresh_and_of_training_alone() -> None:
    choice, w = Choice({"skip": nn.Identity()}, noise={"skip": SkipNoise()}), torch.ones(1)
    first, second = choice(image(), w), choice(image(), w)
    assert not torch.equal(first, second) and not torch.equal(first, image())
    assert 0.1 < float((first - image()).std() / image().std()) < 0.3
    assert torch.equal(choice.eval()(image(), w), image())


def test_noise_of_a_sampled_candidate() -> None:
    ops = {"skip": nn.Identity(), "conv": conv_bn().double()}
    choice = Choice(ops, mixing="gdas", noise={"skip": SkipNoise()}, logits=logits(9, -9))
    assert not torch.equal(choice(image()), image())
    # Nothing is drawn for a candidate that does not run.
    choice.logits.data = -choice.logits.data
    torch.manual_seed(0)
    choice(image())
    torch.manual_seed(0), draw_rng()
    state = torch.get_rng_state()
    torch.manual_seed(0), choice(image())
    assert torch.equal(torch.get_rng_state(), state)


# ---- choices of inputs


@torch.random.fork_rng()
def inputs(count: int) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.randn(2, 3, dtype=torch.float64).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("mixing", ["top2", "pairs"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_two_inputs_are_those_of_the_reference(count: int, mixing: str) -> None:
    size = count if mixing == "top2" else count * (count - 1) // 2
    beta = logits(*torch.linspace(-0.3, 0.3, size).tolist())
    choice = InputChoice(count, mixing=mixing, tau=0.7, logits=beta)
    kept = set()
    for seed in range(10):
        x = inputs(count)
        choice.zero_grad()
        torch.manual_seed(seed)
        y = choice(x)
        y.square().sum().backward()
        torch.manual_seed(seed)
        op, weight = sample_paths(
            beta.new_zeros(count, 1), beta, (count,), mixing, 0.7, draw_rng()[0], 1
        )
        expected = sum(w * t.detach() for w, t in zip(weight[0], x))
        torch.testing.assert_close(y, expected)
        if count == 2:  # both are kept whatever the logits are
            assert not beta.grad.any()
        else:
            torch.testing.assert_close(beta.grad, grad(expected.square().sum(), beta)[0])
        assert [t.grad is not None for t in x] == (op[0] >= 0).tolist()
        kept.add(tuple((op[0] >= 0).tolist()))
    assert len(kept) > 1 or count == 2


def test_softmax_of_inputs() -> None:
    beta, x = logits(0, 1, -1), inputs(3)
    y = InputChoice(3, mixing="softmax", logits=beta)(x)
    torch.testing.assert_close(y, sum(w * t for w, t in zip(beta.softmax(0), x)))
    assert InputChoice(3, mixing="softmax", logits=beta).best() == (0, 1)


@pytest.mark.parametrize(("mixing", "beta"), [("top2", (0, 2, 1)), ("pairs", (0, 1, 2))])
def test_the_most_probable_inputs_in_evaluation(mixing: str, beta) -> None:
    choice, x = InputChoice(3, mixing=mixing, logits=logits(*beta)).eval(), inputs(3)
    assert choice.best() == (1, 2)
    assert torch.equal(choice(x), x[1] + x[2])


def test_inputs_that_are_not_read_are_not_computed() -> None:
    called = []

    def edge(i, x):
        called.append(i)
        return x

    choice = InputChoice(4)
    read = choice([partial(edge, i, x) for i, x in enumerate(inputs(4))])
    assert len(called) == 2 and read.shape == (2, 3)


WRONG = {
    "one input": (lambda: InputChoice(1), ValueError, "at least 2"),
    "mixing": (lambda: InputChoice(3, mixing="top3"), ValueError, "top2, pairs, softmax"),
    "tau": (lambda: InputChoice(3, mixing="softmax", tau=1), ValueError, "top2 and pairs alone"),
    "logits": (
        lambda: InputChoice(3, mixing="pairs", logits=logits(1, 2)),
        ValueError,
        r"\[3\] is needed",
    ),
    "too few": (lambda: InputChoice(3)(inputs(2)), ValueError, "inputs is 2; .* 3 is needed"),
    "a number": (lambda: InputChoice(2)([*inputs(1), 3]), TypeError, r"inputs\[1\] is a int"),
    "shapes": (
        lambda: InputChoice(2)([torch.ones(2), torch.ones(3)]),
        ValueError,
        r"input 1 returns .* \[3\], 0 .* \[2\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    call, kind, says = WRONG[name]
    with pytest.raises(kind, match=says):
        call()
