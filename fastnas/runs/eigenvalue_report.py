"""Reports the eigenvalue and an early stop of a search, and refuses what memory cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastnas.runs.eager_memory import eager_saved_bytes, free_bytes
from fastnas.search.config import ConfigError
from fastnas.search.early_stop import EarlyStop
from fastnas.search.searcher import Searcher

OVER_SAVED = 2.5
"""Peak of a measurement over what an eager step saves for backward on as many images: 1.8 to 2.4
was measured on the CPU, on spaces S0, S3 and nb201."""


def check_memory(searcher: Searcher) -> None:
    """Refuses an eigenvalue whose second derivatives will not fit into the free memory.

    They run by the reference and hold its graph twice, where a search step holds little: without
    this the first measurement would end a run that had gone well until then.

    Raises:
        ConfigError: it does not fit, by an estimate.
    """
    if not searcher.config.eigenvalue_every:
        return
    free = free_bytes(searcher.device)
    share = searcher.eigenvalue.images / searcher.train_batches.batch_size
    needed = OVER_SAVED * share * eager_saved_bytes(searcher)
    if free is not None and needed > free:
        raise ConfigError(
            f"eigenvalue_images is {searcher.eigenvalue.images}, which need about"
            f" {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free on {searcher.device}, for"
            f" at most {int(searcher.eigenvalue.images * free / needed)}"
        )


def eigenvalue_figures(searcher: Searcher) -> dict[str, Any]:
    """Returns what report.json says: the last value and where the search has stopped early."""
    measured = [figures for figures in searcher.history if "eigenvalue" in figures]
    stop = searcher.early_stop
    return {
        "eigenvalue": measured[-1]["eigenvalue"] if measured else None,
        "eigenvalue_images": searcher.eigenvalue.images if measured else None,
        "early_stop": None if stop is None else {**stop._asdict(), "epochs": searcher.epochs},
    }


def eigenvalue_lines(report: Mapping[str, Any]) -> list[str]:
    """Writes them for report.md, nothing where there is nothing to say."""
    lines: list[str] = []
    if report["early_stop"] is not None:
        stop = dict(report["early_stop"])
        text = EarlyStop(stop["decided"], stop["rollback"], stop["ratio"]).text(stop["epochs"])
        lines += [f"**The search {text}**, which the cell below is derived from.", ""]
    if report["eigenvalue"] is not None:
        lines += [
            f"Dominant eigenvalue of the Hessian in the logits: {report['eigenvalue']:.4f} at the"
            f" end, on {report['eigenvalue_images']} images of the logits"
            " ([history](history.png)).",
            "",
        ]
    return lines
