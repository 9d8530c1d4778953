"""Measures `accelerate` on networks in the layouts of public code bases, each beside itself.

    python -m fastnas.benchmarks.drop_in [OUT.csv] [--layouts darts sgas] [--only step,evaluation]

A row is a layout and a measure: a step in training, in evaluation mode, under autocast to bfloat16,
or the unrolled gradient of the logits; time and saved bytes of the network as it is and of an
accelerated copy, in turn (`drop_in_rows.Row`). Before its time is taken each is compared in
float64. Run again, it goes on with the rows that this commit lacks. Layouts that lose, or are not
served, have their rows like the others.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import fastnas
from fastnas.benchmarks.drop_in_rows import MEASURES, SETTINGS, Row
from fastnas.benchmarks.harness.memory import saved_bytes
from fastnas.benchmarks.harness.rows import read_rows, write_rows
from fastnas.benchmarks.harness.run import result_path
from fastnas.benchmarks.harness.schema import current_conditions
from fastnas.benchmarks.harness.timing import measure
from fastnas.benchmarks.layouts import LAYOUTS, Layout
from fastnas.benchmarks.layouts.architect import unrolled_gradients
from fastnas.benchmarks.layouts.counting import own_layers
from fastnas.benchmarks.layouts.skeleton import CLASSES
from fastnas.checks import short

LAYERS, NODES = 8, 4
VERIFIED_BATCH, VERIFIED_SIZE = 2, 16
"""Depthwise convolutions in float64 take torch a hundred times what they take in float32."""
SEED = 0


@dataclass
class Subject:
    """Holds a layout's network with its images, and makes what is measured.

    Args:
        network: an own copy, in the dtype of the images.
    """

    layout: Layout
    network: nn.Module
    images: Tensor
    measure: str = "step"

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.layout.alphas(self.network)]

    def run(self) -> list[Tensor | None]:
        """Makes one step, on the same noise each time, and returns what it computes."""
        torch.manual_seed(SEED)
        for leaf in self.leaves:
            leaf.grad = None
        if self.measure == "unrolled":
            return self._unrolled()
        self.network.train(self.measure != "evaluation")
        half = self.measure == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            y = self.layout.call(self.network, self.images)
        y.float().square().mean().backward() if half else y.square().mean().backward()
        return [y.detach(), *(leaf.grad for leaf in self.leaves), *self.network.buffers()]

    def _unrolled(self) -> list[Tensor | None]:
        self.network.train()
        labels = torch.arange(len(self.images)) % CLASSES

        def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.layout.call(network, images), labels)

        batch = self.images, labels
        return [*unrolled_gradients(self.network, loss, batch, batch)]

    def weighed(self) -> tuple[int, int]:
        """Returns what a step saves for backward, and the candidates' layers that torch runs."""
        exclude = [*self.leaves, *self.network.buffers()]
        with own_layers(self.layout.candidates(self.network)) as layers:
            saved = saved_bytes(self.run, exclude)
        return saved, layers.count


class Pair:
    """Holds a layout's network, an accelerated copy, and what each saves in a plain step.

    Raises:
        ValueError: `accelerate` found nothing.
    """

    def __init__(self, layout: Layout, given: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        network = layout.build(given.channels, given.layers or layout.layers or LAYERS, NODES)
        for alphas in layout.alphas(network):
            alphas.data = torch.randn(alphas.shape)
        images = torch.randn(given.batch, 3, given.size, given.size)
        self.eager = Subject(layout, network, images)
        self.fused = replace(self.eager, network=copy.deepcopy(network))
        fastnas.accelerate(self.fused.network)
        self.repeats = given.repeats

    @cached_property
    def eager_bytes(self) -> int:
        return self.eager.weighed()[0]

    def measured(self, what: str) -> dict[str, Any]:
        """Returns the figures of a row."""
        eager, fused = (replace(subject, measure=what) for subject in (self.eager, self.fused))
        if what == "bfloat16":  # eager's bfloat16 is no yardstick: it is slower than its float32
            found: dict[str, Any] = {"before_saved_bytes": self.eager_bytes}
            found["after_saved_bytes"], _ = fused.weighed()
            return found | self._times(self.fused.run, fused.run)
        apart = difference(*wide(eager, fused))
        (before, asked), (after, left) = eager.weighed(), fused.weighed()
        if what == "step":
            vars(self)["eager_bytes"] = before
        return {
            "before_saved_bytes": before,
            "after_saved_bytes": after,
            "candidate_layers": asked,
            "fused_share": round(1 - left / asked, 3),
            "differs": float(f"{apart:.1e}"),
            **self._times(eager.run, fused.run),
        }

    def _times(self, before: Callable[[], object], after: Callable[[], object]) -> dict[str, Any]:
        # Both have run once, to be weighed.
        calls = {"before": before, "after": after}
        times = measure(calls, repeats=self.repeats, warmup=0, device="cpu")
        return {f"{name}_ms": round(timing.median_ms, 1) for name, timing in times.items()}


def wide(eager: Subject, fused: Subject) -> tuple[Subject, Subject]:
    """Returns copies in float64 with a part of the images, in one state."""
    copies = copy.deepcopy(eager.network).double(), copy.deepcopy(fused.network).double()
    # Those that ran in float32 have running statistics that differ by its rounding.
    copies[1].load_state_dict(copies[0].state_dict())
    for network in copies:
        for alphas in eager.layout.alphas(network):
            alphas.data = alphas.data.double()
    images = eager.images[:VERIFIED_BATCH, :, :VERIFIED_SIZE, :VERIFIED_SIZE].double()
    first, second = (replace(eager, network=network, images=images) for network in copies)
    return first, second


def difference(eager: Subject, fused: Subject) -> float:
    """Returns the largest difference, of a tensor's largest value or of 1 if that is less.

    Where one has a gradient and the other none, they are infinitely far apart.
    """
    apart, threads = 0.0, torch.get_num_threads()
    # Small tensors are quicker on one thread, on a busy machine by far.
    torch.set_num_threads(1)
    pairs = list(zip(fused.run(), eager.run(), strict=True))
    torch.set_num_threads(threads)
    for a, b in pairs:
        if a is None or b is None:
            apart = max(apart, 0.0 if a is b else float("inf"))
        else:
            apart = max(apart, float((a - b).abs().max() / (1 + b.abs().max())))
    return apart


def measures_of(layout: Layout, wanted: Collection[str]) -> list[str]:
    """Lists what can be measured of a layout: unrolled is what has a method `new`."""
    kind = getattr(layout.build, "func", layout.build)
    return [m for m in MEASURES if m in wanted and (m != "unrolled" or hasattr(kind, "new"))]


def new_rows(layout: Layout, measures: Sequence[str], given: argparse.Namespace) -> Iterator[Row]:
    """Measures a layout, and yields each row as soon as it is known."""
    conditions = current_conditions("cpu")
    run = {name: getattr(conditions, name) for name in ("device", "torch", "commit", "time")}
    sizes = {name: getattr(given, name) for name in ("channels", "batch", "size", "threads")}
    fixed = {**sizes, **run, "layers": given.layers or layout.layers or LAYERS}
    empty = dict.fromkeys(Row.__annotations__) | {"layout": layout.name, "why": "", **fixed}
    try:
        pair = Pair(layout, given)
    except ValueError as error:
        why = str(error).splitlines()[0]
        yield from (Row(**{**empty, "measure": what, "why": why}) for what in measures)
        return
    for what in measures:
        found = pair.measured(what)
        found["speedup"] = round(found["before_ms"] / found["after_ms"], 2)
        before, after = found["before_saved_bytes"], found["after_saved_bytes"]
        found["saved_ratio"] = round(before / max(after, 1), 2)
        yield Row(**{**empty, "measure": what, **found})


def kept(path: Path, given: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Returns the rows that the file has already.

    Raises:
        ValueError: they are of other settings.
    """
    rows = read_rows(path, Row) if path.exists() else []
    now = {**vars(given), "device": current_conditions("cpu").device}
    for row in rows:
        for name in SETTINGS:
            if getattr(row, name) != now[name]:
                raise ValueError(
                    f"{path} has rows of {name} {getattr(row, name)}, this run is of {now[name]};"
                    " name another file"
                )
    return {row.case: row for row in rows}


def checked(option: str, names: str, allowed: Collection[str]) -> list[str]:
    """Splits names at commas, and refuses one that is none of the allowed."""
    found = [name for name in names.split(",") if name]
    for name in found:
        if name not in allowed:
            raise ValueError(f"{option} has {short(name)}; allowed: {', '.join(allowed)}")
    return found


def shown(found: Sequence[Row]) -> Table:
    """Lays the rows out, those that lose in bold."""
    columns = ("layout", "measure", "before_ms", "after_ms", "speedup", "saved_ratio")
    columns += ("fused_share", "differs", "why")
    table = Table(*columns)
    for row in found:
        values = (getattr(row, name) for name in columns)
        cells = ["" if value is None else str(value) for value in values]
        table.add_row(*cells, style="bold" if row.loses else None)
    return table


def run(given: argparse.Namespace) -> None:
    """Measures what is asked for and not there yet.

    Raises:
        ValueError: a name is unknown, or the file is of another run.
    """
    only, skip = (checked(name, getattr(given, name), MEASURES) for name in ("only", "skip"))
    layouts = checked("layouts", ",".join(given.layouts), LAYOUTS) or list(LAYOUTS)
    wanted = [name for name in only or MEASURES if name not in skip]
    conditions = current_conditions("cpu")
    path = given.csv or result_path(conditions, None, "drop-in", False)
    found = kept(path, given)
    for name in layouts:
        measures = [
            what
            for what in measures_of(LAYOUTS[name], wanted)
            if (name, what) not in found or found[name, what].commit != conditions.commit
        ]
        for row in new_rows(LAYOUTS[name], measures, given) if measures else ():
            found[row.case] = row
            write_rows(path, found.values(), Row)
            print(name, row.measure, row.speedup, row.saved_ratio, row.why, flush=True)
    Console().print(shown(list(found.values())))
    print(f"written: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="?", help="by default in benchmarks/results")
    parser.add_argument("--layouts", nargs="+", default=[], metavar="NAME", help="these alone")
    parser.add_argument("--only", default="", help=f"of {', '.join(MEASURES)}: these alone")
    parser.add_argument("--skip", default="", help="of the same: not these")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=None, help=f"{LAYERS}; NAS-Bench-201: 15")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        run(given)
    except ValueError as error:
        print(f"drop_in: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
