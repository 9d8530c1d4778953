"""Leaves what a run has found or trained, cells or a column: its file, pictures and table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastnas.files import write_text
from fastnas.nn import MobileNetEvalNetwork
from fastnas.report.architecture_drawing import architecture_figure
from fastnas.report.figures import save_figure
from fastnas.runs.columns import column_layers, layer_table
from fastnas.runs.report import cell_table
from fastnas.search.trained import trained
from fastnas.search.trainer import Trainer
from fastnas.spaces import MobileGenotype
from fastnas.spaces.mobile_genotype import Architecture


def leave_genotype(out: Path, genotype: Architecture, title: str) -> None:
    """Writes genotype.json, and cell.png and cell.svg, or column.png and column.svg."""
    write_text(out / "genotype.json", trained(genotype).json + "\n")
    figure = architecture_figure(genotype, title=title)
    name = "column" if isinstance(genotype, MobileGenotype) else "cell"
    for suffix in ("png", "svg"):
        save_figure(figure, out / f"{name}.{suffix}")


def figures_of(trainer: Trainer) -> dict[str, Any]:
    """Returns what the report of a training says of its network, besides its parameters."""
    network = trainer.network
    if not isinstance(network, MobileNetEvalNetwork):
        return {}
    names = ("width", "stem_stride", "squeeze", "activation")
    settings = {name: trainer.config.resolved(name) for name in names}
    return {**settings, **work_of(network, trainer.images.shape)}


def work_of(network: MobileNetEvalNetwork, image: tuple[int, ...]) -> dict[str, Any]:
    """Returns the layers of a column's network, and its multiply-adds for an image [C, H, W]."""
    layers = column_layers(network, image)
    return {"multiply_adds": sum(row["multiply_adds"] for row in layers), "layers": layers}


def table_of(genotype: Architecture, report: Mapping[str, Any]) -> list[str]:
    """Returns cells, or the layers of a report, as a Markdown table."""
    if isinstance(genotype, MobileGenotype):
        return layer_table(report["layers"])
    return cell_table(genotype)
