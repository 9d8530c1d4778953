"""DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055)."""

from __future__ import annotations

from fastnas.strategies.base import ORDERS, Strategy


class DARTS(Strategy):
    """Softmax over candidates, first-order or unrolled architecture gradient, two edges a node."""

    name = "darts"
    source = "Liu et al., ICLR 2019, arXiv 1806.09055"
    options = {"order": 1}
    bounds = {"order": ORDERS}

    order: int
