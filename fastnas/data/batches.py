"""Says which images make up which batch: a stratified split and an endless, resumable stream."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from fastnas.checks import check_int, typed
from fastnas.processes import WHOLE, Share

LAST_SEED = 2**63 - 1


@typed
def split_indices(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divides a labelled set in two parts with the same mix of classes.

    The first part has round(fraction * N) members, and of each class its exact share rounded
    down or up.

    Args:
        labels: non-negative integers [N].
        fraction: share of the first part, strictly between 0 and 1.
        seed: chooses the members.

    Returns:
        Two disjoint ascending int64 index tensors on the CPU that together cover 0 .. N - 1.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if the labels are not one-dimensional or negative, the fraction is out of
            range, or a part would be empty.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels have dtype {labels.dtype}; expected integers")
    if labels.dim() != 1:
        raise ValueError(f"labels have shape {list(labels.shape)}; expected [N]")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; expected a number strictly between 0 and 1")
    check_int("seed", seed, 0, LAST_SEED)
    total = len(labels)
    size = round(fraction * total)
    if not 0 < size < total:
        raise ValueError(f"a fraction of {fraction} of {total} images leaves one part empty")
    labels = labels.cpu().long()
    if labels.min() < 0:
        raise ValueError(f"labels hold {int(labels.min())}; expected 0 or more")

    class_sizes = torch.bincount(labels)
    # This is the largest-remainder method: shares are rounded down, and the images that are left go
    # to the classes that lost most.
    shares = class_sizes.double() * (size / total)
    counts = shares.floor().long()
    largest_remainders = (shares - counts).argsort(descending=True, stable=True)
    counts[largest_remainders[: size - int(counts.sum())]] += 1

    # A stable sort by class keeps each class in random order, so the first of each are its members.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    class_starts = class_sizes.cumsum(0) - class_sizes
    rank_in_class = torch.arange(total) - class_starts.repeat_interleave(class_sizes)
    first = rank_in_class < counts[labels[order]]
    # They are sorted, because the shuffling of `Batches` is what decides their order.
    return order[first].sort().values, order[~first].sort().values


class Batches:
    """Streams batches of indices without end over a fixed set of indices, shuffled anew each pass.

    Its random numbers are its own: nothing else that draws can change the stream, and a
    restored state continues it bit for bit.

    Args:
        indices: int64 [N], the set to draw from.
        batch_size: indices per batch.
        seed: chooses the stream.
        drop_last: leave out the incomplete batch at the end of a pass.
        share: the part of each batch that is handed out, where several processes share them.

    Raises:
        TypeError: if the indices are not int64 or the batch size is not an integer.
        ValueError: if the indices are not one-dimensional or empty, or no batch can be formed,
            or none can be shared.
    """

    @typed
    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        seed: int,
        drop_last: bool = True,
        share: Share = WHOLE,
    ) -> None:
        if indices.dtype != torch.int64:
            raise TypeError(f"indices have dtype {indices.dtype}; expected torch.int64")
        if indices.dim() != 1 or len(indices) == 0:
            raise ValueError(f"indices have shape {list(indices.shape)}; expected [N] with N > 0")
        check_int("seed", seed, 0, LAST_SEED)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        if drop_last and batch_size > len(indices):
            raise ValueError(
                f"batch_size is {batch_size}; expected at most {len(indices)}, the number of "
                "indices, or drop_last=False"
            )
        if batch_size % share.size or (share.size > 1 and not drop_last):
            raise ValueError(
                f"batch_size is {batch_size}; a multiple of {share.size}, the number of processes,"
                " and drop_last=True are needed"
            )
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.share = share
        # It is a copy, so that the stream does not change with the caller's tensor.
        self._indices = indices.clone()
        self._generator = torch.Generator().manual_seed(seed)
        self._start_pass()

    @property
    def batches_per_epoch(self) -> int:
        """Counts the batches in one pass over the indices."""
        whole, rest = divmod(len(self._indices), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def next(self) -> Tensor:
        """Returns the next int64 [batch_size], or fewer at the end of a pass without drop_last.

        Of several processes each gets its share of these.
        """
        if self._position == self.batches_per_epoch:
            self._start_pass()
        start = self._position * self.batch_size
        self._position += 1
        return self.share.of(self._shuffled[start : start + self.batch_size])

    @property
    def pass_key(self) -> int:
        """Returns 64 bits that tell the pass under way from all others, of other seeds as well."""
        return self._pass_key

    @property
    def place(self) -> tuple[int, int]:
        """Returns the pass under way and how many batches of it are done."""
        return self._pass_key, self._position

    def ahead(self) -> Batches:
        """Returns a copy that runs ahead: what it hands out, these will, which stay here."""
        found = Batches(self._indices, self.batch_size, 0, self.drop_last, self.share)
        found.load_state_dict(self.state_dict())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns the exact position in the stream, as one uint8 tensor and plain numbers."""
        return {
            "generator": self._pass_state.clone(),
            "position": self._position,
            **self._setting(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was called.

        Raises:
            ValueError: if the state is incomplete, or was made with another number of indices,
                batch size or drop_last.
        """
        missing = {"generator", "position", *self._setting()} - set(state)
        if missing:
            raise ValueError(f"state of the batches lacks {', '.join(sorted(missing))}")
        for key, mine in self._setting().items():
            if state[key] != mine:
                raise ValueError(f"state of the batches has {key} {state[key]}; expected {mine}")
        if not 0 <= state["position"] <= self.batches_per_epoch:
            raise ValueError(
                f"state of the batches has position {state['position']}; "
                f"expected 0..{self.batches_per_epoch}"
            )
        generator = state["generator"]
        if not isinstance(generator, Tensor) or generator.shape != self._pass_state.shape:
            raise ValueError(
                f"state of the batches has a generator that is no uint8 tensor of shape "
                f"{list(self._pass_state.shape)}"
            )
        # The state is that of the pass's beginning: the permutation is drawn again, not stored.
        self._generator.set_state(generator.cpu())
        self._start_pass()
        self._position = int(state["position"])

    def _setting(self) -> dict[str, int]:
        return {
            "length": len(self._indices),
            "batch_size": self.batch_size,
            "drop_last": int(self.drop_last),
        }

    def _start_pass(self) -> None:
        # It is kept before the permutation is drawn, which is how a restored stream finds the same
        # one.
        self._pass_state = self._generator.get_state()
        # Drawing a key would move the permutations, and with them the bits of every older run.
        digest = hashlib.blake2b(self._pass_state.numpy().data, digest_size=8).digest()
        self._pass_key = int.from_bytes(digest, "little")
        order = torch.randperm(len(self._indices), generator=self._generator)
        self._shuffled = self._indices[order.to(self._indices.device)]
        self._position = 0
