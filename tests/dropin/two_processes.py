"""Two processes under DistributedDataParallel, on gloo: what each of them ends with."""

from __future__ import annotations

from pathlib import Path

import torch
from compared import differences
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fastnas
from fastnas.benchmarks.layouts import LAYOUTS, Layout

WORLD = 2


class Called(nn.Module):
    """Calls a network as its code base does: DistributedDataParallel knows `forward` only."""

    def __init__(self, layout: Layout, network: nn.Module) -> None:
        super().__init__()
        self.name = layout.name
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return LAYOUTS[self.name].call(self.network, x)


def averaged(layout: Layout, rank: int, fuse: bool) -> dict[str, Tensor | None]:
    """Two steps, each on the process' own images: the second begins with the first's statistics."""
    torch.manual_seed(5)
    network = layout.build(4, 3, 2).double()
    for alphas in layout.alphas(network):
        alphas.data = torch.randn_like(alphas, dtype=torch.float64)
    if fuse:
        fastnas.accelerate(network)
    ddp = DistributedDataParallel(Called(layout, network), find_unused_parameters=True)
    images = torch.randn(WORLD, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3)).double()
    for seed in (1, 2):
        ddp.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        ddp(images[rank]).square().sum().backward()
    state: dict[str, Tensor | None] = {n: p.grad for n, p in network.named_parameters()}
    state |= {f"alphas {i}": a.grad for i, a in enumerate(layout.alphas(network))}
    return state | {f"buffer {name}": b for name, b in network.named_buffers()}


def work(rank: int, rendezvous: str, names: list[str], found: str) -> None:
    """Writes what differs on this process between networks that are accelerated and not."""
    torch.set_num_threads(1)
    store = f"file://{rendezvous}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    lines = []
    for name in names:
        given, expected = (averaged(LAYOUTS[name], rank, fuse) for fuse in (True, False))
        lines += [f"{name}: {text}" for text in differences(given, expected)[:3]]
        grads = [v for k, v in expected.items() if v is not None and not k.startswith("buffer")]
        if not grads or not all(g.isfinite().all() for g in grads):
            lines.append(f"{name}: no gradients to compare")
    Path(f"{found}.{rank}").write_text("\n".join(lines))
    distributed.destroy_process_group()


def differ(names: list[str], folder: Path) -> list[str]:
    """What differs on any of the two processes."""
    meeting, found = folder / "meeting", folder / "found"
    torch.multiprocessing.spawn(work, (str(meeting), names, str(found)), nprocs=WORLD)
    lines = [Path(f"{found}.{rank}").read_text().splitlines() for rank in range(WORLD)]
    return [line for of_rank in lines for line in of_rank]
