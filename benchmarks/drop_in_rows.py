"""Defines the rows of the benchmark of `accelerate`, and their table on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEASURES = ("step", "evaluation", "bfloat16", "unrolled")
SETTINGS = ("channels", "batch", "size", "threads", "device")
"""What the rows of one file have in common."""


@dataclass(frozen=True)
class Row:
    """Records one layout and measure. Empty fields (None) were not measured.

    "step" is forward and backward in training, "evaluation" that in evaluation mode, "unrolled" the
    second-order gradient of the logits; before are the network's own forwards, after is what
    `accelerate` makes of them. Of "bfloat16", the step under autocast, `before_ms` is that of the
    accelerated network in float32, and `before_saved_bytes` those of its own forwards in float32.

    `differs` is the largest relative difference of what the two compute in float64, `why` says why
    nothing was measured.
    """

    layout: str
    measure: str
    before_ms: float | None
    after_ms: float | None
    speedup: float | None
    before_saved_bytes: int | None
    after_saved_bytes: int | None
    saved_ratio: float | None
    candidate_layers: int | None
    fused_share: float | None
    differs: float | None
    why: str
    channels: int
    layers: int
    batch: int
    size: int
    threads: int
    device: str
    torch: str
    commit: str
    time: str

    @property
    def case(self) -> tuple[str, str]:
        return self.layout, self.measure

    @property
    def loses(self) -> bool:
        return self.speedup is None or self.speedup < 1


HEADS = (
    *("layout", "ms", "accelerated", "x", "saved, MiB", "accelerated", "x", "fused"),
    *("evaluation, x", "bf16, x of fp32 accelerated", "bf16, saved of eager fp32", "unrolled, x"),
)


def figures(rows: Sequence[Row], source: str) -> str:
    """Returns a Markdown table with a line for each layout; what is slower is bold."""
    cases = {row.case: row for row in rows}
    lines = [f"| {' | '.join(HEADS)} |", "|---|" + "---:|" * (len(HEADS) - 1)]
    for layout in dict.fromkeys(row.layout for row in rows):
        found = [cases.get((layout, measure)) for measure in MEASURES]
        lines.append(f"| {' | '.join([layout, *_cells(*found)])} |")
    first, commits = rows[0], ", ".join(dict.fromkeys(row.commit for row in rows))
    sizes = ", ".join(str(n) for n in dict.fromkeys(row.layers for row in rows))
    refused = {f"{row.layout}: {row.why}" for row in rows if row.why}
    notes = (
        f"{first.channels} channels, {sizes} cells, {first.batch} images of {first.size} x"
        f" {first.size}, forward and backward, medians in turn; unrolled is the second-order"
        " gradient of the logits. Fused is the share of the candidates' layers that run fused."
        f" **Bold: slower**; empty: not measured. {first.device}, {first.threads} threads, torch"
        f" {first.torch}, fastnas {commits}, {first.time[:10]}; generated from `{source}`."
    )
    return "\n".join([*lines, "", notes, *sorted(refused)])


def _cells(
    step: Row | None, evaluation: Row | None, half: Row | None, unrolled: Row | None
) -> list[str]:
    cells = [""] * 7
    if step is not None and step.speedup is not None:
        mib = [(saved or 0) / 2**20 for saved in (step.before_saved_bytes, step.after_saved_bytes)]
        cells = [f"{step.before_ms:,.0f}", f"{step.after_ms:,.0f}", _times(step)]
        cells += [f"{mib[0]:,.1f}", f"{mib[1]:,.1f}", f"{step.saved_ratio:.1f}"]
        cells += [f"{step.fused_share:.0%}"]
    saved = "" if half is None or not half.saved_ratio else f"{1 / half.saved_ratio:.2f}"
    return [*cells, _times(evaluation), _times(half), saved, _times(unrolled)]


def _times(row: Row | None) -> str:
    if row is None or row.speedup is None:
        return ""
    return f"**{row.speedup:.2f}**" if row.loses else f"{row.speedup:.2f}"
