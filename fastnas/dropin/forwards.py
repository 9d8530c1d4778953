"""Holds the forwards that `accelerate` gives to the cells and mixed ops of a network.

Each is called as `forward(module, settings, ...)` with the arguments of the module's own forward,
and falls back on that where the fused ops cannot serve the call.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas.dropin.checked import Parts, SumParts
from fastnas.dropin.recognise import is_cell
from fastnas.nn.final_norms import foldable, norm_sum, pass_norms, run_to_norm
from fastnas.nn.mixed_op import select
from fastnas.nn.parts import CellParts, MixedOpParts, candidate_modules
from fastnas.nn.reading import Reading
from fastnas.nn.run import How, can_run, run_cell, run_edge, why_eager
from fastnas.ops import mixed_sum

logger = logging.getLogger("fastnas")


@dataclass
class Settings:
    """Holds the arguments of a replaced forward.

    Args:
        memory, backend: of `accelerate`.
        reading: what the module consists of.
        skips_zeros: whether the module's own forward leaves out candidates of weight 0.
        strict: whether to raise `NotFused` where the module's own forward would run.
    """

    memory: str
    backend: str | None
    reading: Reading[Any]
    skips_zeros: bool = False
    strict: bool = False

    def how(self, module: nn.Module) -> How:
        """Says how a fused call of the module runs."""
        return How(module.training, memory=self.memory, backend=self.backend)


class NotFused(RuntimeError):
    """Tells that the fused ops cannot serve a call; the message says why."""


@functools.lru_cache(maxsize=64)
def _say_once(called: str, reason: str) -> None:
    logger.warning("fastnas: %s runs its own forward: %s", called, reason)


def _own_forward(module: nn.Module, settings: Settings, args: Any, kwargs: Any, reason: str) -> Any:
    if settings.strict:
        raise NotFused(reason)
    _say_once(type(module).__name__, reason)
    # `module.forward` is the forward that we set, and would come back here.
    return type(module).forward(module, *args, **kwargs)


def _as_tensor(w: Any, like: Tensor) -> Tensor:
    """Makes a tensor of mixing weights, which may be nested lists of 0-dim tensors or numbers."""
    if isinstance(w, Tensor):
        return w
    if isinstance(w, list | tuple):
        # They are stacked, so that gradients reach the scalars of which some public code makes its
        # weights.
        return torch.stack([_as_tensor(v, like) for v in w])
    return torch.as_tensor(w, dtype=like.dtype, device=like.device)


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, ...] | str:
    """Returns (s0, s1, w [E, K]) of a cell, (x, w [K]) of a mixed op, or says why it cannot."""
    if kwargs:
        # Only a call with keywords pays for the signature, whose look-up is slow.
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        args, kwargs = bound.args[1:], bound.kwargs
    ops = candidate_modules(module)
    count, shape = 2, [len(ops)]
    if is_cell(module):
        count, shape = 3, [len(ops), len(candidate_modules(ops[0]))]
    if kwargs or len(args) != count:
        return f"called with {len(args) + len(kwargs)} arguments; {count} are fused"
    *x, w = args
    if not all(isinstance(state, Tensor) for state in x):
        return "its input is not a tensor"
    reason = why_eager(x[0])
    if reason is not None:
        return reason
    w = _as_tensor(w, x[0])
    if list(w.shape) != shape:
        return f"the mixing weights have shape {list(w.shape)}; {shape} is fused"
    return (*x, w)


def _fusible(
    module: nn.Module, settings: Settings, args: tuple[Any, ...], kwargs: Any
) -> tuple[Parts, tuple[Tensor, ...]] | str:
    inputs = _inputs(module, args, kwargs)
    if isinstance(inputs, str):
        return inputs
    parts: Parts | str = settings.reading.read(module)
    if isinstance(parts, str):
        return parts
    # Here the host waits for the device, but only for networks that were found to need it.
    if settings.skips_zeros and bool((inputs[-1] == 0).any()):
        return "it leaves out candidates of weight 0"
    if isinstance(parts, SumParts):
        return parts, inputs
    refusal = can_run(parts, inputs[-2], module.training, settings.backend)
    return (parts, inputs) if refusal is None else refusal


def cell_forward(module: nn.Module, settings: Settings, *args: Any, **kwargs: Any) -> Tensor:
    """Runs the whole cell fused, preprocessing and concatenation included."""
    found = _fusible(module, settings, args, kwargs)
    if isinstance(found, str):
        return _own_forward(module, settings, args, kwargs, found)
    parts, (s0, s1, w) = found
    return run_cell(cast(CellParts, parts), s0, s1, w, settings.how(module))


def edge_forward(module: nn.Module, settings: Settings, *args: Any, **kwargs: Any) -> Tensor:
    """Runs recognised candidates fused, foreign ones by their modules, in order; adds them."""
    found = _fusible(module, settings, args, kwargs)
    if isinstance(found, str):
        return _own_forward(module, settings, args, kwargs, found)
    parts, (x, w) = cast(tuple[MixedOpParts, tuple[Tensor, Tensor]], found)
    y = run_edge(parts, x, w, settings.how(module))
    if not parts.foreign:
        return y
    ops, foreign = candidate_modules(module), list(parts.foreign)
    # y holds its candidates' weights already, so its own is 1.
    w = torch.cat([w.new_ones(1), select(w, foreign)])
    return _mix([y, *(ops[k](x) for k in foreign)], w, settings.backend)


def sum_forward(module: nn.Module, settings: Settings, *args: Any, **kwargs: Any) -> Tensor:
    """Runs every candidate by its own module, but for the batch norm that some end in."""
    found = _fusible(module, settings, args, kwargs)
    if isinstance(found, str):
        return _own_forward(module, settings, args, kwargs, found)
    parts, (x, w) = cast(tuple[SumParts, tuple[Tensor, Tensor]], found)
    ops, norms = candidate_modules(module), parts.norms
    # z_k [N, C, H, W] stops before the norm, where the sum does that as well.
    z = [run_to_norm(op, x) if k in norms else op(x) for k, op in enumerate(ops)]
    folded = foldable(z, norms, module.training)
    if not folded:
        return _mix(pass_norms(z, norms), w, settings.backend)
    return norm_sum(z, w, norms, folded, module.training, backend=settings.backend)


def _mix(outputs: Sequence[Tensor], w: Tensor, backend: str | None) -> Tensor:
    """Sums by mixed_sum, or eagerly where the outputs differ in shape, dtype or device."""
    alike = {(y.shape, y.dtype, y.device) for y in outputs}
    if len(alike) == 1 and outputs[0].device == w.device:
        return mixed_sum(outputs, w, backend=backend)
    return cast(Tensor, sum(w_k * y for w_k, y in zip(w, outputs)))


FORWARDS = (cell_forward, edge_forward, sum_forward)
