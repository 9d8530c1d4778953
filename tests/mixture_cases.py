"""What the tests of Choice share: candidates that depend on state, and a step with all results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastnas.nn import Choice

MEMORIES = ("eager", "lean", "recompute", "minimal")
EXACT = 1e-10


def conv_bn(C: int = 4, kernel: int = 3, affine: bool = False) -> nn.Sequential:
    """A candidate that ends in a batch norm, which "lean" folds into the sum."""
    conv = nn.Conv2d(C, C, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(C, affine=affine))


@torch.random.fork_rng()
def few() -> dict[str, nn.Module]:
    """Candidates of all kinds, in float64: folded, with a scale, with dropout, an identity."""
    torch.manual_seed(1)
    found = {
        "conv3": conv_bn(),
        "skip": nn.Identity(),
        "conv5": conv_bn(kernel=5),
        "scaled": conv_bn(affine=True),
        "dropped": nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.Tanh()),
    }
    return {name: op.double() for name, op in found.items()}


@torch.random.fork_rng()
def image() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(3, 4, 6, 6, dtype=torch.float64)


class CountsCalls(nn.Module):
    """y = tanh(calls W x): depends on a buffer that each call changes."""

    def __init__(self, replaces: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6).double()
        self.replaces = replaces
        self.register_buffer("calls", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x) * self.calls.clone())
        if self.replaces:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return y


def wide(values: Any) -> Any:
    """Floating point tensors in float64, as leaves that want gradients; anything else as it is."""

    def one(t: Any) -> Any:
        is_wide = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().double().clone().requires_grad_() if is_wide else t

    return tree_map(one, values)


@torch.random.fork_rng()
def weights(count: int) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(count, dtype=torch.float64).softmax(0).requires_grad_()


def written_out(ops: Mapping[str, nn.Module]) -> Callable[..., Tensor]:
    """The mixture as everybody writes it."""
    return lambda *args, w, **kwargs: sum(  # type: ignore[return-value]
        w_k * op(*args, **kwargs) for w_k, op in zip(w, ops.values())
    )


def step(
    call: Callable[..., Tensor], module: nn.Module, args: Any, w: Tensor, **kwargs: Any
) -> dict[str, Tensor | None]:
    """Results of a forward and a backward pass: output, gradients and buffers, by name."""
    args, w, kwargs = wide(args), w.detach().clone().requires_grad_(), wide(kwargs)
    torch.manual_seed(4)
    y = call(*args, w=w, **kwargs)
    # Some code draws between forward and backward.
    torch.rand(7)
    y.square().mean().backward()
    found: dict[str, Tensor | None] = {"y": y.detach(), "dw": w.grad}
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    found |= {f"dx{i}": t.grad for i, t in enumerate(inputs) if t.is_floating_point()}
    found |= {f"d {name}": p.grad for name, p in module.named_parameters()}
    return found | {f"buffer {name}": b.clone() for name, b in module.named_buffers()}


def both(
    ops: Mapping[str, nn.Module], memory: str, args: Any, steps: int = 2, **kwargs: Any
) -> None:
    """Asserts that Choice computes in each of some steps what the written out mixture does."""
    own = nn.ModuleDict(copy.deepcopy(dict(ops)))
    choice = Choice(copy.deepcopy(dict(ops)), memory=memory)
    w = weights(len(ops))
    for _ in range(steps):
        expected = step(written_out(own), own, args, w, **kwargs)
        assert_same(step(choice, choice.candidates, args, w, **kwargs), expected)
        for module in (own, choice):
            module.zero_grad()


def assert_same(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], most: float = EXACT
) -> None:
    assert found.keys() == expected.keys()
    for name, b in expected.items():
        a = found[name]
        assert (a is None) == (b is None), f"{name}: {a if a is None else 'a gradient'}"
        if a is not None and b is not None:
            assert a.shape == b.shape and a.dtype == b.dtype, name
            apart = (a - b).abs().max() / (1e-30 + b.abs().max()) if b.numel() else 0
            assert float(apart) <= most, f"{name}: {float(apart):.1e} apart"
