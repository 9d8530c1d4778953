"""Measures how many bytes autograd holds for the backward pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor

Storage = tuple[int, int]
"""Which storage it is, and its bytes. Not its address: on the device "meta" all have that of 0."""


def _storage(tensor: Tensor) -> Storage:
    # Views and slices share a storage, which is held as a whole as long as one of them is.
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Sums the memory behind the tensors, each storage counted once (views share theirs)."""
    return sum(size for _, size in {_storage(tensor) for tensor in tensors})


class _Held:
    """Stands for a saved tensor; when autograd drops it, the ledger hears of it."""

    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        self.tensor = tensor
        self.ledger = ledger
        # It is kept here, because in `__del__` the tensor may be gone already.
        self.storage = _storage(tensor)
        ledger.take(self.storage)

    # Autograd tells nobody when it frees what was saved; the end of this object does.
    def __del__(self) -> None:
        self.ledger.drop(self.storage)


@dataclass
class _Account:
    held: int = 0
    peak: int = 0

    def add(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)


class _Ledger:
    """Counts the bytes held now and the most there were. Reentrant: a drop can interrupt a take."""

    def __init__(self, exclude: Iterable[Tensor], place: Callable[[], str]) -> None:
        self.excluded = {_storage(tensor) for tensor in exclude}
        self.place = place
        self.holders: Counter[Storage] = Counter()
        self.places: dict[Storage, str] = {}
        self.whole = _Account()
        self.parts: dict[str, _Account] = defaultdict(_Account)
        self.lock = RLock()

    def take(self, storage: Storage) -> None:
        if storage in self.excluded:
            return
        with self.lock:
            self.holders[storage] += 1
            # It counts with its first holder only: several ops may save the same tensor.
            if self.holders[storage] == 1:
                self.places[storage] = self.place()
                self._add(storage, storage[1])

    def drop(self, storage: Storage) -> None:
        if storage in self.excluded:
            return
        with self.lock:
            self.holders[storage] -= 1
            if self.holders[storage] == 0:
                self._add(storage, -storage[1])
                # A storage made later may have the same address, and must begin from no holders.
                del self.holders[storage], self.places[storage]

    def _add(self, storage: Storage, size: int) -> None:
        self.whole.add(size)
        self.parts[self.places[storage]].add(size)


def saved_bytes(run: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Returns the most bytes that autograd holds for backward at any moment of `run()`.

    For one forward pass that is everything it saves. Counted are whole storages, each once, of
    what goes through `save_for_backward`, inputs of checkpointed parts included; what a graph drops
    after its backward no longer counts, so `run` may be a whole step.

    Args:
        run: called once; what it returns is dropped.
        exclude: tensors whose storages do not count, such as parameters and inputs.
    """
    return _run(run, exclude, lambda: "").whole.peak


def saved_bytes_by(
    run: Callable[[], object], place: Callable[[], str], exclude: Iterable[Tensor] = ()
) -> tuple[int, dict[str, int]]:
    """Returns what `saved_bytes` does, and the same for each place in which tensors are saved.

    A storage counts where it is saved first. Where none is dropped before the last is saved, as in
    a forward pass, the places add up to the whole.

    Args:
        run, exclude: as in `saved_bytes`.
        place: asked for each storage where the run is.
    """
    ledger = _run(run, exclude, place)
    return ledger.whole.peak, {name: part.peak for name, part in ledger.parts.items()}


def _run(run: Callable[[], object], exclude: Iterable[Tensor], place: Callable[[], str]) -> _Ledger:
    ledger = _Ledger(exclude, place)

    def pack(tensor: Tensor) -> _Held:
        # It is detached, as an output that is saved would hold its own graph for good.
        return _Held(tensor.detach(), ledger)

    def unpack(held: _Held) -> Tensor:
        return held.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run()
    return ledger
