"""Decides which backend computes: argument > use_backend > FASTNAS_BACKEND > auto."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import get_ident
from typing import Protocol

import torch

# native_cells and native_sums are imported for the kernels that they enter into the op table.
from fastnas.backends import eager, native, native_cells, native_sums, triton  # noqa: F401
from fastnas.backends.op_table import OpInfo, Request
from fastnas.checks import short

logger = logging.getLogger("fastnas")


class Backend(Protocol):
    """Describes where ops can run. Its kernels, one an op, stand in the op table."""

    @property
    def name(self) -> str: ...

    def unavailable(self) -> str | None:
        """Returns why nothing can run on it here, or None."""

    def can_run(self, request: Request) -> str | None:
        """Returns why this request cannot run on it, or None."""


BACKENDS: MutableMapping[str, Backend] = {
    backend.name: backend for backend in (eager.BACKEND, native.CPU, native.CUDA, triton.BACKEND)
}
# Auto tries these, by the device of the tensors. Interpreted Triton is only ever an explicit
# choice.
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
AUTO = "auto"
VARIABLE = "FASTNAS_BACKEND"


@dataclass(frozen=True, eq=False)
class _Wish:
    """Holds what one `use_backend` block asks for, and in which thread."""

    name: str
    thread: int


# All threads share this list: a ContextVar would not reach those on which autograd runs backward.
_wishes: list[_Wish] = []
"""Of the blocks that are open, in the order in which they were entered."""
_chosen: dict[tuple[OpInfo, torch.device, torch.dtype, int, str], str] = {}
_announced: set[tuple[str, str]] = set()


class BackendError(ValueError):
    """Tells that an explicit choice of backend cannot run; the message says why."""


def _check_name(name: object, source: str) -> None:
    if not isinstance(name, str) or (name != AUTO and name not in BACKENDS):
        allowed = ", ".join([*BACKENDS, AUTO])
        raise BackendError(f"{source} is {short(name)}; allowed: {allowed}")


def check_environment() -> None:
    """Raises BackendError where the environment names a backend that does not exist."""
    _check_name(_environment(), VARIABLE)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every op inside the block run on `name` ("auto" lifts an outer choice), or raise.

    In a thread that has opened such blocks its own innermost one counts. Threads that have opened
    none, such as those on which autograd runs backward on CUDA, go by the block of any thread that
    was entered last and is still open.
    """
    _check_name(name, "use_backend")
    wish = _Wish(name, get_ident())
    _wishes.append(wish)
    try:
        yield
    finally:
        _wishes.remove(wish)  # compares by identity: threads end their blocks in any order


def _wished() -> str | None:
    """Returns what the blocks that are open ask for in this thread."""
    here, wishes = get_ident(), _wishes[::-1]  # a copy: other threads come and go
    own = (wish.name for wish in wishes if wish.thread == here)
    return next(own, wishes[0].name if wishes else None)


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
    """Returns the name of the backend that runs `op` on `terms` tensors of this device and dtype.

    Asked on every call, in caches that a kernel has just flushed, where each attribute looked up
    costs up to 0.02 ms: hence no request is built, and the environment is read once.

    Raises:
        BackendError: an explicit choice cannot run it.
    """
    if explicit is not None:
        # A name that is a str but no backend fails below: it has no entry in the cache yet.
        if not isinstance(explicit, str):
            _check_name(explicit, "backend")
        wish, source = explicit, "backend"
    elif _wishes and (wished := _wished()) is not None:
        wish, source = wished, "use_backend"
    else:
        wish, source = _environment(), VARIABLE
    # Whether a backend can run hangs on nothing else, and OpInfo hashes by identity.
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
        # A reason is told once: a step makes hundreds of calls that fall back for the same one.
        if (name, reason) not in _announced:
            _announced.add((name, reason))
            logger.warning("fastnas: %s falls back from %s: %s", request.op.stem, name, reason)
    raise AssertionError("eager runs everything")


def forget_choices() -> None:
    """Drops cached choices, for when what is available, or the environment, changes (tests)."""
    _environment.cache_clear()
    _chosen.clear()
    _announced.clear()
