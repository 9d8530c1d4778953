"""fastnas: differentiable architecture search, the same mathematics in less time and memory."""

from fastnas._version import __version__
from fastnas.allocator import keep_freed_memory
from fastnas.backends import BackendError, use_backend
from fastnas.nn import accelerate, decelerate
from fastnas.ops import PathSample, mixed_edges, mixed_norm_sum, mixed_sum, sample_paths
from fastnas.reference import SkipNoise

__all__ = [
    "BackendError",
    "PathSample",
    "SkipNoise",
    "__version__",
    "accelerate",
    "decelerate",
    "keep_freed_memory",
    "mixed_edges",
    "mixed_norm_sum",
    "mixed_sum",
    "sample_paths",
    "use_backend",
]
