"""Draws whatever a search ends with: cells, or a column."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastnas.report.cell_drawing import genotype_figure
from fastnas.report.column_drawing import column_figure
from fastnas.spaces import MobileGenotype
from fastnas.spaces.mobile_genotype import Architecture


def architecture_figure(genotype: Architecture, *, title: str = "") -> Figure:
    """Returns the figure of `draw_genotype` or of `draw_column`.

    Args:
        title: a line above the picture.

    Raises:
        TypeError: `genotype` is neither cells nor a column.
    """
    if isinstance(genotype, MobileGenotype):
        return column_figure(genotype.architecture, space=genotype.space, title=title)
    return genotype_figure(genotype, title=title)
