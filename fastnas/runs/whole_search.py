"""Takes a search from its first step to its report: what runs of cells and of columns share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from rich.console import Console

from fastnas.report.curves import draw_history
from fastnas.runs.compare import uncompared
from fastnas.runs.derived import derived_cost, train_derived
from fastnas.runs.genotype import leave_genotype, next_step
from fastnas.runs.report import REPORT_MD, paid_cost, write_report
from fastnas.search.gradient_run import GradientRun
from fastnas.search.progress import stage
from fastnas.spaces.mobile_genotype import Architecture

G = TypeVar("G", bound=Architecture)


class Answers(NamedTuple, Generic[G]):
    """Says what is a kind of search's own.

    Attributes:
        space: what is searched, as it is announced.
        derive: returns what was found, after the last epoch.
        found: returns what the report says of the search itself.
        text: returns report.md of a report.
        compare: times so many steps beside eager's.
    """

    space: str
    derive: Callable[[], G]
    found: Callable[[G], dict[str, Any]]
    text: Callable[[Mapping[str, Any], G], str]
    compare: Callable[[int], dict[str, Any]]


def search_to_the_report(
    searcher: GradientRun, out: Path, resume: bool, console: Console, answers: Answers[G]
) -> dict[str, Any]:
    """Searches, leaves what was found, trains its network shortly, compares, reports.

    Of several processes the first one writes and compares; the others return before that.

    Args:
        out: the folder of the run, claimed.
        resume: go on with the training that it holds, if any.

    Returns:
        What report.json holds.
    """
    config, is_first = searcher.config, searcher.processes.is_first
    console.print(f"searching {answers.space} on {config.data} with {config.method}", style="bold")
    # A search that was done already returns at once, and the stages after it go on.
    searcher.search(out, console)
    genotype = answers.derive()
    if is_first:
        leave_genotype(out, genotype, f"{config.method} on {config.data}")
        draw_history(searcher.history, out / "history.png")
    derived = derived_cost(searcher, genotype)
    report: dict[str, Any] = {
        **answers.found(genotype),
        **derived,
        **paid_cost(searcher, derived),
        **train_derived(config, genotype, searcher.images, out, resume, console),
        **uncompared("it did not end" if config.compare_steps else None),
    }
    if not is_first:
        return report
    # It is written first: eager may need more memory than there is, and the system then kills the
    # process.
    write_report(out, report, answers.text(report, genotype))
    if config.compare_steps:
        with stage(console, f"timing {config.compare_steps} steps beside eager"):
            report |= answers.compare(config.compare_steps)
        write_report(out, report, answers.text(report, genotype))
    console.print(f"\nreport: {out / REPORT_MD}")
    console.print(next_step(config, report, out))
    return report
