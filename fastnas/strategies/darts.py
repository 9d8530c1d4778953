"""Implements DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055)."""

from __future__ import annotations

from fastnas.strategies.mixture import Mixture


class DARTS(Mixture):
    """Weighs candidates by a softmax and keeps two edges a node."""

    name = "darts"
    source = "Liu et al., ICLR 2019, arXiv 1806.09055"
