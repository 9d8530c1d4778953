"""Draws what a search found and how it got there."""

from fastnas.extras import require

require("matplotlib", "networkx")
