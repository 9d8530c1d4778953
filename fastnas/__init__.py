"""Searches architectures by gradient: eager PyTorch's mathematics in less time and memory.

Names are imported when they are first used: the command line is there before torch is, and answers
Ctrl-C from its start.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastnas._version import __version__

if TYPE_CHECKING:
    from fastnas.allocator import keep_freed_memory
    from fastnas.backends import BackendError, use_backend
    from fastnas.dropin.accelerate import accelerate, decelerate
    from fastnas.dropin.profile import profile
    from fastnas.ops.mixed_edges import mixed_edges
    from fastnas.ops.mixed_norm_sum import mixed_norm_sum
    from fastnas.ops.mixed_sum import mixed_sum
    from fastnas.ops.sample_paths import PathSample, sample_paths
    from fastnas.reference import SkipNoise
    from fastnas.search.choice_search import ChoiceSearch

__all__ = [
    "BackendError",
    "ChoiceSearch",
    "PathSample",
    "SkipNoise",
    "__version__",
    "accelerate",
    "decelerate",
    "keep_freed_memory",
    "mixed_edges",
    "mixed_norm_sum",
    "mixed_sum",
    "profile",
    "sample_paths",
    "use_backend",
]

_PACKAGES = ("backends", "dropin", "nn", "ops", "reference", "spaces")
_HOMES = {
    "BackendError": "backends",
    "ChoiceSearch": "search.choice_search",
    "PathSample": "ops",
    "SkipNoise": "reference",
    "accelerate": "dropin",
    "decelerate": "dropin",
    "keep_freed_memory": "allocator",
    "mixed_edges": "ops",
    "mixed_norm_sum": "ops",
    "mixed_sum": "ops",
    "profile": "dropin",
    "sample_paths": "ops",
    "use_backend": "backends",
}
"""Where each public name comes from."""


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"fastnas.{name}")
    # Another name raises at once: `hasattr` must not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'fastnas' has no attribute {name!r}")
    # It is kept, so that it is looked up once.
    found = globals()[name] = getattr(import_module(f"fastnas.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGES, *_HOMES])
