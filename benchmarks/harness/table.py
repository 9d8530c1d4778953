"""Prints the table of a run: times, ratios to eager, what was moved, multiplied, saved."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fastnas.benchmarks.harness.schema import Row, by_case, speedup
from fastnas.benchmarks.harness.timing import Roof
from fastnas.benchmarks.harness.verify import EAGER, YES


def print_rows(rows: Sequence[Row], roof: Roof, console: Console) -> None:
    """Prints times, ratio to eager, what was moved and saved; below, what has no time."""
    table = Table(title="fastnas bench", title_justify="left", caption_justify="left")
    for heading in ("case", "pass", "provider"):
        table.add_column(heading, no_wrap=True)
    for heading in ("median ms", "p20..p80", "x eager", "GB/s", "of copy", "GFMA/s", "of FMA"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("saved MiB", "peak MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for providers in by_case(rows).values():
        for row in providers.values():
            table.add_row(*_cells(row, providers.get(EAGER)))
        table.add_section()
    first = rows[0]
    driver = f", driver {first.driver}" if first.driver else ""
    table.caption = (
        f"{first.device}, {first.threads} threads, torch {first.torch}{driver}, fastnas"
        f" {first.fastnas} ({first.commit}), {first.time}\nMeasured in this run: copy"
        f" {_giga(roof.bandwidth)} GB/s, read and written; {_giga(roof.fma_rate)} GFMA/s in fp32."
        " x eager: above 1 is faster than eager. GB/s: the op's least traffic over the median."
    )
    console.print(table)
    for row in rows:
        if row.verified != YES:
            where = f"{row.op} {row.dtype} {row.shape} {row.pass_}, {row.backend}"
            console.print(f"{where}: {row.verified}", style="red" if row.is_red else "yellow")


def _cells(row: Row, eager: Row | None) -> list[str]:
    K = "" if row.K is None else f" K={row.K}"
    layout = "" if row.layout == "contiguous" else f" {row.layout}"
    names = [f"{row.op} {row.dtype} {row.shape}{K}{layout}", row.pass_, row.backend]
    if row.verified != YES:
        return [*names, "[red]wrong[/red]" if row.is_red else "not run"]
    ratio = speedup(row, eager)
    shown = "" if ratio is None else f"{ratio:.2f}"
    if ratio is not None and ratio < 1 and row.is_fastnas:
        shown = f"[red]slower {shown}[/red]"
    return [
        *names,
        "" if row.median_ms is None else f"{row.median_ms:.3f}",
        "" if row.median_ms is None else f"{row.p20_ms:.3f}..{row.p80_ms:.3f}",
        shown,
        "" if row.GBps is None else f"{row.GBps:.1f}",
        "" if row.copy_share is None else f"{row.copy_share:.0%}",
        "" if row.GFMAps is None else f"{row.GFMAps:.1f}",
        "" if row.fma_share is None else f"{row.fma_share:.0%}",
        _mebibytes(row.saved_bytes),
        _mebibytes(row.peak_bytes),
    ]


def _giga(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate / 1e9:.1f}"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"
