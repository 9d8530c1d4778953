"""Leaves what a run has found or trained, cells or a column: its file, pictures and table."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastnas.files import write_text
from fastnas.report.architecture_drawing import architecture_figure
from fastnas.report.figures import save_figure
from fastnas.runs.columns import layer_table
from fastnas.runs.report import cell_table
from fastnas.search.config import GradientConfig
from fastnas.search.trained import trained
from fastnas.spaces import MobileGenotype
from fastnas.spaces.mobile_genotype import Architecture


def leave_genotype(out: Path, genotype: Architecture, title: str) -> None:
    """Writes genotype.json, and cell.png and cell.svg, or column.png and column.svg."""
    write_text(out / "genotype.json", trained(genotype).json + "\n")
    figure = architecture_figure(genotype, title=title)
    name = "column" if isinstance(genotype, MobileGenotype) else "cell"
    for suffix in ("png", "svg"):
        save_figure(figure, out / f"{name}.{suffix}")


def table_of(genotype: Architecture, report: Mapping[str, Any]) -> list[str]:
    """Returns cells, or the layers of a report, as a Markdown table."""
    if isinstance(genotype, MobileGenotype):
        return layer_table(report["layers"])
    return cell_table(genotype)


def next_step(config: GradientConfig, report: Mapping[str, Any], out: Path) -> str:
    """Says how what was found is trained for longer, in the sizes that the report is about."""
    sizes = {name: value for name, value in report["network"].items() if name != "image"}
    flags = []
    for name, value in sizes.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, str(value)]
    command = ["fastnas", "train", str(out / "genotype.json"), "--data", config.data, *flags]
    return f"to train it for longer: {shlex.join(command)}"
