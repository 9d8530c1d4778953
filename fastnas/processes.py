"""Brings together what the processes of one run have found, where `torchrun` has started several.

Each process takes its share of every batch. Gradients, running statistics and figures are then the
means over the processes, so that weights, logits and optimizers are the same bits on all of them::

    grad = 1/N sum_r grad L(images of process r)

What is drawn for a sample comes from one random state, which all processes have; the noise of a
process is its own. Batch norms normalise by the images of their process, as they do under torch's
DistributedDataParallel. That one is not used: it takes gradients from hooks of `backward`, which
neither `torch.autograd.grad` (the logits) nor a candidate that runs again calls once a step, and it
makes zeros of the gradients of candidates that no process has run, which momentum then moves.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

_store: Any = None
"""Where the processes agree which of them prints an error: it outlives each of them."""


class ProcessesError(RuntimeError):
    """Says in one line that the processes of a run cannot go on together."""


@dataclass(frozen=True)
class Share:
    """Says which part of each batch a process has: the `rank`-th of `size` equal ones."""

    rank: int = 0
    size: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """Returns its part [.., B / size] of the last axis [.., B], which `size` divides."""
        part = batch.shape[-1] // self.size
        return batch.narrow(-1, self.rank * part, part)

    def spread(self, items: Tensor) -> Tensor:
        """Returns every `size`-th item [K], for what is evaluated once and counted together."""
        return items[self.rank :: self.size]


WHOLE = Share()


@dataclass(frozen=True)
class Processes:
    """Knows the processes of a run; one alone talks to nobody.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Tells whether this process writes files and prints."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Returns which part of each batch is this process'."""
        return Share(self.rank, self.size)

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the mean over all processes of each tensor, which is floating point."""
        if self.size == 1:
            return list(tensors)
        found = [tensor.detach() for tensor in tensors]
        kinds: dict[Any, list[int]] = {}
        for i, tensor in enumerate(found):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(i)
        for alike in kinds.values():
            # One transfer for all: a network has a thousand small tensors, and each transfer waits.
            flat = torch.cat([found[i].reshape(-1) for i in alike])
            self._sum(flat)
            flat /= self.size
            for i, mean in zip(alike, flat.split([found[i].numel() for i in alike])):
                found[i] = mean.view(found[i].shape)
        return found

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Puts the mean over all processes into each tensor."""
        if self.size > 1:
            for tensor, mean in zip(tensors, self.means(tensors)):
                tensor.detach().copy_(mean)

    def join_gradients(self, params: Sequence[Tensor]) -> None:
        """Makes each `grad` the mean over the processes; one that no process has stays None.

        A process without the gradient of a parameter that another has counts as 0.
        """
        if self.size == 1:
            return
        # Transfers of different sizes would hang, or mix gradients up.
        held = torch.tensor([p.grad is not None for p in params], dtype=torch.int32)
        self._sum(held)
        found = [p for p, count in zip(params, held.tolist()) if count]
        for p in found:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.mean_([p.grad for p in found if p.grad is not None])

    def join_statistics(self, buffers: Iterable[Tensor]) -> None:
        """Makes running statistics their means over the processes, counts of batches the largest.

        What is no statistic is the same in all, and stays.
        """
        if self.size == 1:
            return
        buffers = list(buffers)
        self.mean_([buffer for buffer in buffers if buffer.is_floating_point()])
        # Where processes share samples, each has run other candidates.
        counts = [buffer for buffer in buffers if buffer.dtype == torch.int64]
        if counts:
            flat = torch.cat([count.reshape(-1) for count in counts])
            with _partners_told(self):
                dist.all_reduce(flat, dist.ReduceOp.MAX)
            for count, most in zip(counts, flat.split([count.numel() for count in counts])):
                count.copy_(most.view(count.shape))

    def total(self, count: Tensor) -> Tensor:
        """Returns a whole number summed over the processes, int64 of any shape."""
        if self.size == 1:
            return count
        found = count.clone()
        self._sum(found)
        return found

    def largest(self, number: int) -> int:
        """Returns the largest of the numbers that the processes give; all wait for each other."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        with _partners_told(self):
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.largest(0)

    def gathered(self, found: Any) -> list[Any]:
        """Returns what each process gives, plain data, in the order of their ranks."""
        if self.size == 1:
            return [found]
        given: list[Any] = [None] * self.size
        with _partners_told(self):
            dist.all_gather_object(given, found)
        return given

    def first_says(self, found: Any) -> Any:
        """Returns what the first process gives, plain data; the others wait for it."""
        if self.size == 1:
            return found
        given = [found]
        with _partners_told(self):
            dist.broadcast_object_list(given, device=torch.device("cpu"))
        return given[0]

    def check_same(self, mine: Mapping[str, Any]) -> None:
        """Makes sure that all processes have the same values, by their names.

        Raises:
            ProcessesError: naming the first that differs.
        """
        if self.size == 1:
            return
        every = self.gathered(dict(mine))
        for rank, theirs in enumerate(every):
            for name, value in every[0].items():
                if theirs.get(name) != value:
                    raise ProcessesError(
                        f"process {rank} has another {name} than process 0:"
                        f" {theirs.get(name)!r} and not {value!r}"
                    )

    def check_bits(self, states: Mapping[str, Any]) -> None:
        """Makes sure that states, nested tensors and plain values, have the same bits in all.

        Raises:
            ProcessesError: naming the first state that differs.
        """
        found = {}
        for name, state in states.items():
            plain = [leaf for leaf in tree_leaves(state) if not isinstance(leaf, Tensor)]
            values = hashlib.blake2b(repr(plain).encode(), digest_size=8).hexdigest()
            found[name] = digest(tensors_in(state)), values
        self.check_same(found)

    def _sum(self, tensor: Tensor) -> None:
        with _partners_told(self):
            dist.all_reduce(tensor)


ALONE = Processes()


def here() -> Processes:
    """Returns the processes of torch's default process group, or `ALONE` where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined() -> Iterator[Processes]:
    """Brings the processes of `torchrun` together, until the end of the context.

    Alone, and in a process group that the caller has made, it changes nothing. Processes talk by
    gloo, and about what lies on a GPU by NCCL; each has the GPU of its local rank.

    Raises:
        ProcessesError: the others do not come.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    is_started = "RANK" in os.environ and size.isdecimal() and int(size) > 1
    if not is_started or not dist.is_available() or dist.is_initialized():
        yield here()
        return
    from torch.distributed.rendezvous import rendezvous

    global _store
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    try:
        _store, rank, world = next(rendezvous("env://"))
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(f"the {size} processes do not meet: {_line(error)}") from error
    if rank:
        # Each would warn of the same.
        logging.getLogger("fastnas").setLevel(logging.ERROR)
    # After an error the group stays: the others hear of it when this process has ended, and by
    # then it has said why.
    yield Processes(rank, world)
    dist.destroy_process_group()
    _store = None


def local_rank() -> int:
    """Returns the number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def may_tell() -> bool:
    """Tells whether this process is the first of its run to say why it ends: one line is enough."""
    if _store is None:
        return True
    with suppress(Exception):  # the store has gone, and with it whoever might have told
        return bool(_store.add("fastnas: told", 1) == 1)
    return True


def tensors_in(found: Any) -> list[Tensor]:
    """Returns the tensors in tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def digest(tensors: Iterable[Tensor]) -> str:
    """Returns a hash of the bits of tensors."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().view(-1)
        found.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return found.hexdigest()


@contextmanager
def _partners_told(processes: Processes) -> Iterator[None]:
    """Turns the error about a partner that has gone into one line."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessesError(
            f"process {processes.rank} of {processes.size} has lost another, which has ended or"
            f" cannot be reached ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    """Returns what the error says, without gloo's place in its source and its advice."""
    text = re.sub(r"^\[[^]]*\] *|\. This is typically .*", "", " ".join(str(error).split()))
    return text[:300] or type(error).__name__
