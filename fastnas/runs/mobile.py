"""Runs a whole search of the MobileNet-like space, as `fastnas.runs.search` does of cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fastnas.processes import joined
from fastnas.runs.columns import layer_table
from fastnas.runs.derived import check_derived
from fastnas.runs.mobile_compare import mobile_comparison
from fastnas.runs.report import (
    comparison_lines,
    cost_line,
    derived_lines,
    environment,
    header_lines,
    paid_line,
)
from fastnas.runs.whole_search import Answers, search_to_the_report
from fastnas.search.build import load_data, seeded
from fastnas.search.mobile_config import MobileConfig
from fastnas.search.mobile_searcher import MobileSearcher
from fastnas.search.progress import plain_console
from fastnas.search.run_folder import claimed_folder
from fastnas.spaces import MobileGenotype


def run_mobile_search(
    config: MobileConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Searches, trains the derived network shortly, compares with eager, reports.

    Leaves in config.out: config.json, search.pt and train.pt (checkpoints), genotype.json,
    column.png, column.svg, history.png, tensorboard logs, report.json, report.md.

    Args:
        resume: go on with the run that config.out holds, if any.

    Returns:
        What report.json holds.

    Raises:
        ConfigError, DataError, BackendError, CheckpointError, RunFolderError: with nothing
            overwritten.
    """
    with joined() as processes:
        console = console or plain_console(quiet=not processes.is_first)
        return _run_mobile_search(config, resume, console)


def _run_mobile_search(config: MobileConfig, resume: bool, console: Console) -> dict[str, Any]:
    # All that can be refused is refused here, before hours of search; the searcher seeds again, so
    # what reading the data draws is in no result.
    images = load_data(config, seeded(config))
    check_derived(config, images)
    searcher = MobileSearcher(config, images)
    with claimed_folder(config, resume, searcher) as out:
        answers = Answers(
            config.space,
            derive=searcher.genotype,
            found=lambda genotype: _found(searcher, genotype, console),
            text=lambda report, _: mobile_text(report),
            compare=lambda steps: _compared(searcher, steps),
        )
        return search_to_the_report(searcher, out, resume, console, answers)


def _compared(searcher: MobileSearcher, steps: int) -> dict[str, Any]:
    with searcher.on_backend():
        return mobile_comparison(searcher, steps)


def _found(searcher: MobileSearcher, genotype: MobileGenotype, console: Console) -> dict[str, Any]:
    """Returns what a report says of the search itself."""
    config, last, undecided = searcher.config, searcher.history[-1], searcher.undecided()
    if undecided.count:
        console.print(f"undecided: {undecided} are within the initial noise")
    return {
        "method": config.method,
        "space": config.space,
        "width": config.width,
        "stem_stride": config.stem_stride,
        "memory": config.memory,
        "data": config.data,
        "classes": list(searcher.images.class_names),
        "seed": config.seed,
        "epochs": searcher.epochs,
        "genotype": genotype.text,
        "undecided": str(undecided) if undecided.count else None,
        "collapsed": last["collapsed"],
        "skips": last["skips"],
        "supernet_accuracy": last["valid_accuracy"],
        "search_seconds": searcher.seconds,
        "backend": searcher.backend,
        "precision": config.precision,
        "cuda_graph": False,
        "environment": environment(searcher.device),
    }


def mobile_text(report: Mapping[str, Any]) -> str:
    """Writes report.md of a search of the MobileNet-like space."""
    lines = header_lines(report)
    lines += [
        f"Width {report['width']:g}, stem stride {report['stem_stride']}, memory"
        f" {report['memory']}. Accuracy of the supernet on the images of the logits:"
        f" {report['supernet_accuracy']:.4f}.",
        "",
    ]
    if report["collapsed"]:
        lines += [
            "**The search is collapsing**: more than half of the layers that may skip have been"
            " skips for three epochs. Its column will probably do badly.",
            "",
        ]
    if report["undecided"] is not None:
        lines += [f"**Undecided**: {report['undecided']} are within the initial noise.", ""]
    lines += comparison_lines(report)
    lines += ["## The column", "", cost_line(report), ""]
    lines += [paid_line(report), ""] if "cost" in report else []
    lines += [
        "![column](column.png)",
        "",
        *layer_table(report["layers"]),
        "",
        "```",
        report["genotype"],
        "```",
        "",
    ]
    return "\n".join([*lines, *derived_lines(report)])
