"""The benchmark tables of the README, generated: python -m fastnas.benchmarks.harness.readme CSV"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastnas.benchmarks.harness.plot import case_label, conditions_sentence
from fastnas.benchmarks.harness.schema import Row, by_case, read_csv, speedup
from fastnas.benchmarks.harness.verify import EAGER
from fastnas.search.files import write_text

BEGIN = "<!-- figures:begin -->"
END = "<!-- figures:end -->"
WHOLE_PASSES = ("fwd+bwd", "step")
LOSS = "**loses**"
MIB = 2**20


def block(csvs: Sequence[Path]) -> str:
    """The markdown of some CSVs, one table for each.

    Of every case the whole pass (fwd+bwd, or the step); of the others (fwd, bwd) those in which
    fastnas loses against any baseline, and those that were not verified or did not run.
    """
    return "\n\n".join(_section(read_csv(csv)) for csv in csvs)


def _section(rows: Sequence[Row]) -> str:
    table = [
        "| case | pass | fastnas vs eager | best other vs eager | fastnas vs best other"
        " | saved MiB: eager, fastnas |",
        "|---|---|---|---|---|---|",
    ]
    for providers in by_case(rows).values():
        line = _line(providers)
        if line is not None:
            table.append(line)
    notes = [
        f"- {case_label(row)}, {row.pass_}, {row.backend}: {row.verified}"
        for row in rows
        if row.median_ms is None
    ]
    legend = (
        "Above 1 is faster. fastnas is what `auto` picks. Best other is the fastest of the other"
        " baselines in the same run: tuned eager, `torch.compile`, checkpointing. All whole passes"
        f" are shown, and every single pass in which fastnas is slower than a baseline ({LOSS})."
    )
    parts = [conditions_sentence(rows), legend, "\n".join(table)]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def _line(providers: dict[str, Row]) -> str | None:
    """The row of a case and pass; None for a single pass that fastnas wins."""
    eager = providers.get(EAGER)
    ours = next((row for row in providers.values() if row.is_fastnas), None)
    others = [
        row
        for row in providers.values()
        if not row.is_fastnas and row.backend != EAGER and row.median_ms is not None
    ]
    if eager is None or ours is None:
        return None
    best = min(others, key=lambda row: row.median_ms or 0.0, default=None)
    over_eager = speedup(ours, eager)
    over_best = None if best is None else speedup(ours, best)
    ratios = [ratio for ratio in (over_eager, over_best) if ratio is not None]
    loses = any(ratio < 1 for ratio in ratios)
    if ours.pass_ not in WHOLE_PASSES and ratios and not loses:
        return None
    best_over_eager = None if best is None else speedup(best, eager)
    name = "" if best is None else f" ({best.backend})"
    cells = [
        case_label(ours),
        ours.pass_,
        _ratio(over_eager),
        _ratio(best_over_eager) + name,
        _ratio(over_best),
        f"{_mebibytes(eager.saved_bytes)}, {_mebibytes(ours.saved_bytes)}",
    ]
    return f"| {' | '.join(cells)} |"


def _ratio(value: float | None) -> str:
    if value is None:
        return "no time"
    return f"{value:.2f} {LOSS}" if value < 1 else f"{value:.2f}"


def _mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / MIB:.1f}"


def replace_block(text: str, new: str, where: str = "README.md") -> str:
    """The text with what is between the markers replaced.

    Raises:
        ValueError: unless each marker is there once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{where} needs one line {BEGIN} and below it one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def update(csvs: Sequence[Path], readme: Path, check: bool = False) -> bool:
    """Bring the README up to date, or with `check` only look; True if it was up to date."""
    text = readme.read_text(encoding="utf-8")
    new = replace_block(text, block(csvs), str(readme))
    if new != text and not check:
        write_text(readme, new)
    return new == text


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if --check finds the README stale, 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m fastnas.benchmarks.harness.readme",
        description="Regenerate the benchmark tables of a README from CSVs.",
    )
    parser.add_argument("csv", nargs="+", type=Path, help="one table each, in this order")
    parser.add_argument("readme", nargs="?", type=Path, help="by default README.md")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    options = parser.parse_args(arguments)
    files = [*options.csv, *([options.readme] if options.readme else [])]
    csvs = [path for path in files if path.suffix == ".csv"]
    readmes = [path for path in files if path.suffix != ".csv"] or [Path("README.md")]
    if not csvs or len(readmes) > 1:
        parser.error("give one or more .csv files and at most one README")
    try:
        current = update(csvs, readmes[0], options.check)
    except (OSError, ValueError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    if options.check and not current:
        print(f"{readmes[0]} is stale: run the command without --check", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
