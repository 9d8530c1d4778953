"""Knows which libraries only parts of fastnas need, and which extra of the package brings each."""

from __future__ import annotations

import importlib

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
            package, extra = BRINGS[module.partition(".")[0]]
            raise MissingPackage(
                f"{package} cannot be imported ({error}); "
                f"install it with: pip install 'fastnas[{extra}]'"
            ) from error
