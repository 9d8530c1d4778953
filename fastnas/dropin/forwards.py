"""Holds the forwards that `accelerate` gives to the cells and mixed ops of a network.

Each is called as `forward(module, settings, ...)` with the arguments of the module's own forward,
and falls back on that where the fused ops cannot serve the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas.dropin.around import run_around
from fastnas.dropin.candidates import Settings, first_arguments
from fastnas.dropin.cells import is_cell
from fastnas.dropin.checked import Parts, SumParts
from fastnas.dropin.replacements import replacement
from fastnas.dropin.say import NotFused, say_once
from fastnas.dropin.waiting import real
from fastnas.nn.final_norms import foldable, norm_sum, pass_norms, run_to_norm
from fastnas.nn.parts import CellParts, candidate_modules
from fastnas.nn.run import How, can_run, run_cell, why_eager
from fastnas.ops import mixed_sum


@dataclass
class WholeSettings(Settings):
    """Holds the arguments of a replaced forward; `reading` is of `Parts`.

    Args:
        outermost: whether the module is the network, which returns no sums that wait.
        skips_zeros: whether the module's own forward leaves out candidates of weight 0.
    """

    outermost: bool = False
    skips_zeros: bool = False

    def how(self, module: nn.Module, parts: CellParts, device: torch.device) -> How:
        """Says how a fused call of the module, a cell, runs."""
        norms = parts.layers.norms
        memory = self.memory_of(device, norms[0].num_features) if norms else "lean"
        return How(module.training, memory=memory, backend=self.backend)


def _own_forward(
    module: nn.Module, settings: WholeSettings, args: Any, kwargs: Any, reason: str
) -> Any:
    if settings.strict:
        raise NotFused(reason)
    say_once(type(module).__name__, reason)
    # `module.forward` is the forward that we set, and would come back here. Its candidates run
    # fused where they can.
    return run_around(module, settings.outermost, args, kwargs)


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
    ops = candidate_modules(module)
    count, shape = 2, [len(ops)]
    if is_cell(module):
        count, shape = 3, [len(ops), len(candidate_modules(ops[0]))]
    if kwargs or len(args) != count:
        # Only such a call pays for the signature, whose look-up is slow.
        first = first_arguments(module, count, args, kwargs)
        if isinstance(first, str):
            return first
        args = first
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
    module: nn.Module, settings: WholeSettings, args: tuple[Any, ...], kwargs: Any
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


@replacement
def cell_forward(module: nn.Module, settings: WholeSettings, *args: Any, **kwargs: Any) -> Tensor:
    """Runs the whole cell fused, preprocessing and concatenation included."""
    args, kwargs = real(args), real(kwargs)
    found = _fusible(module, settings, args, kwargs)
    if isinstance(found, str):
        return _own_forward(module, settings, args, kwargs, found)
    parts, (s0, s1, w) = found
    if not torch.compiler.is_compiling():
        settings.site.ran_fused(w.numel())
    assert isinstance(parts, CellParts)
    return run_cell(parts, s0, s1, w, settings.how(module, parts, s0.device))


@replacement
def sum_forward(module: nn.Module, settings: WholeSettings, *args: Any, **kwargs: Any) -> Tensor:
    """Runs every candidate by its own module, but for the batch norm that some end in."""
    args, kwargs = real(args), real(kwargs)
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
