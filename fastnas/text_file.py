"""Finds the files that a user names, and reads the text in them."""

from __future__ import annotations

import os
from pathlib import Path

LARGEST = 1 << 24
"""Bytes that are read of a file, unless its reader expects more: /dev/zero has no end."""


class TextFileError(ValueError):
    """Tells that a file cannot be read as text; one line names it and says why."""


def file_path(name: str | Path) -> Path:
    """Returns the path that a flag or a file of settings names, `~` standing for the home folder.

    A shell expands `~` only where a word begins with it: not in `--out=~/a`, nor in a YAML file.
    """
    return Path(os.path.expanduser(name))


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Reads a file of UTF-8 text, without the byte-order mark that some editors put first.

    Raises:
        TextFileError: there is no such file, or it cannot be read, is too large or is no text.
    """
    try:
        with path.open("rb") as stream:
            # One byte more than allowed tells a file that is too large without asking for its size,
            # which a pipe does not have.
            content = stream.read(largest + 1)
    except OSError as error:
        raise TextFileError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise TextFileError(f"{str(path)!r} cannot be read: {error}") from error
    if len(content) > largest:
        raise TextFileError(f"{path} cannot be read: it is larger than {largest >> 10} KiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextFileError(
            f"{path} cannot be read: byte {error.start} is no UTF-8 text"
        ) from error
