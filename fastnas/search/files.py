"""Writing files that a crash cannot spoil: temporary file, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"


def is_partial(path: Path) -> bool:
    """Whether the file is what a write that was killed left behind."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """`path` holds either what it held before or all that `write` wrote, whenever power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name per path, not a random one: a killed run leaves one stray file at most.
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs its space back
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    # A name may have bytes that are no UTF-8, which stand in the text as lone surrogates.
    content = text.encode(errors="backslashreplace")
    write_atomically(path, lambda stream: stream.write(content))
