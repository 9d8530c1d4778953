"""Holds the ops, one file each: read it top to bottom, from description to public function."""

from fastnas.backends import OPS
from fastnas.ops.mixed_edges import mixed_edges
from fastnas.ops.mixed_norm_sum import mixed_norm_sum
from fastnas.ops.mixed_sum import draw_noise, draw_rng, mixed_sum
from fastnas.ops.relu_conv_bn import relu_conv_bn
from fastnas.ops.sample_paths import PathSample, sample_paths

__all__ = [
    "OPS",
    "PathSample",
    "draw_noise",
    "draw_rng",
    "mixed_edges",
    "mixed_norm_sum",
    "mixed_sum",
    "relu_conv_bn",
    "sample_paths",
]
