"""Measures the supernet of the MobileNet-like space by what it keeps for backward.

    python -m fastnas.benchmarks.mobilenet [OUT.csv] [--cases 64x2 224x16]

A case is a size of square images and a batch, a row one `memory` of `MobileNetSearchNetwork` in it:
a training step of all weights and logits, weighed, then timed in turn with the others by the
processor's time, which a busy machine changes little. "eager" keeps what the mixture keeps that
everybody writes, activations in place as in FairNAS' code. Where that would be more than `--most`,
it is not run: its bytes are counted on tensors without values.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fastnas.benchmarks.harness.memory import allocated_peak, saved_bytes
from fastnas.benchmarks.harness.readme import publish
from fastnas.benchmarks.harness.rows import write_rows
from fastnas.benchmarks.harness.run import result_path
from fastnas.benchmarks.harness.schema import current_conditions
from fastnas.checks import short
from fastnas.nn import MobileNetSearchNetwork
from fastnas.nn.choice import CHOICE_MEMORY
from fastnas.spaces import MobileSpace

CASES = ("64x2", "112x8", "224x16")
CLASSES = 1000
SPACE = MobileSpace()
MOST = 12.0
"""GiB beyond which eager is counted and not run."""
MIB, GIB = 2**20, 2**30
VERIFIED = SPACE.scaled(0.25)
"""What is compared in float64, on images of 32x32."""
BOUNDS = {"lean": (1.3, 2.5), "recompute": (1.6, 6.0)}
"""What a step is to take at most, in eager's, and how often eager's peak is to hold its own."""
BLOCK = "mobilenet"
"""The block of docs/mobilenet.md that `--page` replaces."""


@dataclass(frozen=True)
class Row:
    """Records a case and what is kept.

    `how` is "measured", or "counted": the step was not run, the time is NaN, and peak is what is
    saved. `ms` is the median of the processor's time, all threads together, `time_ratio` that over
    eager's, `peak_share` its peak over eager's. `differs` is the largest relative difference from
    eager in float64, of loss, gradients and buffers of a narrow network.
    """

    size: int
    batch: int
    memory: str
    how: str
    ms: float
    time_ratio: float
    saved_bytes: int
    peak_bytes: int
    peak_share: float
    differs: float
    threads: int
    device: str
    torch: str
    commit: str
    time: str


def case_of(text: str) -> tuple[int, int]:
    """Returns size and batch of a case, "224x16".

    Raises:
        ValueError: it is another text.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
    if not found:
        raise ValueError(f"case {short(text)}; SIZExBATCH is needed, such as 224x16")
    return int(found[1]), int(found[2])


def step(net: MobileNetSearchNetwork, x: Tensor, labels: Tensor) -> Tensor:
    """Makes a forward and a backward pass, into the gradients that are there."""
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    return loss.detach()


def differences() -> dict[str, float]:
    """Returns for each setting the largest difference from eager in two steps, in float64."""
    found: dict[str, list[Tensor]] = {}
    for memory in CHOICE_MEMORY:
        torch.manual_seed(0)
        net = MobileNetSearchNetwork(10, space=VERIFIED, memory=memory).double()
        x, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
        losses = [step(net, x, labels) for _ in range(2)]
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        found[memory] = [*losses, *grads, *net.buffers()]
    eager = found["eager"]
    return {
        memory: max(
            float((a - b).abs().max() / (1 + b.abs().max()))
            for a, b in zip(tensors, eager, strict=True)
        )
        for memory, tensors in found.items()
    }


def held(net: MobileNetSearchNetwork, x: Tensor) -> int:
    """Returns the bytes that autograd holds after forward, parameters and images apart."""
    return saved_bytes(lambda: net(x), [x, *net.parameters(), *net.buffers()])


def counted(size: int, batch: int) -> int:
    """Returns what eager holds after forward, from a forward pass without values."""
    with torch.device("meta"):
        net = MobileNetSearchNetwork(CLASSES, space=SPACE, memory="eager")
        return held(net, torch.empty(batch, 3, size, size))


def processor_times(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median of each call's processor time in ms, after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats + 1):
        # Each round begins with another, so that none follows the same one always.
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            start = process_time()
            calls[name]()
            if turn:
                times[name].append(1000 * (process_time() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def rows_of(size: int, batch: int, given: argparse.Namespace) -> Iterator[Row]:
    """Measures all settings in one case, on one network."""
    eager_saved = counted(size, batch)
    runs = [m for m in CHOICE_MEMORY if m != "eager" or eager_saved <= given.most * GIB]
    torch.manual_seed(0)
    net = MobileNetSearchNetwork(CLASSES, space=SPACE)
    x, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % CLASSES
    apart = differences()

    def call(memory: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            net.memory = memory
            return step(net, x, labels)

        return run

    call("minimal")()  # it makes the gradients, which are there in any case
    saved, peaks = {"eager": eager_saved}, {"eager": eager_saved}
    for memory in runs:
        net.memory = memory
        saved[memory] = held(net, x)
        peaks[memory] = allocated_peak(call(memory))
    times = processor_times({m: call(m) for m in runs}, given.repeats)
    ms = {m: times.get(m, math.nan) for m in CHOICE_MEMORY}
    conditions = current_conditions("cpu")
    for memory in CHOICE_MEMORY:
        yield Row(
            size=size,
            batch=batch,
            memory=memory,
            how="measured" if memory in runs else "counted",
            ms=round(ms[memory], 1),
            time_ratio=round(ms[memory] / ms["eager"], 3),
            saved_bytes=saved[memory],
            peak_bytes=peaks[memory],
            peak_share=round(peaks[memory] / peaks["eager"], 4),
            differs=float(f"{apart[memory]:.1e}"),
            **{n: getattr(conditions, n) for n in ("threads", "device", "torch", "commit", "time")},
        )


def shown(rows: Sequence[Row]) -> Table:
    """Lays the rows out."""
    columns = ("size", "batch", "memory", "how", "ms", "time_ratio", "saved_bytes", "peak_bytes")
    columns += ("peak_share", "differs")
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(getattr(row, name)) for name in columns))
    return table


def _misses(row: Row) -> tuple[bool, bool]:
    """Tells whether time or peak miss their bound."""
    time, share = BOUNDS.get(row.memory, (math.inf, 0.0))
    return row.time_ratio > time, bool(share) and row.peak_share > 1 / share


def figures(rows: Sequence[Row], source: str) -> str:
    """Returns a Markdown table with a line for each row; what misses its bound is bold."""
    lines = ["| images | memory | step, s | over eager's | held, MiB | peak, MiB | of eager's |"]
    lines.append("|---|---|" + "---:|" * 5)
    for row in rows:
        slow, large = ("**" if missed else "" for missed in _misses(row))
        is_timed, known = not math.isnan(row.ms), not math.isnan(row.time_ratio)
        cells = [
            f"{row.batch} of {row.size}x{row.size}",
            f'`"{row.memory}"`' + ("" if row.how == "measured" else ", counted"),
            f"{row.ms / 1000:.2f}" if is_timed else "-",
            f"{slow}{row.time_ratio:.2f}{slow}" if known else "-",
            f"{row.saved_bytes / MIB:,.0f}",
            f"{row.peak_bytes / MIB:,.0f}",
            "1" if row.memory == "eager" else f"{large}1/{1 / row.peak_share:.1f}{large}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    bounds = ", ".join(
        f'`"{memory}"` {time} times and 1/{share:g}' for memory, (time, share) in BOUNDS.items()
    )
    notes = (
        "A training step (forward and backward of all weights and logits) of the whole supernet"
        f" with {CLASSES} classes, float32, medians of the processor's time, in turn. Held is what"
        " autograd keeps after forward, peak the most that is allocated in the step; weights and"
        " gradients are apart."
        f" **Bold: beyond what was aimed at, {bounds}.** Results differ from eager's by at most"
        f" {max(row.differs for row in rows):.0e} in float64. {first.device}, {first.threads}"
        f" thread(s), torch {first.torch}, fastnas {first.commit}, {first.time[:10]}; generated"
        f" from `{source}`."
    )
    return "\n".join([*lines, "", notes])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="?", help="by default in benchmarks/results")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="SIZExBATCH")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=float, default=MOST, help="GiB that eager may hold")
    parser.add_argument("--page", type=Path, default=None, help="puts a table into its block")
    given = parser.parse_args(arguments)
    try:
        cases = [case_of(text) for text in given.cases]
    except ValueError as error:
        print(f"mobilenet: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(given.threads)
    path = given.csv or result_path(current_conditions("cpu"), None, "mobilenet", False)
    found: list[Row] = []
    for size, batch in cases:
        found += rows_of(size, batch, given)
        write_rows(path, found, Row)
    source = f"benchmarks/results/{path.name}"
    publish(path, shown(found), given.page, BLOCK, figures(found, source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
