"""Makes problems of whole modules: the same parameters for all, the layout that each prefers.

Eager runs in NCHW, as the DARTS code writes it; all others get states and dy channels last, as the
operation before would hand them over. Every gradient is asked for, those of the parameters too.

In bfloat16 only fastnas runs channels last: torch 2.13's gradient of a dilated depthwise kernel is
wrong there on a CPU (1e18 times too large).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastnas.benchmarks.harness.verify import EAGER, SEED, Exact, Inputs, Problem, eps_of

CHANNELS_LAST = "eager-channels-last"
# A ReLU or max-pooling whose inputs round to the other side moves a gradient by far more than eps:
# one of 131,072 elements moved that of a 5x5 kernel by 3e-3.
ROUNDING = 1e-2
# Torch's channels-last batch norm is off by 70 eps of fp32 at 65,536 values per channel.
STATISTICS = 128

M = TypeVar("M", bound=nn.Module)


def sharing(module: M, owner: nn.Module) -> M:
    """Returns the module with its owner's parameters, the same tensors, and buffers of its own."""
    # `assign` makes them the same tensors; a copy would have gradients of its own.
    module.load_state_dict(dict(owner.named_parameters()), strict=False, assign=True)
    return module


def twin(module: M) -> M:
    """Makes another such module on the same parameters.

    Each provider updates running statistics of its own: eager's graph holds them.
    """
    return sharing(copy.deepcopy(module), module)


def _baselines(
    eager: nn.Module, dtype: torch.dtype, full: bool
) -> dict[str, Callable[..., Tensor]]:
    """Maps the providers of plain torch to what they call."""
    calls: dict[str, Callable[..., Tensor]] = {EAGER: eager}
    # This is the wrong gradient of torch 2.13 that the module's docstring tells of.
    if dtype != torch.bfloat16:
        calls[CHANNELS_LAST] = twin(eager)
    calls["compile"] = torch.compile(twin(eager), fullgraph=True, dynamic=False)
    if full:
        calls["compile-max"] = torch.compile(
            twin(eager), fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs"
        )
    return calls


def module_problem(
    eager: nn.Module,
    fused: Mapping[str, Callable[..., Tensor]],
    shapes: Sequence[tuple[int, ...]],
    weights: tuple[int, ...] | None,
    full: bool,
) -> Problem:
    """Makes the problem of a module called with states of these shapes and mixing weights.

    Args:
        eager: the module in training mode; its parameters have the dtype of the case.
        fused: provider to what is called in its place.
        shapes: of the states, [N, C, H, W] each.
        weights: shape of the mixing weights, a softmax in fp32 over their last dimension; None:
            the module takes none.
        full: also torch.compile's max-autotune.
    """
    generator = torch.Generator().manual_seed(SEED)
    params = dict(eager.named_parameters())
    dtype = next(iter(params.values())).dtype
    states = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    mixing = {}
    if weights is not None:
        alpha = torch.randn(weights, generator=generator) / 2
        mixing["w"] = torch.softmax(alpha, -1).requires_grad_()
    # The shape of the output is asked for before anything is timed: dy must be there.
    with torch.no_grad():
        size = eager(*states, *mixing.values()).shape
    dy = torch.randn(size, generator=generator).to(dtype)

    def inputs(layout: torch.memory_format) -> Inputs:
        x = {
            f"x[{i}]": t.clone(memory_format=layout).requires_grad_() for i, t in enumerate(states)
        }
        leaves = {f"d{name}": leaf for name, leaf in {**x, **mixing, **params}.items()}
        return Inputs(leaves, dy.to(memory_format=layout))

    nchw, nhwc = inputs(torch.contiguous_format), inputs(torch.channels_last)
    taken = len(states) + len(mixing)
    calls = _baselines(eager, dtype, full) | dict(fused)
    # The others get what the operation before would hand over; eager alone is the public code.
    in_nchw = set(calls) - set(fused) if dtype == torch.bfloat16 else {EAGER}
    given = {name: nchw if name in in_nchw else nhwc for name in calls}

    # The fp64 pass is slow, and the same for every provider.
    @cache
    def exact() -> dict[str, Exact]:
        return _exact(eager, nchw, taken, dtype)

    return Problem(
        leaves=nchw.leaves,
        dy=nchw.dy,
        forwards={
            name: partial(call, *list(given[name].leaves.values())[:taken])
            for name, call in calls.items()
        },
        exact=lambda provider, y: exact(),
        alternatives={CHANNELS_LAST: "eager-best"},
        own=given,
    )


def _exact(eager: nn.Module, given: Inputs, taken: int, dtype: torch.dtype) -> dict[str, Exact]:
    """Runs the module in fp64. Gradients are compared by norm, for the flips of `ROUNDING`."""
    wide = copy.deepcopy(eager).double()
    own = dict(wide.named_parameters())
    arguments = [t.detach().double().requires_grad_() for t in list(given.leaves.values())[:taken]]
    y = wide(*arguments)
    gradients = torch.autograd.grad(y, [*arguments, *own.values()], given.dy.double())
    eps = eps_of(dtype)
    flips, largest = max(ROUNDING, eps), float(y.detach().abs().max())
    return {
        "y": Exact(y.detach(), (eps + STATISTICS * eps_of(torch.float32)) * largest),
        **{
            name: Exact(g, flips * float(torch.linalg.vector_norm(g)), by_norm=True)
            for name, g in zip(given.leaves, gradients)
        },
    }
