"""Profiles our own kernels: `python -m fastnas.benchmarks.profile OUT.csv`.

A step of the default network, then single mixed ops; cases, kernels and units are those of the
model that counts instructions (`fastnas.benchmarks.model`), which predictions hold beside it.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fastnas.benchmarks.harness.kernels import Kernel, profiled
from fastnas.benchmarks.harness.schema import refuse_existing
from fastnas.benchmarks.model.recorded import mixed_op_case, step_case
from fastnas.benchmarks.model.step import mixed_op, search_step
from fastnas.benchmarks.ops.mixed_sum import STAGES
from fastnas.benchmarks.search.providers import DTYPES
from fastnas.files import write_text

BATCH = 64
CALLS = 5
SHOWN = 16
COLUMNS = ("case", "kernel", "calls", "us")

Work = Callable[[], object]


def cases(batch: int, dtype: str, device: str = "cuda") -> Iterator[tuple[str, Work]]:
    """Builds one case after the other; the mixed ops are those of the recorded model, in fp32."""
    yield step_case(batch, dtype), search_step(batch, DTYPES[dtype], device)
    for stage in STAGES:
        shape = (BATCH, *stage)
        yield mixed_op_case(shape), mixed_op(shape, device=device)


def written(path: Path, works: Iterable[tuple[str, Work]]) -> Iterator[tuple[str, list[Kernel]]]:
    """Profiles the cases; the file has every case that is done, whenever the run ends."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    for case, work in works:
        found = profiled(work, CALLS)
        writer.writerows((case, k.name, f"{k.calls:g}", f"{k.us:.3f}") for k in found)
        write_text(path, text.getvalue())
        yield case, found


def lines(case: str, found: Sequence[Kernel]) -> Iterator[str]:
    """Writes the kernels that take most as a Markdown table."""
    total = sum(kernel.calls * kernel.us for kernel in found)
    yield f"{case}: {total / 1e3:.2f} ms in kernels"
    yield from ("", "| kernel | calls | us of one | share |", "|---|---|---|---|")
    for name, calls, us, _ in found[:SHOWN]:
        yield f"| `{name[:90]}` | {calls:g} | {us:.1f} | {calls * us / total:.1%} |"
    yield ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("profile: torch finds no CUDA device", file=sys.stderr)
        return 2
    try:
        refuse_existing(given.out)
    except FileExistsError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2
    for case, found in written(given.out, cases(given.batch, given.dtype)):
        print(*lines(case, found), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
