"""Measures `fastnas.nn.Choice` beside the mixture written out, on three families of candidates.

    python -m fastnas.benchmarks.choice [OUT.csv] [--families mbconv graph] [--counts 2 7]

A row is a family, a number of candidates K and a provider: "eager" (the mixture as everybody writes
it), "checkpoint" (`torch.utils.checkpoint` around all of it), and `Choice` by its `memory`. Its
forward and backward pass in training is compared with eager's in float64, weighed, and timed in
turn with the others. Memory is put beside that of the largest candidate alone.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastnas.benchmarks.choice_families import FAMILIES, Family
from fastnas.benchmarks.harness.memory import allocated_peak, saved_bytes
from fastnas.benchmarks.harness.readme import publish
from fastnas.benchmarks.harness.rows import write_rows
from fastnas.benchmarks.harness.run import result_path
from fastnas.benchmarks.harness.schema import current_conditions
from fastnas.benchmarks.harness.timing import measure
from fastnas.checks import short
from fastnas.nn.choice import CHOICE_MEMORY, Choice

PROVIDERS = ("eager", "checkpoint", "lean", "recompute", "minimal")
COUNTS = (2, 4, 7, 12)
VERIFIED = 0.05
"""The share of the inputs that is compared in float64."""
SEED = 0
LONGEST = 1.5
"""The most that a step of "recompute" is to take, in eager's."""
BLOCK = "choice"
"""The block of docs/choice.md that `--page` replaces."""


@dataclass(frozen=True)
class Row:
    """Records a family, a number of candidates and a provider, in forward and backward.

    `time_ratio` is the median of its time over eager's in the same round, `saved_ratio` what
    autograd holds after forward over what it holds of the largest candidate alone, `peak_ratio` the
    same of the most that is allocated at any moment of the step, gradients apart. `differs` is
    the largest relative difference from eager in float64, of output, gradients and buffers.
    """

    family: str
    candidates: int
    provider: str
    ms: float
    time_ratio: float
    saved_bytes: int
    saved_ratio: float
    peak_bytes: int
    peak_ratio: float
    differs: float
    threads: int
    device: str
    torch: str
    commit: str
    time: str


@dataclass
class Subject:
    """Holds candidates, what they are called with, and how they are mixed."""

    ops: nn.ModuleDict
    args: tuple[Any, ...]
    w: Tensor
    provider: str

    def __post_init__(self) -> None:
        if self.provider in CHOICE_MEMORY[1:]:
            self.choice = Choice(self.ops, memory=self.provider)

    def output(self) -> Tensor:
        if self.provider == "eager":
            return mixture(self.ops, self.w, *self.args)
        if self.provider == "checkpoint":
            y: Tensor = checkpoint(mixture, self.ops, self.w, *self.args, use_reentrant=False)
            return y
        return self.choice(*self.args, w=self.w)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.w, self.args[0], *self.ops.parameters()]

    def step(self) -> Tensor:
        """Makes a forward and a backward pass, into the gradients that are there."""
        y = self.output()
        y.square().mean().backward()
        return y.detach()

    def results(self) -> list[Tensor]:
        y = self.step()
        return [y, *(leaf.grad for leaf in self.leaves if leaf.grad is not None)]

    def weighed(self) -> tuple[int, int]:
        """Returns the bytes saved by forward, and the most allocated in a step."""
        exclude = [self.w, *self.ops.parameters(), *self.ops.buffers()]
        saved = saved_bytes(self.output, exclude)
        self.step()  # it makes the gradients, which are there in any case
        return saved, allocated_peak(self.step)


def mixture(ops: Mapping[str, nn.Module], w: Tensor, *args: Any) -> Tensor:
    """y = sum_k w_k o_k(x), as everybody writes it."""
    y: Tensor = sum(w_k * op(*args) for w_k, op in zip(w, ops.values()))  # type: ignore[assignment]
    return y


def subject(family: Family, count: int, provider: str, dtype: torch.dtype, scale: float) -> Subject:
    """Makes the same candidates and arguments for each provider."""
    torch.manual_seed(SEED)
    ops = nn.ModuleDict(family.candidates(count)).to(dtype)
    w = torch.randn(count, dtype=dtype).softmax(0).requires_grad_()
    x, *rest = family.inputs(scale)
    return Subject(ops, (x.to(dtype).requires_grad_(), *rest), w, provider)


def difference(a: Subject, b: Subject) -> float:
    """Returns the largest difference of results, of a tensor's largest value or of 1 if less.

    The checkpoint of the whole mixture moves statistics twice: buffers are left out of its row.
    """
    pairs = list(zip(a.results(), b.results(), strict=True))
    if a.provider != "checkpoint":
        pairs += list(zip(a.ops.buffers(), b.ops.buffers(), strict=True))
    return max(float((x - y).abs().max() / (1 + y.abs().max())) for x, y in pairs)


def largest_alone(made: Subject) -> tuple[int, int]:
    """Returns what the largest candidate saves alone, and the most that its step allocates."""
    found = []
    for name, op in made.ops.items():
        alone = nn.ModuleDict({name: copy.deepcopy(op)})
        found.append(_Alone(alone, made.args, made.w[:1].detach(), "alone").weighed())
    saved, peaks = zip(*found)
    return max(saved), max(peaks)


class _Alone(Subject):
    """Runs one candidate, without a weight."""

    def output(self) -> Tensor:
        (op,) = self.ops.values()
        # An identity would have no graph.
        y: Tensor = op(*self.args)
        return y


def rows_of(name: str, count: int, given: argparse.Namespace) -> Iterator[Row]:
    """Measures the providers on so many candidates of a family."""
    family, conditions = FAMILIES[name], current_conditions("cpu")
    made = {p: subject(family, count, p, torch.float32, given.scale) for p in PROVIDERS}
    saved_alone, peak_alone = largest_alone(made["eager"])
    small = {p: subject(family, count, p, torch.float64, VERIFIED) for p in PROVIDERS}
    apart = {"eager": 0.0}
    for p in PROVIDERS[1:]:
        eager = subject(family, count, "eager", torch.float64, VERIFIED)
        apart[p] = difference(small[p], eager)
    weighed = {p: made[p].weighed() for p in PROVIDERS}
    calls: dict[str, Callable[[], object]] = {p: made[p].step for p in PROVIDERS}
    times = measure(calls, repeats=given.repeats, warmup=1, device="cpu")
    for p in PROVIDERS:
        saved, peak = weighed[p]
        yield Row(
            family=name,
            candidates=count,
            provider=p,
            ms=round(times[p].median_ms, 2),
            time_ratio=round(times[p].median_ms / times["eager"].median_ms, 3),
            saved_bytes=saved,
            saved_ratio=round(saved / saved_alone, 3),
            peak_bytes=peak,
            peak_ratio=round(peak / peak_alone, 3),
            differs=float(f"{apart[p]:.1e}"),
            **{n: getattr(conditions, n) for n in ("threads", "device", "torch", "commit", "time")},
        )


def shown(rows: Sequence[Row]) -> Table:
    """Lays the rows out, those that take over `LONGEST` times eager's time in bold."""
    columns = ("family", "candidates", "provider", "ms", "time_ratio", "saved_ratio", "peak_ratio")
    columns += ("differs",)
    table = Table(*columns)
    for row in rows:
        style = "bold" if row.time_ratio > LONGEST else None
        table.add_row(*(str(getattr(row, name)) for name in columns), style=style)
    return table


def figures(rows: Sequence[Row], source: str) -> str:
    """Returns a Markdown table with a line for each mixture; what takes over 1.5 times is bold."""
    shown = [p for p in PROVIDERS if p != "eager"]
    heads = [f"{p}: time, saved, peak" for p in shown]
    lines = [f"| candidates | eager: ms, saved, peak | {' | '.join(heads)} |"]
    lines.append("|---|" + "---:|" * (len(heads) + 1))
    cases = {(row.family, row.candidates, row.provider): row for row in rows}
    for family, count in dict.fromkeys((row.family, row.candidates) for row in rows):
        eager = cases[family, count, "eager"]
        cells = [f"{eager.ms:,.0f}, {eager.saved_ratio:.2f}, {eager.peak_ratio:.2f}"]
        for provider in shown:
            row = cases[family, count, provider]
            mark = "**" if row.time_ratio > LONGEST else ""
            cells.append(
                f"{mark}{row.time_ratio:.2f}{mark}, {row.saved_ratio:.2f}, {row.peak_ratio:.2f}"
            )
        lines.append(f"| {count} {family} | {' | '.join(cells)} |")
    first = rows[0]
    notes = (
        "Forward and backward in training, float32, medians in turn. Time is over eager's; saved is"
        " what autograd holds after forward, peak the most that is allocated in the step, both over"
        f" those of the largest candidate alone. **Bold: over {LONGEST} times.** Results differ"
        f" from eager's by at most {max(row.differs for row in rows):.0e} in float64. checkpoint is"
        f" torch's around the whole mixture. {first.device}, {first.threads} thread(s), torch"
        f" {first.torch}, fastnas {first.commit}, {first.time[:10]}; generated from `{source}`."
    )
    return "\n".join([*lines, "", notes])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="?", help="by default in benchmarks/results")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), metavar="K")
    parser.add_argument("--scale", type=float, default=1.0, help="of the inputs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, default=None, help="puts a table into its block")
    given = parser.parse_args(arguments)
    for name in given.families:
        if name not in FAMILIES:
            print(f"choice: family {short(name)}; allowed: {', '.join(FAMILIES)}", file=sys.stderr)
            return 2
    torch.set_num_threads(given.threads)
    path = given.csv or result_path(current_conditions("cpu"), None, "choice", False)
    found: list[Row] = []
    for name in given.families:
        for count in given.counts:
            if 1 <= count <= FAMILIES[name].most:
                found += rows_of(name, count, given)
                write_rows(path, found, Row)
    source = f"benchmarks/results/{path.name}"
    publish(path, shown(found), given.page, BLOCK, figures(found, source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
