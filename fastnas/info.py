"""Prints `fastnas info`: what is there, what is not and why, and what auto would pick."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastnas._version import __version__
from fastnas.backends import AUTO, BACKENDS, VARIABLE, Request, check_environment, choose
from fastnas.backends.native import load_native
from fastnas.ops import OPS


def print_info(console: Console) -> None:
    """Prints the tables.

    Raises:
        BackendError: the environment asks for a backend that does not exist; after the tables.
    """
    for table in (_versions(), _backends(), _ops()):
        console.print(table)
    # It comes last, because the tables are what a user needs to see what is wrong.
    check_environment()


def _versions() -> Table:
    table = Table(title="fastnas", show_header=False, title_justify="left")
    table.add_row("fastnas", __version__)
    table.add_row("python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})")
    table.add_row("torch", torch.__version__)
    table.add_row("triton", _version_of("triton"))
    table.add_row("torchvision", _version_of("torchvision"))
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row(VARIABLE, os.environ.get(VARIABLE) or f"not set, as {AUTO}")
    table.add_row("OpenMP in this process", "\n".join(_openmp_libraries()) or "none")
    native, reason = load_native("_C")
    sets = f"{native.isa()} (of {', '.join(native.supported_isas())})" if native else reason
    table.add_row("vector instructions", sets)
    if torch.cuda.is_available():
        table.add_row("GPU", torch.cuda.get_device_name())
    return table


def _backends() -> Table:
    table = Table(title="backends", title_justify="left")
    table.add_column("backend")
    table.add_column("state")
    for name, backend in BACKENDS.items():
        table.add_row(name, backend.unavailable() or "ready")
    return table


def _ops() -> Table:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    table = Table(title="ops", title_justify="left")
    for column in ("op", "device", "dtype", "auto picks", "also there"):
        table.add_column(column)
    for stem, op in OPS.items():
        for device in devices:
            for dtype in op.dtypes["eager"]:
                request = Request(op, device, dtype)
                picked = choose(op, torch.device(device), dtype, explicit=AUTO)
                others = [
                    name
                    for name, backend in BACKENDS.items()
                    if name != picked and not (backend.unavailable() or backend.can_run(request))
                ]
                dtype_name = str(dtype).removeprefix("torch.")
                table.add_row(stem, device, dtype_name, picked, ", ".join(others))
    return table


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _openmp_libraries() -> list[str]:
    """Lists the OpenMP libraries of the process; two of them can give wrong results."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    # Every mapping of the process is a line, whose last word is the file's path.
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(p for p in paths if any(n in Path(p).name for n in ("gomp", "iomp", "libomp")))
