"""Choice computes the mixture that everybody writes out, whatever it keeps for backward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mixture_cases import (
    EXACT,
    MEMORIES,
    assert_same,
    both,
    conv_bn,
    few,
    image,
    step,
    weights,
    wide,
    written_out,
)
from torch import nn
from torch.autograd import grad
from torch.func import functional_call

from fastnas.benchmarks.choice_families import FAMILIES, Block
from fastnas.layers import primitives
from fastnas.nn import Choice, Paths, split_parameters
from fastnas.saved_bytes import saved_bytes

SMALL = 0.02


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    ("family", "count"), [(f, k) for f in FAMILIES for k in (2, 5)] + [("graph", 12)]
)
def test_it_is_the_mixture_written_out(family: str, count: int, memory: str, one_thread) -> None:
    """Output, all gradients and running statistics, in two steps on the same modules."""
    torch.manual_seed(0)
    made = FAMILIES[family]
    ops = {name: op.double() for name, op in made.candidates(count).items()}
    args = made.inputs(SMALL)
    if family == "mbconv":  # float64 convolutions are slow
        args = (args[0][..., :7, :7],)
    both(ops, memory, args)


@pytest.mark.parametrize("memory", MEMORIES)
def test_candidates_of_all_kinds_stand_beside_each_other(memory: str) -> None:
    both(few(), memory, (image(),))


@pytest.mark.parametrize("memory", MEMORIES)
def test_one_candidate_and_none(memory: str) -> None:
    both({"alone": conv_bn().double()}, memory, (image(),))
    both({"none": primitives.Zero(2), "conv": nn.Conv2d(4, 4, 1, 2).double()}, memory, (image(),))


@pytest.mark.parametrize("memory", MEMORIES)
def test_further_arguments_get_gradients(memory: str) -> None:
    """Positional, by keyword, and in a list or dict."""

    class Reads(nn.Module):
        def forward(self, x, more, scale=None):
            return x.sin() * more["a"] + more["b"][0] * (1 if scale is None else scale.exp())

    x = image()
    both({"a": Reads(), "b": Reads()}, memory, (x, {"a": x * 2, "b": [x + 1]}), scale=x / 2)
    torch.manual_seed(0)
    blocks = {str(k): Block(8, 2, 16).double() for k in range(2)}
    mask = torch.randn(5, 5).double()
    both(blocks, memory, (torch.randn(2, 5, 8), mask))


@pytest.mark.parametrize("memory", MEMORIES)
def test_evaluation_mode_and_frozen_parameters(memory: str) -> None:
    ops = few()
    for op in ops.values():
        op.eval()
    for p in ops["conv3"].parameters():
        p.requires_grad_(False)
    both(ops, memory, (image(),))


@pytest.mark.parametrize("memory", MEMORIES)
def test_without_gradients_nothing_is_kept(memory: str) -> None:
    choice, w = Choice(few(), memory=memory), weights(5)
    with torch.no_grad():
        assert saved_bytes(lambda: choice(image(), w)) == 0
        torch.manual_seed(4)
        y = choice(image(), w)
    other = few()
    with torch.no_grad():
        written_out(other)(image(), w=w)  # the statistics move as often
        torch.manual_seed(4)
        assert_same({"y": y}, {"y": written_out(other)(image(), w=w)})
    for a, b in zip(choice.candidates.buffers(), nn.ModuleDict(other).buffers()):
        assert torch.allclose(a, b, atol=EXACT)


def test_lean_keeps_no_output_of_a_folded_norm() -> None:
    """Of each folded candidate one tensor less than in eager, its output; of others the same."""
    ops = {str(k): conv_bn() for k in range(3)}
    x, w = torch.randn(2, 4, 8, 8), torch.rand(3, requires_grad=True)
    kept = {m: saved_bytes(lambda m=m: Choice(ops, memory=m)(x, w)) for m in ("eager", "lean")}
    assert kept["eager"] - kept["lean"] >= 3 * x.nbytes


@pytest.mark.parametrize("memory", MEMORIES)
def test_gradients_of_the_logits_alone_form_no_others(memory: str) -> None:
    """An architecture step asks for them: the parameters' are not computed on the way."""
    choice, formed = Choice(few(), memory=memory), []
    for p in choice.candidates.parameters():
        p.register_hook(lambda g: formed.append(g))
    w = weights(5)
    grad(choice(image(), w).square().mean(), w)
    assert not formed
    choice(image(), w).square().mean().backward()
    assert len(formed) == len(list(choice.candidates.parameters()))


@pytest.mark.parametrize("memory", MEMORIES)
def test_second_derivatives(memory: str) -> None:
    """Of smooth candidates, as an unrolled step takes them."""
    torch.manual_seed(0)
    ops = {str(k): nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)) for k in range(3)}
    choice = Choice(ops, memory=memory).double()
    params = list(choice.parameters())

    def second(call):
        x, w = wide(torch.ones(2, 3)), weights(3)
        first = grad(call(x, w=w).square().sum(), [w, x, *params], create_graph=True)
        total = sum(g.square().sum() for g in first)
        return {str(i): g for i, g in enumerate(grad(total, [w, x, *params]))}

    assert_same(second(choice), second(written_out(choice.candidates)))


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_unrolled_step(memory: str) -> None:
    """Through batch norms and dropout, on parameters that a step has moved."""
    ops = {name: op for name, op in few().items() if name != "skip"}
    choice, w = Choice(ops, memory=memory), weights(4)

    def unrolled(call):
        torch.manual_seed(4)
        params = dict(choice.named_parameters())
        first = grad(call(image(), w=w).square().mean(), list(params.values()), create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(params.items(), first)}
        loss = functional_call(choice, moved, (image() * 1.1,), {"w": w}).square().mean()
        return {str(i): g for i, g in enumerate(grad(loss, [w, *params.values()]))}

    state = copy.deepcopy(choice.state_dict())
    found = unrolled(choice)
    choice.load_state_dict(state)
    choice.memory = "eager"
    assert_same(found, unrolled(written_out(choice.candidates)))


def test_what_is_named() -> None:
    choice = Choice({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    assert choice.names == ["a", "b"]
    assert list(choice.state_dict()) == [
        f"candidates.{n}.{p}" for n in "ab" for p in ("weight", "bias")
    ]
    assert Choice([nn.Identity(), nn.ReLU()]).names == ["0", "1"]
    assert "mixing=None, memory='lean'" in repr(choice)


def test_weights_may_be_given_in_two_ways() -> None:
    choice, x, w = Choice(few()).eval(), image(), weights(5)
    assert torch.equal(choice(x, w), choice(x, w=w))
    assert torch.equal(choice(x, w.detach()), choice(x, w))


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_weight_that_happens_to_be_zero_is_mixed(memory: str) -> None:
    """It is no sample: its candidate runs, and has its gradient."""
    choice = Choice(few(), memory=memory)
    w = torch.tensor([0.0, 0.5, 0.5, 0, 0], dtype=torch.float64, requires_grad=True)
    choice(image(), w).square().mean().backward()
    assert w.grad is not None and w.grad.abs().min() > 0
    assert all(p.grad is not None for p in choice.parameters())


@pytest.mark.parametrize("siblings", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_sampled_candidate_runs_alone(memory: str, siblings: bool) -> None:
    ops = few()
    choice, ran = Choice(ops, memory=memory), []
    for name, op in ops.items():
        op.register_forward_hook(lambda *_, name=name: ran.append(name))
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = choice(image(), Paths(torch.tensor(2), weight, siblings))
    assert ran == ["conv5"]
    # The sum of y itself is 0 after a batch norm, and with it what siblings would get of y^2.
    (y.square() + y).mean().backward()
    by_hand = few()["conv5"](image())
    torch.testing.assert_close(y, 0.7 * by_hand)
    dy = (2 * y + 1) / y.numel()
    expected = (dy * by_hand).sum() - (dy.sum() if siblings else 0)
    torch.testing.assert_close(weight.grad, expected.detach())
    for name, op in ops.items():
        assert all((p.grad is not None) == (name == "conv5") for p in op.parameters())
        moved = [b for n, b in op.named_buffers() if n.endswith("tracked")]
        assert all(int(b) == (name == "conv5") for b in moved)


@pytest.mark.parametrize("memory", MEMORIES)
def test_copies_and_pickles_compute_the_same(memory: str) -> None:
    choice, w = Choice(few(), mixing="softmax", memory=memory).double(), weights(5)
    found = step(choice, choice, (image(),), w)
    choice = Choice(few(), mixing="softmax", memory=memory).double()
    for other in (copy.deepcopy(choice), pickle.loads(pickle.dumps(choice))):
        assert other.memory == memory
        assert_same(step(other, other, (image(),), w), found)


def test_parameters_are_split_for_two_optimizers() -> None:
    shared = nn.Parameter(torch.zeros(2))
    pair = [nn.Linear(2, 2), nn.Identity()]
    network = nn.Sequential(
        Choice(pair, mixing="softmax", logits=shared),
        Choice(copy.deepcopy(pair), mixing="sigmoid", logits=shared),
        Choice(copy.deepcopy(pair), mixing="gdas"),
    )
    params, logits = split_parameters(network)
    assert [p is shared for p in logits] == [True, False] and len(params) == 6
    assert not {id(p) for p in params} & {id(p) for p in logits}


WRONG = {
    "no candidates": (lambda: Choice([]), ValueError, "at least one module"),
    "no module": (lambda: Choice([nn.ReLU(), "relu"]), TypeError, r"candidates\['1'\]"),
    "a module alone": (lambda: Choice(nn.ReLU()), TypeError, "list, a tuple or a dict"),
    "a dot": (lambda: Choice({"a.b": nn.ReLU()}), ValueError, "'a.b'.*without dots"),
    "a method's name": (lambda: Choice({"keys": nn.ReLU()}), ValueError, "'keys'.*ModuleDict"),
    "memory": (
        lambda: Choice([nn.ReLU()], memory="small"),
        ValueError,
        "eager, lean, recompute, minimal",
    ),
    "mixing": (lambda: Choice([nn.ReLU()], mixing="max"), ValueError, "softmax, sigmoid, gdas"),
    "tau": (lambda: Choice([nn.ReLU()], mixing="softmax", tau=2.0), ValueError, "gdas alone"),
    "tau of 0": (lambda: Choice([nn.ReLU()], mixing="gdas", tau=0), ValueError, "number > 0"),
    "logits": (
        lambda: Choice([nn.ReLU()], logits=nn.Parameter(torch.ones(1))),
        ValueError,
        "mixing is None",
    ),
    "logits' shape": (
        lambda: Choice([nn.ReLU()], mixing="softmax", logits=nn.Parameter(torch.ones(2))),
        ValueError,
        r"\[1\] is needed",
    ),
    "noise's name": (lambda: Choice([nn.ReLU()], noise={"skip": 1}), ValueError, "allowed: 0"),
    "noise": (lambda: Choice([nn.ReLU()], noise={"0": 0.2}), TypeError, "SkipNoise"),
    "no w": (lambda: Choice([nn.ReLU()])(), TypeError, "no w is given"),
    "w's type": (lambda: Choice([nn.ReLU()])(torch.ones(2), 3), TypeError, "w is 3"),
    "w's shape": (
        lambda: Choice([nn.ReLU()])(torch.ones(2), torch.ones(2)),
        ValueError,
        r"\[1\] is needed",
    ),
    "w's dtype": (
        lambda: Choice([nn.ReLU()])(torch.ones(2), torch.ones(1, dtype=torch.int64)),
        TypeError,
        "floating point",
    ),
    "a path beyond": (
        lambda: Choice([nn.ReLU()])(torch.ones(2), Paths(torch.tensor(1), torch.ones(()))),
        ValueError,
        "0 to 0 is allowed",
    ),
    "two paths": (
        lambda: Choice([nn.ReLU()])(torch.ones(2), Paths(torch.tensor([0, 0]), torch.ones(2))),
        ValueError,
        "one path",
    ),
    "no logits": (lambda: Choice([nn.ReLU()]).best(), ValueError, "no logits"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    call, kind, says = WRONG[name]
    with pytest.raises(kind, match=says):
        call()


@pytest.mark.parametrize("memory", MEMORIES)
def test_outputs_that_differ_are_named(memory: str) -> None:
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    class Narrow(nn.Module):
        def forward(self, x):
            return x.float()

    x, w = torch.ones(2, 3, dtype=torch.float64), weights(2)
    wide_one = nn.Linear(3, 1).double()
    for other, kind, says in (
        (wide_one, ValueError, r"'b' returns torch.float64 \[2, 1\], 'a' .* \[2, 3\]"),
        (Narrow(), ValueError, r"'b' returns torch.float32 \[2, 3\], 'a' torch.float64"),
        (Two(), TypeError, "'b' returns a tuple"),
    ):
        with pytest.raises(kind, match=says):
            Choice({"a": nn.Tanh(), "b": other}, memory=memory)(x, w)
