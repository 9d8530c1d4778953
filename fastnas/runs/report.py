"""Writes report.json and report.md: what a run found, and on what grounds."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastnas._version import __version__
from fastnas.files import write_text
from fastnas.processes import here
from fastnas.runs.eigenvalue_report import eigenvalue_lines
from fastnas.search.gradient_run import GradientRun
from fastnas.spaces import AnyGenotype, layout_of

logger = logging.getLogger("fastnas")

REPORT_JSON = "report.json"
REPORT_MD = "report.md"
COSTS = (
    ("parameters", 1, 0, "parameters"),
    ("latency_seconds", 1e-3, 2, "ms of latency"),
    ("training_seconds", 1, 0, "s of training"),
)
"""What a table may know of a cell (`Lookup.score`): its name, unit, digits, and words."""


def device_name(device: torch.device) -> str:
    """Names the processor of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Lists what the figures of a run depend on besides its config."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": here().size,
        "torch": torch.__version__,
        "fastnas": __version__,
    }


def write_report(out: Path, report: Mapping[str, Any], text: str) -> None:
    # The JSON comes first: where the disk is full in between, the figures are those that stay.
    write_text(out / REPORT_JSON, json.dumps(report, indent=2) + "\n")
    write_text(out / REPORT_MD, text)


def cell_table(genotype: AnyGenotype) -> list[str]:
    """Returns a genotype as a Markdown table, one row for each node."""
    layout = layout_of(genotype)
    lines = ["| cell | node | edges (operation from node) |", "|---|---|---|"]
    for cell, nodes in layout.cells(genotype).items():
        for node, edges in enumerate(nodes, layout.inputs):
            text = ", ".join(f"{op} from {source}" for op, source in edges) or "none"
            lines.append(f"| {cell} | {node} | {text} |")
    return lines


def cost_line(report: Mapping[str, Any]) -> str:
    """Writes the figures of `cost_figures` as a sentence."""
    network = report["network"]
    channels, *size = network["image"]
    return (
        f"Network of {', '.join(f'{n} {v}' for n, v in network.items() if n != 'image')}:"
        f" {report['parameters']:,} parameters, {report['macs']:,} multiply-adds for an image of"
        f" {channels}x{'x'.join(map(str, size))}, {report['latency_ms']:.2f} ms for one"
        f" ({report['latency_device']}, {report['latency_threads']} threads,"
        f" {report['latency_precision']}; median)."
    )


def paid_cost(searcher: GradientRun, derived: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the target of the cost, what the logits expected of it at the end, and what it is.

    Args:
        derived: the figures of the derived network (`cost_figures`).
    """
    if searcher.cost is None:
        return {}
    (kind, target), weight = searcher.cost.target, searcher.cost.weight
    expected = searcher.history[-1][f"expected_{kind}"]
    figure: float = derived[COST_FIGURES[kind]]
    if figure > target:
        logger.warning(
            "fastnas: what was derived costs %.6g %s, more than the target of %.6g; longer searches"
            " and a larger cost_weight bring it nearer",
            figure, COST_UNITS[kind], target,
        )  # fmt: skip
    found = {"kind": kind, "target": target, "weight": weight, "expected": expected}
    return {"cost": {**found, "derived": figure}}


COST_FIGURES = {"macs": "macs", "params": "parameters", "latency": "latency_ms"}
COST_UNITS = {"macs": "multiply-adds", "params": "parameters", "latency": "ms"}


def paid_line(report: Mapping[str, Any]) -> str:
    """Writes what the search paid for."""
    cost = report["cost"]
    unit = COST_UNITS[cost["kind"]]
    timed = ""
    if cost["kind"] == "latency":
        env = report["environment"]
        timed = f", candidates timed on {env['device']}, {env['threads']} threads"
    return (
        f"The logits paid for more than {cost['target']:,.6g} {unit}, with weight"
        f" {cost['weight']:g}; at the end they expected {cost['expected']:,.6g}{timed}."
        f" What is derived costs {cost['derived']:,.6g}"
        f"{'' if cost['derived'] <= cost['target'] else ': **the target is not met**'}."
    )


def distribution_table(shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns cell type to operation to share as a Markdown table, and an empty line."""
    lines = ["| cell | operation | share |", "|---|---|---:|"]
    for cell, row in shares.items():
        lines += [f"| {cell} | {op} | {share:.3f} |" for op, share in row.items()]
    return [*lines, ""]


def search_text(report: Mapping[str, Any], genotype: AnyGenotype) -> str:
    """Writes report.md of a search: settings, comparison, and last the cell and its accuracy."""
    lines = header_lines(report)
    if report["collapsed"]:
        lines += [
            "**The search is collapsing**: more than half of the normal cell's edges have been"
            " skip connections for three epochs. Its cell will probably do badly.",
            "",
        ]
    lines += eigenvalue_lines(report)
    for cell, choices in report["undecided"].items():
        lines += [f"**Undecided**: {choices} of the {cell} cell are within the initial noise.", ""]
    lines += comparison_lines(report)
    lines += ["## The cell", "", "![cell](cell.png)", "", *cell_table(genotype), ""]
    lines += ["```", report["genotype"], "```", ""]
    if "distribution" in report:
        lines += ["drawn from the distribution", "", *distribution_table(report["distribution"])]
    if "genotype_by_skip_cap" in report:
        lines += ["## By the most skips of the normal cell", "", *_capped_lines(report), ""]
    lines += [cost_line(report), ""]
    lines += [paid_line(report), ""] if "cost" in report else []
    lines += table_lines(report["table"] or {})
    return "\n".join([*lines, *derived_lines(report)])


def header_lines(report: Mapping[str, Any]) -> list[str]:
    """Writes what was searched, where and for how long."""
    env = report["environment"]
    return [
        f"# {report['method']} on {report['data']}, space {report['space']}",
        "",
        f"{report['epochs']} epochs in {report['search_seconds']:.0f} s, seed {report['seed']},"
        f" {report['precision']}, backend {report['backend']}"
        f"{', CUDA graphs' if report['cuda_graph'] else ''},"
        f" {env['device']}, {env['threads']} threads,"
        f" torch {env['torch']}, fastnas {env['fastnas']}.",
        "",
    ]


def derived_lines(report: Mapping[str, Any]) -> list[str]:
    """Writes the accuracy of the derived network, where it was trained."""
    if report["test_accuracy"] is None:
        return []
    return [
        f"Test accuracy of the derived network: **{report['test_accuracy']:.4f}**"
        f" ({report['train_epochs']} epochs, {report['train_seconds']:.0f} s;"
        f" {report['test_images']} held-back images).",
        "",
    ]


def _capped_lines(report: Mapping[str, Any]) -> list[str]:
    """Writes P-DARTS' cells, those of several caps once."""
    caps: dict[str, list[str]] = {}
    for cap, text in report["genotype_by_skip_cap"].items():
        caps.setdefault(text, []).append(cap)
    return [f"- {', '.join(of_text)}: `{text}`" for text, of_text in caps.items()]


def comparison_lines(report: Mapping[str, Any]) -> list[str]:
    """Writes the step beside eager's, or why it was not compared."""
    if report["not_compared"] is not None:
        return ["## Beside eager", "", f"Not compared: {report['not_compared']}.", ""]
    # A report is written before the comparison as well, when these figures are not there yet.
    if report["step_speedup_vs_eager"] is None:
        return []
    return [
        "## Beside eager",
        "",
        "One first-order search step, measured in this run, eager as the public code writes it:",
        "",
        "| | eager | fastnas | eager / fastnas |",
        "|---|---|---|---|",
        f"| step | {1e3 * report['eager_step_seconds']:.0f} ms"
        f" | {1e3 * report['step_seconds']:.0f} ms"
        f" | {report['step_speedup_vs_eager']:.2f} |",
        f"| saved for backward | {report['eager_saved_bytes'] / 2**20:.1f} MiB"
        f" | {report['saved_bytes'] / 2**20:.1f} MiB"
        f" | {report['saved_bytes_ratio_vs_eager']:.2f} |",
        "",
    ]


def table_lines(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Writes what `Lookup.score` says of a cell, a paragraph for each column."""
    return [
        text
        for column, score in scores.items()
        for text in (
            f"{column} in the table: **{score['accuracy']:.4f}**, rank {score['rank']}; its best"
            f" cell has {score['best']:.4f}, so the regret is {score['regret']:.4f}."
            f"{_costs(score)}",
            "",
        )
    ]


def _costs(score: Mapping[str, float]) -> str:
    """Writes what a table knows of a cell's costs, empty where it knows nothing."""
    told = [
        f"{score[name] / unit:,.{digits}f} {text}"
        for name, unit, digits, text in COSTS
        if name in score
    ]
    return f" The cell costs {', '.join(told)}." if told else ""


def study_text(report: Mapping[str, Any]) -> str:
    """Writes report.md of a black-box search."""
    lines = [
        f"# {report['method']} on {report['evaluator']}",
        "",
        f"{report['evaluations']} evaluations ({_epochs(report['evaluation_epochs'])}"
        f"{report['evaluation_seconds']:.0f} s), seed {report['seed']}.",
        "",
        "![best so far](progress.png)",
        "",
        "## The cell",
        "",
        "```",
        report["genotype"],
        "```",
        "",
    ]
    if report["distribution"] is not None:
        lines += ["drawn from the distribution", "", *distribution_table(report["distribution"])]
    lines += [cost_line(report), ""] if "macs" in report else []
    lines.append(f"Accuracy that the search saw: {report['accuracy']:.4f}.")
    lines += ["", "![distributions tried](simplex.png)", ""]
    lines += table_lines(report["reported"] or {})
    return "\n".join(lines)


def _epochs(epochs: float) -> str:
    """Writes the epochs of training, empty where there were none or nobody knows how many."""
    return f"{epochs:.0f} epochs of training, " if epochs else ""


def train_text(report: Mapping[str, Any], table: Sequence[str]) -> str:
    """Writes report.md of a training.

    Args:
        table: what was trained.
    """
    env = report["environment"]
    return "\n".join(
        [
            f"# A genotype trained on {report['data']}",
            "",
            f"{report['epochs']} epochs in {report['train_seconds']:.0f} s, seed {report['seed']},"
            f" {report['precision']}, {env['device']}, {env['threads']} threads,"
            f" torch {env['torch']}, fastnas {env['fastnas']}.",
            "",
            *table,
            "",
            "```",
            report["genotype"],
            "```",
            "",
            cost_line(report),
            "",
            f"Test accuracy: **{report['test_accuracy']:.4f}**"
            f" ({report['test_images']} held-back images).",
            "",
        ]
    )
