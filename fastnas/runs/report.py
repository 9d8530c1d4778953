"""Writes report.json and report.md: what a run found, and on what grounds."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastnas._version import __version__
from fastnas.files import write_text
from fastnas.processes import here
from fastnas.runs.eigenvalue_report import eigenvalue_lines
from fastnas.spaces import AnyGenotype, layout_of

REPORT_JSON = "report.json"
REPORT_MD = "report.md"


def environment(device: torch.device) -> dict[str, Any]:
    """Lists what the figures of a run depend on besides its config."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
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


def distribution_table(shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns cell type to operation to share as a Markdown table, and an empty line."""
    lines = ["| cell | operation | share |", "|---|---|---:|"]
    for cell, row in shares.items():
        lines += [f"| {cell} | {op} | {share:.3f} |" for op, share in row.items()]
    return [*lines, ""]


def search_text(report: Mapping[str, Any], genotype: AnyGenotype) -> str:
    """Writes report.md of a search: settings, comparison, and last the cell and its accuracy."""
    env = report["environment"]
    lines = [
        f"# {report['method']} on {report['data']}, space {report['space']}",
        "",
        f"{report['epochs']} epochs in {report['search_seconds']:.0f} s, seed {report['seed']},"
        f" backend {report['backend']}{', CUDA graphs' if report['cuda_graph'] else ''},"
        f" {env['device']}, {env['threads']} threads,"
        f" torch {env['torch']}, fastnas {env['fastnas']}.",
        "",
    ]
    if report["collapsed"]:
        lines += [
            "**The search is collapsing**: more than half of the normal cell's edges have been"
            " skip connections for three epochs. Its cell will probably do badly.",
            "",
        ]
    lines += eigenvalue_lines(report)
    for cell, choices in report["undecided"].items():
        lines += [f"**Undecided**: {choices} of the {cell} cell are within the initial noise.", ""]
    lines += _comparison_lines(report)
    lines += ["## The cell", "", "![cell](cell.png)", "", *cell_table(genotype), ""]
    lines += ["```", report["genotype"], "```", ""]
    if "distribution" in report:
        lines += ["drawn from the distribution", "", *distribution_table(report["distribution"])]
    lines += table_lines(report["table"] or {})
    if report["test_accuracy"] is not None:
        lines += [
            f"Test accuracy of the derived network: **{report['test_accuracy']:.4f}**"
            f" ({report['train_epochs']} epochs, {report['parameters']:,} parameters,"
            f" {report['train_seconds']:.0f} s; {report['test_images']} held-back images).",
            "",
        ]
    return "\n".join(lines)


def _comparison_lines(report: Mapping[str, Any]) -> list[str]:
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
    """Writes what `TableEvaluator.score` says of a cell, a paragraph for each column."""
    return [
        text
        for column, score in scores.items()
        for text in (
            f"{column} in the table: **{score['accuracy']:.4f}**, rank {score['rank']}; its best"
            f" cell has {score['best']:.4f}.",
            "",
        )
    ]


def study_text(report: Mapping[str, Any]) -> str:
    """Writes report.md of a black-box search."""
    lines = [
        f"# {report['method']} on {report['evaluator']}",
        "",
        f"{report['evaluations']} evaluations ({report['evaluation_epochs']:.0f} epochs of"
        f" training, {report['evaluation_seconds']:.0f} s), seed {report['seed']}.",
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
    lines.append(f"Accuracy that the search saw: {report['accuracy']:.4f}.")
    lines += ["", "![distributions tried](simplex.png)", ""]
    lines += table_lines(report["reported"] or {})
    return "\n".join(lines)


def train_text(report: Mapping[str, Any], genotype: AnyGenotype) -> str:
    """Writes report.md of a training."""
    env = report["environment"]
    return "\n".join(
        [
            f"# A genotype trained on {report['data']}",
            "",
            f"{report['epochs']} epochs in {report['train_seconds']:.0f} s, seed {report['seed']},"
            f" {env['device']}, {env['threads']} threads, torch {env['torch']},"
            f" fastnas {env['fastnas']}.",
            "",
            *cell_table(genotype),
            "",
            "```",
            report["genotype"],
            "```",
            "",
            f"Test accuracy: **{report['test_accuracy']:.4f}** ({report['parameters']:,}"
            f" parameters, {report['test_images']} held-back images).",
            "",
        ]
    )
