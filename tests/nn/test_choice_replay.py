"""A candidate that backward runs again finds what the first run found, and moves nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from mixture_cases import (
    MEMORIES,
    CountsCalls,
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
from torch.utils.checkpoint import checkpoint

from fastnas.nn import Choice
from fastnas.nn.recompute import LARGE

x_of_six = torch.linspace(-1, 1, 18).reshape(3, 6)


class OfLarge(nn.Module):
    """y = x * table, and a table of another size where it is to be small."""

    def __init__(self, size: int, moves: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6).double())
        self.moves = moves
        self.register_buffer("table", torch.linspace(1, 2, size).double())

    def forward(self, x):
        y = torch.sin(x * self.scale * self.table[:6].clone())
        if self.moves:
            self.table.data.mul_(1.5)  # no version tells of it
        return y


@pytest.mark.parametrize("memory", MEMORIES)
def test_outputs_that_depend_on_changing_buffers(memory: str) -> None:
    torch.manual_seed(0)
    old = nn.utils.spectral_norm(nn.Linear(6, 6).double())
    new = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6).double())
    ops = {"in place": CountsCalls(), "anew": CountsCalls(True), "old": old, "new": new}
    both(ops, memory, (x_of_six,), steps=3)


@pytest.mark.parametrize("moves", [False, True])
def test_large_buffers(moves: bool) -> None:
    size = LARGE // 8 + 1
    both({"a": OfLarge(size, moves), "b": OfLarge(7)}, "minimal", (x_of_six,), steps=3)


def test_two_steps_may_wait_for_backward() -> None:
    """The second forward moves the statistics before the first one's backward runs again."""
    own, choice = few(), Choice(few(), memory="minimal")

    def results(call):
        w, x = weights(5), image().requires_grad_()
        torch.manual_seed(4)
        first, second = call(x, w=w), call(2 * x, w=w)
        return grad(first.square().sum(), [x, w]) + grad(second.square().sum(), [x, w])

    for a, b in zip(results(choice), results(written_out(own))):
        torch.testing.assert_close(a, b)


def test_backward_may_run_twice() -> None:
    choice, w = Choice({"a": CountsCalls(), **few_linear()}, memory="minimal"), weights(2)
    loss = choice(wide(x_of_six), w).square().sum()
    first = grad(loss, [w, *choice.parameters()], retain_graph=True)
    for a, b in zip(first, grad(loss, [w, *choice.parameters()])):
        assert torch.equal(a, b)
    assert choice.candidates["a"].calls == 2


def few_linear() -> dict[str, nn.Module]:
    return {"linear": nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh()).double()}


def test_the_mode_is_that_of_forward() -> None:
    found = []
    for memory in MEMORIES:
        choice, w = Choice(few(), memory=memory), weights(5)
        torch.manual_seed(4)
        y = choice(image(), w)
        choice.eval()
        y.square().mean().backward()
        assert not any(module.training for module in choice.modules())
        found.append({"dw": w.grad, **{n: p.grad for n, p in choice.named_parameters()}})
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("memory", MEMORIES)
def test_parameters_given_by_functional_call(memory: str) -> None:
    """An unrolled step runs the network on moved ones, and backward comes when they are gone."""
    ops = {str(k): nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for k in range(2)}
    choice = Choice(ops, memory=memory)
    moved = {n: (p * 1.5).detach().requires_grad_() for n, p in choice.named_parameters()}
    y = functional_call(choice, moved, (wide(x_of_six), weights(2)))
    own = copy.deepcopy(choice)
    own.load_state_dict(moved)
    expected = written_out(own.candidates)(wide(x_of_six), w=weights(2))
    gradients = grad(y.square().sum(), list(moved.values()))
    for a, b in zip(gradients, grad(expected.square().sum(), list(own.parameters()))):
        torch.testing.assert_close(a, b)


def change_x(choice, x):
    x.mul_(2)


def change_a_parameter(choice, x):
    with torch.no_grad():
        next(choice.parameters()).mul_(2)


@pytest.mark.parametrize(
    ("change", "says"), [(change_x, "modified by an inplace"), (change_a_parameter, "0.weight")]
)
def test_what_is_changed_before_backward_is_an_error(change, says: str) -> None:
    choice, x = Choice([nn.Linear(6, 6), nn.Tanh()], memory="minimal"), x_of_six.clone()
    w = torch.ones(2, requires_grad=True)
    y = choice(x, w)
    change(choice.candidates["0"] if says == "0.weight" else choice, x)
    with pytest.raises(RuntimeError, match=says.removeprefix("0.")):
        y.sum().backward()


def test_a_large_buffer_that_is_changed_before_backward_is_an_error() -> None:
    choice, w = Choice([OfLarge(LARGE)], memory="minimal"), weights(1)
    y = choice(wide(x_of_six), w)
    choice.candidates["0"].table.mul_(2)
    with pytest.raises(
        RuntimeError, match="candidate '0': its tensor 'table' was changed in place"
    ):
        y.sum().backward()


@pytest.mark.parametrize("memory", MEMORIES)
def test_tensors_that_nobody_registered_get_gradients(memory: str) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    class Uses(nn.Module):
        def forward(self, x):
            return (x * scale).sin()

    w = weights(2)
    Choice([Uses(), nn.Tanh()], memory=memory)(x_of_six.double(), w).sum().backward()
    expected = grad((w[0] * (x_of_six.double() * scale).sin()).sum(), scale)[0]
    torch.testing.assert_close(scale.grad, expected)


@pytest.mark.parametrize("memory", MEMORIES)
def test_autocast(memory: str) -> None:
    """Of the forward pass, also where backward runs outside of it; an identity stays float32."""
    ops = {k: copy.deepcopy(op).float() for k, op in few().items()}
    own, choice = nn.ModuleDict(copy.deepcopy(ops)), Choice(ops, memory=memory)

    def results(module, call):
        x, w = image().float().requires_grad_(), weights(5).float().detach().requires_grad_()
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x, w=w)
        y.float().square().mean().backward()
        gradients = {n: p.grad for n, p in module.named_parameters()}
        return {"y": y.detach(), "dx": x.grad, "dw": w.grad, **gradients}

    found = results(choice.candidates, choice)
    # torch rounds each product and each sum to bfloat16, the kernels of "lean" once.
    most = 0.05 if memory == "lean" else 1e-6
    assert_same(found, results(own, written_out(own)), most)
    assert found["y"].dtype == torch.float32


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_of_a_checkpoint(memory: str, reentrant: bool) -> None:
    own, choice = nn.ModuleDict(few()), Choice(few(), memory=memory)

    def around(call):
        def run(x, w):
            return call(x, w=w)

        return lambda x, w: checkpoint(run, x, w, use_reentrant=reentrant)

    found = step(around(choice), choice.candidates, (image(),), weights(5))
    expected = step(around(written_out(own)), own, (image(),), weights(5))
    if memory == "lean" and not reentrant:
        # A checkpoint stops before the sum, with the norms in it, moves statistics a second time.
        found, expected = (
            {name: t for name, t in results.items() if "buffer" not in name}
            for results in (found, expected)
        )
    assert_same(found, expected)


@pytest.mark.parametrize("memory", MEMORIES)
def test_hooks_run(memory: str) -> None:
    ops, called = {"a": conv_bn().double(), "b": nn.Tanh()}, []
    conv = ops["a"][1]
    conv.register_forward_hook(lambda *_: called.append("forward"))
    conv.register_full_backward_hook(lambda *_: called.append("backward"))
    ops["b"].register_forward_hook(lambda m, args, y: 2 * y)
    conv.weight.register_post_accumulate_grad_hook(lambda p: called.append("accumulated"))
    choice, w = Choice(ops, memory=memory), weights(2)
    y = choice(image().requires_grad_(), w)
    assert called == ["forward"]
    torch.testing.assert_close(y, w[0] * few_a(ops) + w[1] * 2 * image().tanh())
    called.clear()
    y.sum().backward()
    # A second run calls its forward hooks a second time, as torch's checkpoints do.
    again = ["forward"] if memory in ("recompute", "minimal") else []
    assert sorted(called) == sorted([*again, "backward", "accumulated"])


def few_a(ops):
    a = copy.deepcopy(ops["a"])
    for module in a.modules():
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    return a(image())


@pytest.mark.parametrize("memory", MEMORIES)
def test_compiled_candidates(memory: str) -> None:
    torch._dynamo.reset()
    compiled = {}
    for name, op in few().items():
        plain = isinstance(op, nn.Identity)
        compiled[name] = op if plain else torch.compile(op, backend="aot_eager")
    choice, own = Choice(compiled, memory=memory), nn.ModuleDict(few())
    w = weights(5)
    for _ in range(2):
        found = step(choice, choice.candidates, (image(),), w)
        found = {name.replace("_orig_mod.", ""): t for name, t in found.items()}
        assert_same(found, step(written_out(own), own, (image(),), w))
        choice.zero_grad(), own.zero_grad()


@pytest.mark.parametrize("memory", MEMORIES)
def test_compiled_as_a_whole(memory: str) -> None:
    torch._dynamo.reset()
    choice, own = Choice(few(), memory=memory), nn.ModuleDict(few())
    whole = torch.compile(choice, backend="aot_eager", fullgraph=memory in ("eager", "lean"))
    found = step(whole, choice.candidates, (image(),), weights(5))
    assert_same(found, step(written_out(own), own, (image(),), weights(5)))


@pytest.mark.parametrize("memory", MEMORIES)
def test_under_torch_func(memory: str) -> None:
    choice, w = Choice([nn.Tanh(), nn.Linear(6, 6).double()], memory=memory), weights(2).detach()
    found = torch.func.grad(lambda x: choice(x, w).sum())(x_of_six.double())
    x = wide(x_of_six)
    torch.testing.assert_close(found, grad(choice(x, w).sum(), x)[0])


# ---- found by somebody who tried to break it


def test_a_norm_that_candidates_share_moves_once_for_each() -> None:
    def ops():
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(2, affine=False)
        return [nn.Sequential(nn.Conv2d(2, 2, 1), norm) for _ in range(2)]

    own, mine = ops(), ops()
    x = torch.randn(3, 2, 4, 4)
    w = torch.tensor([0.3, 0.7])
    y = sum(w_k * op(x) for w_k, op in zip(w, own))
    torch.testing.assert_close(Choice(mine, memory="lean")(x, w), y)
    torch.testing.assert_close(mine[0][1].running_mean, own[0][1].running_mean)


def test_an_argument_that_a_later_candidate_overwrites() -> None:
    ops = {"norm": nn.Sequential(nn.BatchNorm2d(2, affine=False)), "relu": nn.ReLU(inplace=True)}
    x, w = torch.linspace(-1, 1, 16).reshape(2, 2, 2, 2), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        given = x.clone()
        norm = copy.deepcopy(ops["norm"])
        want = w[0] * norm(given) + w[1] * given.relu()
        torch.testing.assert_close(Choice(ops, memory="lean")(x.clone(), w), want)


class Adds(nn.Module):
    """Adds an auxiliary loss to a list of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, losses):
        y = self.linear(x)
        losses.append(y.square().mean())
        return y


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_candidates_put_into_an_argument_is_the_callers(memory: str) -> None:
    torch.manual_seed(0)
    choice = Choice([Adds(), Adds(), Adds()], memory=memory)
    losses: list[torch.Tensor] = []
    y = choice(torch.randn(2, 3), losses, w=torch.tensor([0.2, 0.3, 0.5]))
    assert len(losses) == 3
    y.sum().backward()
    assert len(losses) == 3


class Makes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", None)

    def forward(self, x):
        self.count = torch.ones(()) if self.count is None else self.count + 1
        return self.linear(x) * self.count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Makes, "candidate '0': its forward has made the buffer 'count'"),
        (lambda: nn.LazyLinear(3), "candidate '0': its parameter 'weight' has no shape before"),
    ],
)
def test_what_is_made_in_the_first_call_is_refused_by_name(make, message) -> None:
    choice = Choice([make(), nn.Linear(3, 3)], memory="minimal")
    with pytest.raises(RuntimeError, match=message):
        choice(torch.randn(2, 3), torch.tensor([0.2, 0.8]))


@pytest.mark.parametrize("memory", MEMORIES)
def test_one_norm_twice_and_weights_that_the_forward_changes(memory: str) -> None:
    norm = nn.BatchNorm1d(6).double()
    twice = nn.Sequential(nn.Linear(6, 6).double(), norm, nn.Tanh(), norm)
    both({"twice": twice, "plain": nn.Linear(6, 6).double()}, memory, (x_of_six,), steps=2)
    torch.manual_seed(0)
    choice = Choice([nn.Embedding(5, 3, max_norm=0.5), nn.Embedding(5, 3)], memory=memory)
    choice(torch.tensor([1, 2]), torch.tensor([0.5, 0.5])).sum().backward()
