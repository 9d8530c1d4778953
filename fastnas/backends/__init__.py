"""Backends: what can run, and which one does."""

from fastnas.backends.chooser import AUTO, BACKENDS, BackendError, choose, use_backend
from fastnas.backends.held import MEMORY, Held, accumulation_dtype
from fastnas.backends.request import OpInfo, Request

__all__ = [
    "AUTO",
    "BACKENDS",
    "MEMORY",
    "BackendError",
    "Held",
    "OpInfo",
    "Request",
    "accumulation_dtype",
    "choose",
    "use_backend",
]
