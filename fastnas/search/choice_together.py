"""Keeps the processes of a `ChoiceSearch` in step: they begin alike and take as many batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastnas.processes import Processes, ProcessesError, digest, tensors_in


def check_alike(processes: Processes, parts: Mapping[str, Any]) -> None:
    """Makes sure that networks and optimizers have the same bits in all processes.

    Args:
        parts: name to what has a `state_dict`; those of loaders are each process' own.

    Raises:
        ProcessesError: naming the first part that differs, or the random state.
    """
    if processes.size == 1:  # to ask for states is work
        return
    found = {
        name: part.state_dict()
        for name, part in parts.items()
        if isinstance(part, nn.Module | torch.optim.Optimizer)
    }
    processes.check_bits({**found, "random state": torch.get_rng_state()})


def batches_together(processes: Processes, batches: Iterable[Any], first: bool) -> Iterator[Any]:
    """Yields the batches of this process, as long as each of the others has one as well.

    Args:
        first: whether it is the first epoch, in which it is asked whether the processes have
            batches of their own.

    Raises:
        ProcessesError: all have the same batch; or they have drawn other random numbers, so that
            the samples to come would differ.
    """
    if processes.size == 1:
        yield from batches
        return
    source = iter(batches)
    ends = object()
    while True:
        batch = next(source, ends)
        # What a batch holds besides tensors cannot be compared.
        found = tensors_in(batch) if first else []
        content = digest(found) if found else ""
        told = processes.gathered((batch is not ends, digest([torch.get_rng_state()]), content))
        if not all(has for has, _, _ in told):
            return
        if len({state for _, state, _ in told}) > 1:
            raise ProcessesError(
                "the processes have drawn other random numbers, so that their samples would differ;"
                " one seed in all and batches of one size (drop_last=True) are needed"
            )
        if first and content and len({text for _, _, text in told}) == 1:
            raise ProcessesError(
                f"all {processes.size} processes have the same batch of train; each needs its"
                " share, such as by a torch.utils.data.DistributedSampler"
            )
        first = False
        yield batch
