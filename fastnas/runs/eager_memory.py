"""Tells, before it runs, whether the eager step of a search fits into the free memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas import reference
from fastnas.nn import count_parameters
from fastnas.saved_bytes import saved_bytes
from fastnas.search.searcher import Searcher
from fastnas.strategies.single_path import SinglePath

OVER_SAVED = 1.35
"""Peak of an eager step over what it saves for backward: gradients of activations and what the
ops need for themselves. 1.07 to 1.33 was measured on the CPU."""
PARAMS_COPIES = 4
"""Of an eager network's parameters: themselves, gradients, momentum, and those of the optimizer's
step."""
CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in versions 2 and 1 of control groups."""


def eager_saved_bytes(searcher: Searcher) -> int:
    """Returns what one pass of the eager network will hold for its backward pass.

    The shapes of a training batch are followed through the network on the device "meta", which
    allocates and computes nothing; what autograd saves there is what it saves in a real pass. Of a
    single-path method it is the path of the candidates with most parameters, which hold most.
    """
    device, strategy = torch.device("meta"), searcher.strategy
    kind = strategy.eager_networks[searcher.space.layout]
    # The network is built on "meta" as well, and draws its weights there: the run's generators must
    # not move, or asking would change what comes after.
    size = searcher.train_batches.batch_size
    # There is no autocast on "meta", so the network itself is of the dtype that it casts to.
    dtype = searcher.precision.dtype or torch.float32
    with torch.random.fork_rng([]), device:
        network = searcher.build(kind).train().to(dtype)
        images = torch.empty(size, *searcher.images.shape, dtype=dtype)
        labels = torch.zeros(size, dtype=torch.int64)
    space = network.space
    weights: Mapping[str, Any] = {
        cell: torch.empty(
            len(space.edges),
            space.num_candidates(cell),
            device=device,
            dtype=dtype,
            requires_grad=True,
        )
        for cell in space.cell_types
    }
    if isinstance(strategy, SinglePath):
        edges = strategy.likeliest(searcher.arch)
        weights = {
            cell: reference.HardWeights(h, _heaviest(network, cell, edges[cell].cpu()))
            # The values of h do not matter on "meta"; the choices are real numbers on the host,
            # because they decide which modules run.
            for cell, h in weights.items()
        }

    def forward() -> None:
        F.cross_entropy(network(images, weights), labels)

    return saved_bytes(forward, exclude=[*network.parameters(), *network.buffers(), images])


def _heaviest(network: reference.SearchNetwork, cell: str, edges: Tensor) -> Tensor:
    """Returns each edge's candidate of most parameters [E], -1 where `edges` has no edge."""
    dag = next((dag for dag in network.dags() if dag.cell_type == cell), None)
    if dag is None:  # a network too short for cells of that type
        return edges
    sizes = [[count_parameters(op) for op in cast(reference.MixedOp, e)._ops] for e in dag._ops]
    heaviest = torch.tensor([row.index(max(row)) for row in sizes])
    return torch.where(edges < 0, -1, heaviest)


def why_eager_does_not_fit(searcher: Searcher) -> str | None:
    """Says why an eager step would not fit into the device's free memory; None where it does.

    None also where the system does not tell how much is free.
    """
    return why_not_fitting(lambda: eager_saved_bytes(searcher), searcher.network, searcher.device)


def why_not_fitting(
    saved: Callable[[], int], network: nn.Module, device: torch.device
) -> str | None:
    """Says the same of an eager step by what it saves, and the network whose parameters it has."""
    free = free_bytes(device)
    if free is None:
        return None
    # The fused and the eager network have the same parameters, so no eager one is built for real.
    params = sum(p.numel() * p.itemsize for p in network.parameters())
    needed = int(OVER_SAVED * saved()) + PARAMS_COPIES * params
    if needed <= free:
        return None
    return (
        f"the eager step needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        f" on {device}"
    )


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Returns what memory the process can still get on the device; None where nothing tells.

    On the CPU it is what Linux holds to be available, at most what the container has left.

    Args:
        root: of the file system that tells.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        # What torch's allocator has reserved and not given out is free for this process, though the
        # system counts it as taken.
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    # /proc/meminfo counts in KiB.
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    # In a container /proc/meminfo tells of the whole machine, and the process is killed at the
    # limit.
    for limit, used in CGROUPS:
        left = _left(root / "sys/fs/cgroup" / limit, root / "sys/fs/cgroup" / used)
        found += [] if left is None else [left]
    return min(found, default=None)


def _left(limit: Path, used: Path) -> int | None:
    """Returns what a container's memory has left; None without a container or a limit ("max")."""
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        return None
