"""Measures memory: what autograd saves, and the peak of a call or of a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from fastnas.saved_bytes import saved_bytes, storage_bytes

__all__ = ["allocated_peak", "peak_bytes", "peak_rss_of", "saved_bytes", "storage_bytes"]

# Linux counts the memory of the process that forks into the peak of the one that it starts, so a
# process of its own, which holds little, starts the command and asks for its peak.
_LAUNCHER = """
import os, sys
pid = os.spawnvp(os.P_NOWAIT, sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
os.write(int(sys.argv[1]), str(usage.ru_maxrss).encode())
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Returns the most device memory that the call adds to what was there; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def allocated_peak(call: Callable[[], object]) -> int:
    """Returns the most bytes that tensors of the call take on the CPU, beyond what was there.

    As torch's allocator tells its profiler: temporaries of its kernels count, those of native code
    of ours do not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_rss_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Returns peak resident bytes of a command, run to its end in a process of its own.

    Raises:
        RuntimeError: if the command fails, with the end of what it wrote to stderr.
    """
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LAUNCHER, str(writing), *command],
            pass_fds=[writing],
            env=None if environment is None else dict(environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        # Only the launcher may hold the writing end, or the read below would never see its end.
        os.close(writing)
        writing = -1
        peak = os.read(reading, 64)
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    if done.returncode != 0 or not peak:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:].strip()}")
    # macOS counts in bytes, Linux in KiB.
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
