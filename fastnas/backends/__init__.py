"""Backends: what can run, and which one does."""

from fastnas.backends.chooser import AUTO, BACKENDS, BackendError, choose, use_backend
from fastnas.backends.request import OpInfo, Request

__all__ = ["AUTO", "BACKENDS", "BackendError", "OpInfo", "Request", "choose", "use_backend"]
