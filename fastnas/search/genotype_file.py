"""Reads a genotype from what a user gives for one: the name of a file, or its text."""

from __future__ import annotations

import os
from pathlib import Path

from fastnas.search.config import ConfigError
from fastnas.spaces import layout_of, parse
from fastnas.spaces.mobile_genotype import Architecture, begins_column, read_column
from fastnas.spaces.slots import LENGTH
from fastnas.text_file import TextFileError, file_path, read_text

LARGEST = 1 << 18
"""Bytes of a genotype's file."""
MOST_NODES, MOST_EDGES = int(LENGTH.high) // 2, 2 * int(LENGTH.high)
# JSON begins with the first, a string of NAS-Bench-201 with the second, of NAS-Bench-Graph with the
# third.
STARTS = ("{", "|", "Arch(")
CALL = "Genotype"


def read_genotype(text_or_file: str) -> Architecture:
    """Reads a genotype from a file of that name, where there is one, or else from the text itself.

    A text may be the name of a published column of the MobileNet-like space.

    Raises:
        ConfigError: there is no such file, and the text is none; or the file holds none.
    """
    if not text_or_file:
        raise ConfigError("genotype is empty; a genotype file or a genotype's text is needed")
    path = file_path(text_or_file)
    if not _is_there(path) and _looks_like_text(text_or_file):
        return _parsed("genotype", text_or_file)
    try:
        text = read_text(path, LARGEST)
    except TextFileError as error:
        raise ConfigError(f"genotype file {error}") from error
    return _parsed(f"genotype file {path}", text)


def _is_there(path: Path) -> bool:
    # A genotype's text is too long for a file's name, which pathlib raises in place of an answer.
    return os.path.lexists(path)


def _looks_like_text(text: str) -> bool:
    """Tells whether an error should be about the text: file names may have brackets and bars."""
    return text.lstrip().startswith(STARTS) or f"{CALL}(" in text or begins_column(text)


def _parsed(what: str, text: str) -> Architecture:
    try:
        column = read_column(text)
        if column is not None:
            return column
        genotype = parse(text)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error
    for cell, found in layout_of(genotype).cells(genotype).items():
        nodes, edges = len(found), len(genotype.edges(cell))
        if nodes > MOST_NODES or edges > MOST_EDGES:
            raise ConfigError(
                f"{what}: its {cell} cell has {nodes} nodes and {edges} edges; at most"
                f" {MOST_NODES} and {MOST_EDGES} can be built and drawn"
            )
    return genotype
