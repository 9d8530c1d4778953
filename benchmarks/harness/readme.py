"""The figures of README.md from a CSV: `python -m fastnas.benchmarks.harness.readme CSV ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastnas.benchmarks.harness.schema import Row, by_case, read_csv, speedup
from fastnas.benchmarks.harness.verify import EAGER
from fastnas.files import write_text

FIGURES, PATHS = "figures", "paths"
"""Blocks of the README, between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
FULL = ("eager", "fastnas")
BASELINES = (
    *(EAGER, "eager-channels-last", "eager-best", "compile", "compile-nchw", "compile-max"),
    *("checkpoint", "eager-graph", "eager-best-graph", "compile-graph", "compile-nchw-graph"),
    *("compile-max-graph", "compile-cell", "compile-cell-graph"),
)
PASSES = ("fwd+bwd", "step", "saved")


def figures(rows: Sequence[Row], source: str) -> str:
    """Markdown: how many times faster than each baseline, slower ones in bold."""
    baselines = [name for name in BASELINES if any(row.backend == name for row in rows)]
    headings = ["case", "provider", *(f"x {name}" for name in baselines)]
    headings += ["of copy bandwidth", "saved, of eager"]
    lines = [f"| {' | '.join(headings)} |", "|---|---|" + "---:|" * (len(baselines) + 2)]
    for providers in by_case([row for row in rows if row.suite != "paths"]).values():
        for row in providers.values():
            if _is_shown(row, providers):
                lines.append(_line(row, providers, baselines))
    first = rows[0]
    conditions = (
        "How many times faster, forward and backward or the whole search step, and every single"
        " pass that loses to a baseline; **bold: slower**."
        f" {first.device}, {first.threads} threads, torch {first.torch}, fastnas {first.commit},"
        f" {first.time[:10]}; medians of one run, providers in turn, each result checked against"
        f" fp64 first. Eager is the public DARTS code, its step with all gradients; gdas and rome"
        f" are single paths of it;"
        f" generated from `{source}`."
    )
    return "\n".join([*lines, "", conditions])


def path_figures(rows: Sequence[Row]) -> str:
    """Markdown: the step of single paths beside the full supernet's, in units of eager GDAS."""
    steps = [row for row in rows if row.suite == "paths" and row.median_ms is not None]
    gdas = next(row for row in steps if row.backend == EAGER)
    full = [
        row
        for row in rows
        if row.suite == "search" and row.shape == gdas.shape and row.backend in FULL
    ]
    lines = [
        "| step | ms | of eager GDAS | saved, MiB | of eager GDAS |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in [*steps, *full]:
        name = "eager-gdas" if row is gdas else row.backend
        cells = [f"full supernet, {name}" if row in full else name]
        for value, unit, whole in (
            (row.median_ms, 1, gdas.median_ms),
            (row.saved_bytes, 2**20, gdas.saved_bytes),
        ):
            known = value is not None and whole
            cells.append(f"{value / unit:,.0f}" if known else "")  # type: ignore[operator]
            cells.append(f"{value / whole:.2f}" if known else "")  # type: ignore[operator]
        lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(dict.fromkeys(row.commit for row in [*steps, *full]))
    conditions = (
        f"{gdas.op.partition(' ')[2]}, {gdas.shape} {gdas.dtype}, {gdas.device},"
        f" {gdas.threads} threads; a step moves logits and weights. Every step draws afresh: the"
        f" medians are over samples, the bytes are one sample's. fastnas {commits}."
    )
    return "\n".join([*lines, "", conditions])


def _line(row: Row, providers: dict[str, Row], baselines: Sequence[str]) -> str:
    K = f" K={row.K}" if row.suite == "ops" and row.K is not None else ""
    layout = "" if row.layout == "contiguous" else f" {row.layout.replace('_', ' ')}"
    pass_ = "" if row.pass_ in PASSES else f", {row.pass_} alone"
    cells = [f"{row.op} {row.dtype} {row.shape}{K}{layout}{pass_}", row.backend]
    cells += [_ratio(row, providers.get(name)) for name in baselines]
    cells.append("" if row.copy_share is None else f"{row.copy_share:.0%}")
    eager = providers.get(EAGER)
    known = eager is not None and eager.saved_bytes and row.saved_bytes is not None
    cells.append(f"{row.saved_bytes / eager.saved_bytes:.2f}" if known else "")  # type: ignore
    return "| " + " | ".join(cells) + " |"


def _is_shown(row: Row, providers: dict[str, Row]) -> bool:
    if row.pass_ == "saved":
        return row.backend != EAGER
    return row.is_fastnas and (row.pass_ in PASSES or _loses(row, providers))


def _loses(row: Row, providers: dict[str, Row]) -> bool:
    ratios = (speedup(row, providers.get(name)) for name in BASELINES)
    return any(ratio is not None and ratio < 1 for ratio in ratios)


def _ratio(row: Row, baseline: Row | None) -> str:
    ratio = speedup(row, baseline)
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def updated(text: str, name: str, block: str) -> str:
    """README text with the block between its markers replaced; ValueError without markers."""
    begin_marker, end_marker = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not begin or not end:
        raise ValueError(f"the README has no {begin_marker} ... {end_marker}")
    return f"{before}{begin_marker}\n{block}\n{end_marker}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csvs", type=Path, nargs="+", help="results of one device")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--check", action="store_true", help="fail if the README is stale")
    given = parser.parse_args(arguments)
    try:
        text = given.readme.read_text()
        rows = [row for csv in given.csvs for row in read_csv(csv)]
        source = "`, `".join(csv.as_posix() for csv in given.csvs)
        fresh = updated(text, FIGURES, figures(rows, source))
        if any(row.suite == "paths" for row in rows):
            fresh = updated(fresh, PATHS, path_figures(rows))
    except (OSError, ValueError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    if given.check:
        if text != fresh:
            print(f"readme: {given.readme} is not what {source} gives", file=sys.stderr)
        return int(text != fresh)
    write_text(given.readme, fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
