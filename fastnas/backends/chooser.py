"""Which backend computes: argument > use_backend > FASTNAS_BACKEND > auto."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from fastnas.backends.cpu import CpuBackend
from fastnas.backends.cuda import CudaBackend
from fastnas.backends.eager import EagerBackend
from fastnas.backends.request import OpInfo, Request
from fastnas.backends.triton import TritonBackend
from fastnas.checks import short

logger = logging.getLogger("fastnas")


class Backend(Protocol):
    """One way to compute the ops: says whether it can, then allocates and calls."""

    name: str

    def unavailable(self) -> str | None:
        """Why nothing can run on it here, or None."""

    def can_run(self, request: Request) -> str | None:
        """Why this request cannot run on it, or None."""

    def mixed_sum_fwd(
        self,
        x: list[Tensor],
        w: Tensor,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...

    def mixed_sum_bwd(
        self,
        dy: Tensor,
        x: list[Tensor],
        w: Tensor,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        std: Tensor,
        needs_dx: list[bool],
        needs_dw: bool,
    ) -> tuple[list[Tensor], Tensor]: ...

    def mixed_norm_sum_fwd(
        self,
        z: list[Tensor],
        w: Tensor,
        normed: list[bool],
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def mixed_norm_sum_bwd(
        self,
        dy: Tensor,
        z: list[Tensor],
        w: Tensor,
        normed: list[bool],
        mean: Tensor,
        var: Tensor,
        eps: float,
        training: bool,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        std: Tensor,
        needs_dz: list[bool],
        needs_dw: bool,
    ) -> tuple[list[Tensor], Tensor]: ...


BACKENDS: MutableMapping[str, Backend] = {
    backend.name: backend
    for backend in (EagerBackend(), CpuBackend(), CudaBackend(), TritonBackend())
}
# What auto tries, by the device of the tensors. Interpreted Triton is only ever an explicit choice.
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
AUTO = "auto"
VARIABLE = "FASTNAS_BACKEND"

_wish: list[str] = []
_chosen: dict[tuple[OpInfo, torch.device, torch.dtype, int, str], str] = {}
_announced: set[tuple[str, str]] = set()


class BackendError(ValueError):
    """An explicit choice of backend cannot run; the message says why."""


def _check_name(name: str, source: str) -> None:
    if name != AUTO and name not in BACKENDS:
        allowed = ", ".join([*BACKENDS, AUTO])
        raise BackendError(f"{source} is {short(name)}; allowed: {allowed}")


def check_environment() -> None:
    """Raise BackendError where the environment names a backend that does not exist."""
    _check_name(_environment(), VARIABLE)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op inside the block runs on `name` ("auto" lifts an outer choice), or raises.

    Holds for the whole process, not for one thread: on CUDA, backward runs on autograd's threads.
    """
    _check_name(name, "use_backend")
    _wish.append(name)
    try:
        yield
    finally:
        _wish.pop()


@cache
def _environment() -> str:
    return os.environ.get(VARIABLE) or AUTO


def choose(
    op: OpInfo,
    device: torch.device,
    dtype: torch.dtype,
    terms: int = 1,
    explicit: str | None = None,
) -> str:
    """The name of the backend that runs `op` on `terms` tensors of this device and dtype.

    Asked on every call, in caches that a kernel has just flushed, where each attribute looked up
    costs up to 0.02 ms: hence no request is built, and the environment is read once.

    Raises:
        BackendError: an explicit choice cannot run it.
    """
    if explicit is not None:
        wish, source = explicit, "backend"
    elif _wish:
        wish, source = _wish[-1], "use_backend"
    else:
        wish, source = _environment(), VARIABLE
    key = op, device, dtype, terms, wish
    name = _chosen.get(key)
    if name is None:
        _check_name(wish, source)
        request = Request(op, device.type, dtype, terms)
        name = _choose_auto(request) if wish == AUTO else _demand(request, wish, source)
        _chosen[key] = name
    return name


def _demand(request: Request, name: str, source: str) -> str:
    backend = BACKENDS[name]
    reason = backend.unavailable() or backend.can_run(request)
    if reason is not None:
        raise BackendError(f"{source}='{name}' cannot run {request.op.stem}: {reason}")
    return name


def _choose_auto(request: Request) -> str:
    for name in PREFERENCE.get(request.device, ("eager",)):
        reason = BACKENDS[name].unavailable() or BACKENDS[name].can_run(request)
        if reason is None:
            return name
        if (name, reason) not in _announced:
            _announced.add((name, reason))
            logger.warning("fastnas: %s falls back from %s: %s", request.op.stem, name, reason)
    raise AssertionError("eager runs everything")


def forget_choices() -> None:
    """Drops cached choices, for when what is available, or the environment, changes (tests)."""
    _environment.cache_clear()
    _chosen.clear()
    _announced.clear()
