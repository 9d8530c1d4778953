"""Computes steps in fp32, bf16 or fp16, alone or by several processes together.

Parameters, logits, optimizers, running statistics and gradients are float32 in all three. In bf16
and fp16 `torch.autocast` chooses the dtype of each op in forward and loss, and backward follows it.
The gradients of fp16 would vanish below 6e-8, so its losses are multiplied by a scale (Micikevicius
et al., ICLR 2018, arXiv 1710.03740), whose rule is that of `torch.amp.GradScaler`.

The weights and the logits have a scale each: one half may overflow alone. Several processes bring
their gradients together while they are scaled: what overflows in one then does in all, and all make
the step or none.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from fastnas.checks import check_choice, short
from fastnas.processes import ALONE, Processes

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(DTYPES)
INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""Those of `torch.amp.GradScaler`."""
LEAST = 2.0**-14
"""Scale below which no scale will help: 30 steps in a row were skipped at the beginning."""


class LossScale:
    """Holds the scale of one half's loss, and counts what was skipped.

    After a step whose gradients are finite, and 2000 of them in a row, the scale is doubled; a step
    with others is not made, and halves it.

    Attributes:
        scale: a power of two, so that scaling rounds nothing.
        clean: steps in a row that were made since the scale changed.
        skipped: steps of the epoch that were not made.
        lost: those of them whose loss itself was not finite, so that no mean can hold it.
    """

    def __init__(self) -> None:
        self.scale, self.clean, self.skipped, self.lost = INITIAL, 0, 0, 0

    def update(self, finite: bool, lost: bool = False) -> None:
        """Moves the scale after a step, by whether its gradients were finite."""
        if not finite:
            # It stays above 0, by which no gradient could be divided.
            self.scale, self.clean = max(self.scale, LEAST) * BACKOFF, 0
            self.skipped += 1
            self.lost += lost
            return
        self.clean += 1
        if self.clean == INTERVAL:
            # As in GradScaler: a scale that float32 cannot hold is not taken.
            grown = self.scale * GROWTH
            self.scale = grown if grown <= torch.finfo(torch.float32).max else self.scale
            self.clean = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved state; ValueError where no scale can have saved it."""
        scale, counts = state["scale"], [state[name] for name in ("clean", "skipped", "lost")]
        if not (type(scale) is float and 0 < scale < math.inf):
            raise ValueError(
                f"the scale of a loss is {short(scale)}; a finite number > 0 is needed"
            )
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"the steps of a scaled loss are {short(counts)}; counts are needed")
        self.scale, (self.clean, self.skipped, self.lost) = scale, counts


class HalfStep:
    """Says how one half of a step, that of the weights or that of the logits, is computed.

    Args:
        dtype: of autocast; None: none.
        device_type: that of the tensors.
        processes: make the step together, each on losses of its own.

    Attributes:
        scaling: of the loss, None but in fp16.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        device_type: str = "cpu",
        processes: Processes = ALONE,
    ) -> None:
        self.dtype, self.device_type, self.processes = dtype, device_type, processes
        self.scaling = LossScale() if dtype is torch.float16 else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of forward and loss; backward runs outside of it."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)

    def grad(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Returns this process' gradients of a loss, unscaled; zero for an input without effect."""
        scale = self._scale
        found = torch.autograd.grad(_scaled(loss, scale), inputs, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs)]
        return grads if scale == 1 else [g / scale for g in grads]

    def backward(self, loss: Tensor) -> None:
        """Adds the scaled gradients of a loss to `grad`; `finish` comes after the last one."""
        _scaled(loss, self._scale).backward()

    def finish(self, params: Sequence[Tensor], largest_norm: float) -> None:
        """Makes `grad` of the params that of all processes, unscales and clips it."""
        self.processes.join_gradients(params)
        grads = [p.grad for p in params if p.grad is not None]
        if self._scale != 1 and grads:
            torch._foreach_div_(grads, self._scale)  # clipping must see the true norm
        clip_grad_norm_(params, largest_norm)

    def move(self, params: Sequence[Tensor], loss: Tensor, step: Callable[[], object]) -> None:
        """Calls `step`, which moves the params by `grad`; in fp16 if loss and `grad` are finite.

        The host waits for the device then, to know whether they are, and for the other processes,
        whose losses may not be.
        """
        if self.scaling is None:
            step()
            return
        # Gradients tell it when they are clipped, too: a norm of inf leaves NaN, as inf * 0 is.
        largest = get_total_norm([p.grad for p in params if p.grad is not None], math.inf)
        of_loss, of_grads = torch.stack([loss.detach(), largest]).isfinite().tolist()
        # `grad` is that of all processes, the loss this one's.
        of_loss = not self.processes.largest(not of_loss)
        if of_loss and of_grads:
            step()
        self.scaling.update(of_loss and of_grads, lost=not of_loss)

    @property
    def _scale(self) -> float:
        return 1.0 if self.scaling is None else self.scaling.scale


def _scaled(loss: Tensor, scale: float) -> Tensor:
    # With 1 the graph stays that of a plain backward, node for node.
    return loss if scale == 1 else loss * scale


class Precision:
    """Holds the precision of a run, and what its two halves scale their losses by.

    Args:
        name: "fp32", "bf16" or "fp16".
        device: where the run is.
        processes: make its steps together.

    Raises:
        TypeError, ValueError: there is no such precision, or this device does not have it.
    """

    def __init__(
        self,
        name: str = "fp32",
        device: torch.device | str = "cpu",
        processes: Processes = ALONE,
    ) -> None:
        check_choice("precision", name, PRECISIONS)
        kind = torch.device(device).type
        self.name, self.dtype = name, DTYPES[name]
        if self.dtype is not None:
            _check_autocast(name, self.dtype, kind)
        self.processes = processes
        self.weights, self.logits = (HalfStep(self.dtype, kind, processes) for _ in range(2))
        self.scales = {
            name: half.scaling
            for name, half in (("weight", self.weights), ("logit", self.logits))
            if half.scaling is not None
        }
        """By the name of the half; none but in fp16."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which the network is evaluated."""
        return self.weights.autocast()

    def problem(self) -> str | None:
        """Tells which half overflows at any scale, or None."""
        for name, scaling in self.scales.items():
            if scaling.scale < LEAST:
                return f"the gradients of the {name}s are not finite at any scale of the loss"
        return None

    def figures(self) -> dict[str, int]:
        """Returns how many steps of each half were skipped in this epoch; nothing but in fp16."""
        return {f"skipped_{name}_steps": s.skipped for name, s in self.scales.items()}

    def end_epoch(self) -> None:
        """Counts anew from here on."""
        for scaling in self.scales.values():
            scaling.skipped = scaling.lost = 0

    def lost(self, figure: str) -> int:
        """Counts the steps of the epoch whose figure is missing, as their loss was not finite."""
        scaling = self.scales.get("logit" if figure == "valid_loss" else "weight")
        return 0 if scaling is None else scaling.lost

    def holds(self, figures: Mapping[str, Tensor]) -> bool:
        """Tells whether figures of a step may be summed: in fp16 none that are not finite."""
        return not self.scales or all(bool(value.isfinite().all()) for value in figures.values())

    def parts(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it, by name; nothing but in fp16."""
        return {"precision": self} if self.scales else {}

    def state_dict(self) -> dict[str, Any]:
        return {name: scaling.state_dict() for name, scaling in self.scales.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, scaling in self.scales.items():
            scaling.load_state_dict(state[name])


def _check_autocast(name: str, dtype: torch.dtype, kind: str) -> None:
    """Refuses what this torch or device cannot cast to; torch itself may only warn and go on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.autocast(kind, dtype):
                pass
    except (RuntimeError, UserWarning) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"precision is {name!r}, which {kind} does not have: {text}") from error
