"""Keeps sampled candidates on the device: kernels read them, the host never does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

from fastnas.spaces import EdgeTable

_wanted: ContextVar[bool] = ContextVar("choice_on_device", default=False)


@contextmanager
def choice_on_device() -> Iterator[None]:
    """Makes `mixed_edges` on CUDA leave its `choice` on the device, as a captured graph needs.

    One graph then serves every sample. Parameters that are not sampled get zeros as gradients in
    place of None: whoever moves them has to leave out those that `sampled_params` does not name.
    """
    before = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(before)


def stays_on_device() -> bool:
    """Tells whether it is called inside of `choice_on_device`."""
    return _wanted.get()


def sampled_norms(table: EdgeTable, choice: Tensor) -> Tensor:
    """Maps choice [..., edges] to bool [..., norms]: whose statistics a path moves."""
    return _sampled(table, "norms", choice)


def sampled_params(table: EdgeTable, choice: Tensor) -> Tensor:
    """Maps choice [..., edges] to bool [..., params]: which parameters a path runs."""
    return _sampled(table, "params", choice)


def _sampled(table: EdgeTable, what: str, choice: Tensor) -> Tensor:
    # `edges` and `columns` tell the edge and the column of each norm, or parameter, in order.
    edges, columns = _places(table, what, choice.device)
    return choice[..., edges] == columns


@lru_cache(maxsize=64)  # a captured graph cannot make them
def _places(table: EdgeTable, what: str, device: torch.device) -> tuple[Tensor, Tensor]:
    places = [
        (e, term.weight)
        for e, edge in enumerate(table.edges)
        for term in edge.terms
        for _ in range(getattr(term, what))
    ]
    edges, columns = zip(*places) if places else ((), ())
    return (
        torch.tensor(edges, dtype=torch.int64, device=device),
        torch.tensor(columns, dtype=torch.int64, device=device),
    )
