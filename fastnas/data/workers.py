"""Says how many processes read images, how they begin, and what it means that one has died."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastnas.data.source import DataError, one_line

MOST_WORKERS = 8


@contextmanager
def deaths_told() -> Iterator[None]:
    """Turns torch's error about a worker that has died into a DataError.

    torch raises it wherever the program is when the system tells of the death.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images has died ({one_line(error)}); fewer workers need less"
            " memory, and with --workers 0 there is none"
        ) from error


def usual_workers() -> int:
    """Returns a quarter of the CPUs of this process, 1 to MOST_WORKERS."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cpus // 4))


def begin_worker(number: int) -> None:
    """Makes a worker process ready; its number is not asked for."""
    # Ctrl-C, and what ends a job, go to the whole group of processes. The run answers them by
    # saving its step, for which it needs its workers; these end when it does.
    with suppress(OSError):
        os.setpgid(0, 0)
