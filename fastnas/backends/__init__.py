"""Says which backends can run, and which one does."""

from fastnas.backends.op_table import KERNELS, OPS, OpInfo, Request
from fastnas.backends.registry import (
    AUTO,
    BACKENDS,
    VARIABLE,
    BackendError,
    check_environment,
    choose,
    use_backend,
)
from fastnas.backends.saved import MEMORY, SavedTensors, accumulation_dtype

__all__ = [
    "AUTO",
    "BACKENDS",
    "KERNELS",
    "MEMORY",
    "OPS",
    "VARIABLE",
    "BackendError",
    "OpInfo",
    "Request",
    "SavedTensors",
    "accumulation_dtype",
    "check_environment",
    "choose",
    "use_backend",
]
