"""Backends: what can run, and which one does."""

from fastnas.backends.chooser import (
    AUTO,
    BACKENDS,
    VARIABLE,
    BackendError,
    check_environment,
    choose,
    use_backend,
)
from fastnas.backends.held import MEMORY, Held, accumulation_dtype
from fastnas.backends.request import OpInfo, Request

__all__ = [
    "AUTO",
    "BACKENDS",
    "MEMORY",
    "VARIABLE",
    "BackendError",
    "Held",
    "OpInfo",
    "Request",
    "accumulation_dtype",
    "check_environment",
    "choose",
    "use_backend",
]
