"""The ops: one file each, read top to bottom from schema to public function."""

from fastnas.ops.device_choice import (
    choice_on_device,
    sampled_norms,
    sampled_params,
    stays_on_device,
)
from fastnas.ops.dispatch import choose_backend, has_kernel
from fastnas.ops.mixed_edges import mixed_edges
from fastnas.ops.mixed_norm_sum import mixed_norm_sum
from fastnas.ops.mixed_sum import draw_rng, mixed_sum
from fastnas.ops.relu_conv_bn import relu_conv_bn
from fastnas.ops.sample_paths import PathSample, sample_paths
from fastnas.ops.table import OPS
from fastnas.ops.transfer import staged, to_device

__all__ = [
    "OPS",
    "PathSample",
    "choice_on_device",
    "choose_backend",
    "draw_rng",
    "has_kernel",
    "mixed_edges",
    "mixed_norm_sum",
    "mixed_sum",
    "relu_conv_bn",
    "sample_paths",
    "sampled_norms",
    "sampled_params",
    "staged",
    "stays_on_device",
    "to_device",
]
