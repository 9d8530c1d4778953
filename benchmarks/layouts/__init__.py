"""Holds search networks in the layouts of public code bases, written anew: `LAYOUTS`, by name."""

from fastnas.benchmarks.layouts import (
    confopt,
    darts,
    darts_minus,
    darts_pt,
    dots,
    drnas,
    fair_darts,
    naslib,
    nb201,
    nni,
    noisy_darts,
    pc_darts,
    pdarts,
    pt_darts,
    robust_darts,
    sgas,
    smooth_darts,
    xautodl_nasnet,
)
from fastnas.benchmarks.layouts.skeleton import Layout

_MODULES = (
    *(darts, pdarts, pc_darts, drnas, noisy_darts, fair_darts, robust_darts, smooth_darts),
    *(darts_pt, darts_minus, sgas, dots, pt_darts, xautodl_nasnet, nb201, naslib, nni, confopt),
)
LAYOUTS: dict[str, Layout] = {
    layout.name: layout for module in _MODULES for layout in module.LAYOUTS
}

__all__ = ["LAYOUTS", "Layout"]
