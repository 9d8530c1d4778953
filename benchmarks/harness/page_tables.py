"""Writes rows of results as the Markdown tables of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence

from fastnas.benchmarks.harness.schema import Row, by_case, speedup
from fastnas.benchmarks.harness.verify import EAGER

FULL = ("eager", "fastnas")
BASELINES = (
    *(EAGER, "eager-channels-last", "eager-best", "compile", "compile-nchw", "compile-max"),
    *("checkpoint", "eager-graph", "eager-best-graph", "compile-graph", "compile-nchw-graph"),
    *("compile-max-graph", "compile-cell", "compile-cell-graph"),
)
PASSES = ("fwd+bwd", "step", "saved")


def figures(rows: Sequence[Row], source: str) -> str:
    """Returns the full table: how many times faster than each baseline, slower ones in bold."""
    # A baseline that was not run gets no column.
    baselines = [name for name in BASELINES if any(row.backend == name for row in rows)]
    headings = ["case", "provider", *(f"x {name}" for name in baselines)]
    headings += ["of copy bandwidth", "saved, of eager"]
    lines = [f"| {' | '.join(headings)} |", "|---|---|" + "---:|" * (len(baselines) + 2)]
    for providers in by_case([row for row in rows if row.suite != "paths"]).values():
        for row in providers.values():
            if _is_shown(row, providers):
                lines.append(_line(row, providers, baselines))
    notes = (
        "How many times faster, forward and backward or the whole search step, and every single"
        " pass that loses to a baseline; **bold: slower**."
        f" {conditions(rows[0])}; medians of one run, providers in turn, each result checked"
        " against fp64 first. Eager is the public DARTS code, its step with all gradients; gdas"
        f" and rome are single paths of it; generated from `{source}`."
    )
    return "\n".join([*lines, "", notes])


def path_figures(rows: Sequence[Row]) -> str:
    """Returns the table of single-path steps beside the full supernet's, in units of eager GDAS."""
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
            # A graph saves nothing that can be seen from outside, so its cells stay empty.
            known = value is not None and whole
            cells.append(f"{value / unit:,.0f}" if known else "")  # type: ignore[operator]
            cells.append(f"{value / whole:.2f}" if known else "")  # type: ignore[operator]
        lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(dict.fromkeys(row.commit for row in [*steps, *full]))
    notes = (
        f"{gdas.op.partition(' ')[2]}, {gdas.shape} {gdas.dtype}, {gdas.device},"
        f" {gdas.threads} threads; a step moves logits and weights. Every step draws afresh: the"
        f" medians are over samples, the bytes are one sample's. fastnas {commits}."
    )
    return "\n".join([*lines, "", notes])


def conditions(row: Row) -> str:
    """Returns what the figures of a row's run depend on, as a part of a sentence."""
    return (
        f"{row.device}, {row.threads} threads, torch {row.torch}, fastnas {row.commit},"
        f" {row.time[:10]}"
    )


def case_name(row: Row) -> str:
    """Returns the op, dtype and shape of a row, and its pass where that is not the usual one."""
    K = f" K={row.K}" if row.suite == "ops" and row.K is not None else ""
    layout = "" if row.layout == "contiguous" else f" {row.layout.replace('_', ' ')}"
    pass_ = "" if row.pass_ in PASSES else f", {row.pass_} alone"
    return f"{row.op} {row.dtype} {row.shape}{K}{layout}{pass_}"


def ratio(row: Row, baseline: Row | None) -> str:
    """Returns how many times faster a row is, bold where it is slower, empty where unknown."""
    times = speedup(row, baseline)
    if times is None:
        return ""
    return f"{times:.2f}" if times >= 1 else f"**{times:.2f}**"


def saved_share(row: Row, eager: Row | None) -> str:
    """Returns the memory kept for backward as a share of eager's, empty where it is not known."""
    if eager is None or not eager.saved_bytes or row.saved_bytes is None:
        return ""
    return f"{row.saved_bytes / eager.saved_bytes:.2f}"


def _line(row: Row, providers: dict[str, Row], baselines: Sequence[str]) -> str:
    cells = [case_name(row), row.backend]
    cells += [ratio(row, providers.get(name)) for name in baselines]
    cells.append("" if row.copy_share is None else f"{row.copy_share:.0%}")
    cells.append(saved_share(row, providers.get(EAGER)))
    return "| " + " | ".join(cells) + " |"


def _is_shown(row: Row, providers: dict[str, Row]) -> bool:
    if row.pass_ == "saved":
        return row.backend != EAGER
    # A single pass is left out of the page, unless it loses: what loses is never hidden.
    return row.is_fastnas and (row.pass_ in PASSES or _loses(row, providers))


def _loses(row: Row, providers: dict[str, Row]) -> bool:
    ratios = (speedup(row, providers.get(name)) for name in BASELINES)
    return any(times is not None and times < 1 for times in ratios)
