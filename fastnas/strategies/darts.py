"""DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055)."""

from __future__ import annotations

from typing import Any

from fastnas.strategies.base import Strategy, check_order


class DARTS(Strategy):
    """Softmax over candidates, first-order or unrolled architecture gradient, two edges a node."""

    name = "darts"
    source = "Liu et al., ICLR 2019, arXiv 1806.09055"
    options = {"order": 1}

    order: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_order(self.order)
