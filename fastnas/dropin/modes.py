"""Holds the modes of torch under which candidates are called, and versions of what they read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback


def saved_hooks() -> Any:
    """Returns the innermost hooks of saved tensors, (pack, unpack), or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class Modes(NamedTuple):
    """Holds the modes of torch under which an operation is called, to compute it later."""

    grad: bool
    inference: bool
    hooks: object
    """Those of saved tensors. Each checkpoint has its own, and counts what is saved in it."""

    @classmethod
    def now(cls) -> Modes:
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), saved_hooks())

    def hold(self) -> bool:
        """Tells whether these are the modes of now; asked several times for each candidate."""
        return (
            self.grad == torch.is_grad_enabled()
            and self.inference == torch.is_inference_mode_enabled()
            and self.hooks == saved_hooks()
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Sets these modes for a while, and takes away hooks that were set since."""
        changes = self.inference != torch.is_inference_mode_enabled()
        mode = torch.inference_mode(self.inference) if changes else nullcontext()
        left, autograd = [], torch._C._autograd
        while (top := saved_hooks()) not in (None, self.hooks):
            left.append(top)
            autograd._pop_saved_tensors_default_hooks()
        try:
            with mode, torch.set_grad_enabled(self.grad):
                yield
        finally:
            for hooks in reversed(left):
                autograd._push_saved_tensors_default_hooks(*hooks)


class _Around(threading.local):
    hooks: object = None


_AROUND = _Around()
"""Holds the hooks of saved tensors under which the innermost module around candidates runs."""


@contextmanager
def inside_module() -> Iterator[None]:
    """Says that a module is called, whose candidates may wait for each other."""
    outer, _AROUND.hooks = _AROUND.hooks, saved_hooks()
    try:
        yield
    finally:
        _AROUND.hooks = outer


def leaves_hooks() -> bool:
    """Tells whether the call that ends has hooks of saved tensors that its caller has not.

    So it is what a checkpoint runs: what waits is computed in it, or it would not be run again.
    """
    return saved_hooks() != _AROUND.hooks


def version(x: Tensor) -> int:
    """Returns a number that grows when x is changed in place; inference tensors have none."""
    return 0 if x.is_inference() else x._version


def versions(tensors: Sequence[Tensor]) -> int:
    """Returns the sum of their versions."""
    try:
        return sum([t._version for t in tensors])
    except RuntimeError:  # one of them is an inference tensor
        return sum(map(version, tensors))


def changed(what: str) -> str:
    """Returns the message for a tensor that was changed while a sum waited for it."""
    return (
        f"fastnas: {what} was changed before the sum that reads it was computed, at its first use;"
        " eager computes at once. Clone it before it is changed, or `decelerate` this network"
    )


def is_compiled() -> bool:
    """Tells whether torch.compile traces, or would compile the functions that are called here.

    Those after a graph break are compiled one by one, and no guard can be made of a sum that waits.
    """
    compiles = torch.compiler.is_compiling() or get_eval_frame_callback() is not None
    return compiles or torch._C._get_tracing_state() is not None  # `torch.jit.trace`


def is_function_forward() -> bool:
    """Tells whether the forward of an `autograd.Function` is running.

    torch switches off both kinds of derivatives there; `no_grad` leaves those of forward mode on.
    """
    on = torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled()
    return not (on or torch.is_inference_mode_enabled())


def must_not_wait(inference: bool) -> bool:
    """Tells whether a candidate is to return a tensor at once; of an inference tensor, always."""
    # The forward of a Function has to. So has the second forward of a re-entrant checkpoint, in the
    # middle of a backward pass; the other kind of checkpoint goes by hooks of saved tensors.
    in_backward = torch._C._current_graph_task_id() != -1 and saved_hooks() is None
    # An inference tensor has no version, by which a change could be seen.
    return in_backward or inference or leaves_hooks() or is_function_forward()


def autocast_now(device: torch.device) -> torch.dtype | None:
    """Returns the dtype of autocast on a device, or None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
