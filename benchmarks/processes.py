"""Measures search steps of several processes beside one process with as many threads.

    python -m fastnas.benchmarks.processes [OUT.csv] [--groups 1x2 2x1]

A group is a number of processes and the threads of each. All make the same step of the DARTS search
network, on batches of the same size together. Groups run in turn, each anew in every round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.table import Table

from fastnas.benchmarks.harness.readme import publish
from fastnas.benchmarks.harness.rows import write_rows
from fastnas.benchmarks.harness.run import result_path
from fastnas.benchmarks.harness.schema import current_conditions
from fastnas.checks import short
from fastnas.data.dataset import Images
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.searcher import Searcher

GROUPS = ("1x2", "2x1")
CASES = (("darts", "batches", 1), ("rome", "batches", 4), ("rome", "samples", 4))
"""Method, what the processes share, and samples of a half of a step."""
BLOCK = "processes"
"""The block of docs/processes.md that `--page` replaces."""
CLASSES = 10


@dataclass(frozen=True)
class Row:
    """Records a group in a case: `ms` is the median of a step, `speed` that of the first group
    over it, both of the wall clock."""

    method: str
    spread: str
    samples: int
    processes: int
    threads_each: int
    batch: int
    ms: float
    images_per_second: float
    speed: float
    device: str
    torch: str
    commit: str
    time: str


class Work(NamedTuple):
    """Says what each process of a group does.

    Attributes:
        folder: where they meet, and leave their times.
    """

    method: str
    spread: str
    samples: int
    batch: int
    channels: int
    layers: int
    steps: int
    size: int
    threads: int
    folder: str


def group_of(text: str) -> tuple[int, int]:
    """Returns processes and threads of a group, "2x1".

    Raises:
        ValueError: it is another text.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,2})x([1-9][0-9]{0,2})", text)
    if not found:
        raise ValueError(f"group {short(text)}; PROCESSESxTHREADS is needed, such as 2x1")
    return int(found[1]), int(found[2])


def steps_of_process(rank: int, work: Work) -> None:
    """Makes steps and leaves their seconds; runs in each process."""
    torch.set_num_threads(work.threads)
    if work.size > 1:
        meeting = f"file://{work.folder}/meeting"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=work.size)
    settings = {
        "method": work.method,
        "spread": work.spread,
        "channels": work.channels,
        "layers": work.layers,
        "batch_size": work.batch,
        "threads": work.threads,
        "device": "cpu",
        **({"samples": work.samples} if work.samples > 1 else {}),
    }
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * work.batch, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.arange(len(images)) % CLASSES
    data = Images("noise", images, labels, images[:CLASSES], labels[:CLASSES], CLASSES)
    searcher = Searcher(make_config(SearchConfig, settings), data)
    searcher.start_epoch()
    seconds = []
    for _ in range(work.steps + 1):
        searcher.processes.wait()
        started = perf_counter()
        searcher.run_step()
        searcher.processes.wait()
        seconds.append(perf_counter() - started)
    if rank == 0:
        torch.save(seconds[1:], f"{work.folder}/seconds.pt")
    if work.size > 1:
        dist.destroy_process_group()


def seconds_of(work: Work) -> list[float]:
    """Returns what the steps of a group took."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = work._replace(folder=folder)
        started = [
            spawn.Process(target=steps_of_process, args=(rank, given)) for rank in range(work.size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise RuntimeError(f"a process of {work.size} has ended with an error")
        found: list[float] = torch.load(f"{folder}/seconds.pt")
        return found


def rows_of(given: argparse.Namespace, groups: Sequence[tuple[int, int]]) -> list[Row]:
    """Measures all groups in all cases."""
    conditions = current_conditions("cpu")
    rows = []
    for method, spread, samples in CASES:
        taken: dict[tuple[int, int], list[float]] = {group: [] for group in groups}
        for turn in range(given.rounds):
            # Both orders, as a neighbour of the machine may come or go.
            for size, threads in groups if turn % 2 else reversed(groups):
                work = Work(
                    method, spread, samples, given.batch, given.channels, given.layers,
                    given.steps, size, threads, "",
                )  # fmt: skip
                taken[size, threads] += seconds_of(work)
        medians = {group: statistics.median(seconds) for group, seconds in taken.items()}
        for size, threads in groups:
            median = medians[size, threads]
            rows.append(
                Row(
                    method, spread, samples, size, threads, given.batch, round(1000 * median, 1),
                    # A step takes a batch for the logits and one for the weights.
                    round(2 * given.batch / median, 1), round(medians[groups[0]] / median, 3),
                    conditions.device, conditions.torch, conditions.commit, conditions.time,
                )
            )  # fmt: skip
    return rows


def shown(rows: Sequence[Row]) -> Table:
    """Lays the rows out."""
    columns = ("method", "spread", "samples", "processes", "threads_each", "ms", "speed")
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(getattr(row, name)) for name in columns))
    return table


def figures(rows: Sequence[Row], source: str) -> str:
    """Returns a Markdown table with a line for each row; a group that is slower is bold."""
    lines = ["| method | processes share | processes x threads | images/s | speed |"]
    lines.append("|---|---|---|" + "---:|" * 2)
    for row in rows:
        slow = "**" if row.speed < 1 else ""
        what = row.method + (f", {row.samples} samples" if row.samples > 1 else "")
        group = f"{row.processes} x {row.threads_each}"
        speed = f"{slow}{row.speed:.2f}{slow}"
        lines.append(f"| {what} | {row.spread} | {group} | {row.images_per_second:.0f} | {speed} |")
    first = rows[0]
    notes = (
        f"Search steps on batches of {first.batch} images of 32x32, medians of the wall clock,"
        f" groups in turn; speed is over the first group's. {first.device}, torch {first.torch},"
        f" fastnas {first.commit}, {first.time[:10]}; generated from `{source}`."
    )
    return "\n".join([*lines, "", notes])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="?", help="by default in benchmarks/results")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), metavar="PROCESSESxTHREADS")
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="in each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--page", type=Path, default=None, help="puts a table into its block")
    given = parser.parse_args(arguments)
    try:
        groups = [group_of(text) for text in given.groups]
    except ValueError as error:
        print(f"processes: {error}", file=sys.stderr)
        return 2
    rows = rows_of(given, groups)
    path = given.csv or result_path(current_conditions("cpu"), None, "processes", False)
    write_rows(path, rows, Row)
    source = f"benchmarks/results/{path.name}"
    publish(path, shown(rows), given.page, BLOCK, figures(rows, source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
