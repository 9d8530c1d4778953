"""Writes files that a crash cannot spoil: temporary file, fsync, rename."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"


def is_partial(path: Path) -> bool:
    """Returns whether the file is what a write that was killed left behind."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file: it holds what it held before or all that `write` wrote, if power fails.

    Its folder has to be there: one that has vanished under a run is an error, not made again.
    """
    # The name is this thread's alone, so that two who write one file do not write into each other.
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            # The bytes reach the disk before the name does: a rename that survives a crash must not
            # lead to an empty file.
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # the one that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)  # a full disk needs its space back
    # The rename is an entry of the folder, which has to reach the disk as well.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    # A name may have bytes that are no UTF-8, which stand in the text as lone surrogates.
    content = text.encode(errors="backslashreplace")
    write_atomically(path, lambda stream: stream.write(content))
