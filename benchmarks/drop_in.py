"""Measures `accelerate` on networks in the layouts of public code bases, each beside itself.

    python -m fastnas.benchmarks.drop_in OUT.csv [--layout darts ...]

A row is a layout: forward and backward of the network as it is and of an accelerated copy, timed
in turn, with what either keeps for backward, and the share of candidates' layers that run fused.
Before that, both make one step in fp64, from which `differs` has the largest relative difference of
output and gradients. Layouts on which `accelerate` loses have their row like the others; one that
it does not serve has the reason in it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastnas
from fastnas.benchmarks.harness.memory import saved_bytes
from fastnas.benchmarks.harness.schema import current_conditions
from fastnas.benchmarks.harness.timing import measure
from fastnas.benchmarks.layouts import LAYOUTS, Layout
from fastnas.benchmarks.layouts.counting import layers_of
from fastnas.files import write_text

LAYERS, NODES = 8, 4
SEED = 0

Row = dict[str, Any]


class Subject:
    """Holds a layout's network and its images, and makes steps.

    Args:
        network: an own copy, in the dtype of the images.
    """

    def __init__(self, layout: Layout, network: nn.Module, images: Tensor) -> None:
        self.layout = layout
        self.network = network
        self.images = images
        self.leaves = [*network.parameters(), *layout.alphas(network)]

    def step(self) -> Tensor:
        """Runs forward and backward; noise is the same in every step."""
        for leaf in self.leaves:
            leaf.grad = None
        torch.manual_seed(SEED)
        y = self.layout.call(self.network, self.images)
        y.square().mean().backward()
        return y.detach()

    def results(self) -> list[Tensor | None]:
        return [self.step(), *(leaf.grad for leaf in self.leaves)]


def build(layout: Layout, given: argparse.Namespace, dtype: torch.dtype) -> Subject:
    torch.manual_seed(SEED)
    network = layout.build(given.channels, given.layers or layout.layers or LAYERS, NODES).to(dtype)
    for alphas in layout.alphas(network):
        alphas.data = torch.randn(alphas.shape, dtype=dtype)
    batch = min(given.batch, 4) if dtype == torch.float64 else given.batch
    images = torch.randn(batch, 3, given.size, given.size, dtype=dtype)
    return Subject(layout, network, images)


def accelerated(subject: Subject) -> Subject:
    network = copy.deepcopy(subject.network)
    fastnas.accelerate(network)
    return Subject(subject.layout, network, subject.images)


def difference(layout: Layout, given: argparse.Namespace) -> float:
    """Returns the largest difference in fp64, of a tensor's largest value or of 1 if that is less.

    Where one has a gradient and the other none, they are infinitely far apart.
    """
    eager = build(layout, given, torch.float64)
    fused = accelerated(eager)
    apart = 0.0
    for a, b in zip(fused.results(), eager.results()):
        if a is None or b is None:
            apart = max(apart, 0.0 if a is b else float("inf"))
        else:
            apart = max(apart, float((a - b).abs().max() / (1 + b.abs().max())))
    return apart


def rows(names: Sequence[str], given: argparse.Namespace) -> Iterator[Row]:
    for name in names:
        layout = LAYOUTS[name]
        row: Row = {"layout": name}
        try:
            row |= {"differs": f"{difference(layout, given):.1e}", **measured(layout, given)}
        except ValueError as error:  # `accelerate` found nothing
            row |= {"why": str(error).splitlines()[0]}
        yield row


def measured(layout: Layout, given: argparse.Namespace) -> Row:
    eager = build(layout, given, torch.float32)
    fused = accelerated(eager)
    asked, left = (layers_of(layout.candidates(s.network), s.step) for s in (eager, fused))
    times = measure(
        {"eager": eager.step, "accelerated": fused.step},
        repeats=given.repeats,
        warmup=1,
        device="cpu",
    )
    saved = {
        what: saved_bytes(subject.step, [*subject.leaves, *subject.network.buffers()])
        for what, subject in (("eager", eager), ("accelerated", fused))
    }
    medians = {what: timing.median_ms for what, timing in times.items()}
    return {
        "eager_ms": round(medians["eager"], 1),
        "accelerated_ms": round(medians["accelerated"], 1),
        "speedup": round(medians["eager"] / medians["accelerated"], 2),
        "eager_saved_bytes": saved["eager"],
        "accelerated_saved_bytes": saved["accelerated"],
        "saved_ratio": round(saved["eager"] / max(saved["accelerated"], 1), 1),
        "candidate_layers": asked,
        "fused_share": round(1 - left / asked, 3),
    }


COLUMNS = (
    *("layout", "eager_ms", "accelerated_ms", "speedup", "eager_saved_bytes"),
    *("accelerated_saved_bytes", "saved_ratio", "candidate_layers", "fused_share", "differs"),
    *("why", "channels", "layers", "batch", "size", "threads", "device", "torch", "commit"),
)


def write(path: Path, found: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_text(path, text.getvalue())


def shown(found: Sequence[Row]) -> Table:
    """Lays the rows out, those that lose in bold."""
    columns = ("layout", "eager_ms", "accelerated_ms", "speedup", "saved_ratio", "fused_share")
    table = Table(*columns, "why")
    for row in found:
        loses = row.get("speedup") is None or row["speedup"] < 1
        cells = [str(row.get(name, "")) for name in (*columns, "why")]
        table.add_row(*cells, style="bold" if loses else None)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="one row per layout; written after each")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="may be repeated")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=None, help=f"{LAYERS}; NAS-Bench-201: 15")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    conditions = current_conditions("cpu")
    found: list[Row] = []
    for row in rows(given.layout or list(LAYOUTS), given):
        layers = given.layers or LAYOUTS[row["layout"]].layers or LAYERS
        settings = {name: vars(given)[name] for name in ("channels", "batch", "size", "threads")}
        run = {name: getattr(conditions, name) for name in ("device", "torch", "commit")}
        found.append({**row, **settings, "layers": layers, **run})
        write(given.csv, found)
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    Console().print(shown(found))


if __name__ == "__main__":
    main()
