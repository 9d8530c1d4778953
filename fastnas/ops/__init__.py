"""The ops: one file each, read top to bottom from schema to public function."""

from fastnas.ops.mixed_sum import draw_rng, mixed_sum
from fastnas.ops.table import OPS

__all__ = ["OPS", "draw_rng", "mixed_sum"]
