"""Saves figures without matplotlib's global state."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fastnas.checks import typed
from fastnas.files import write_atomically

SUFFIXES = (".png", ".svg")
DPI = 160


@typed
def picture_path(path: Path | str) -> Path:
    """Returns the path if its suffix names a format that can be written.

    Raises:
        ValueError: if the suffix is neither .png nor .svg.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"path {str(path)!r} has suffix {path.suffix!r}; expected {' or '.join(SUFFIXES)}"
        )
    return path


def write_title(figure: Figure, title: str, **style: Any) -> None:
    """Writes a text of the user's above a figure as it is: `$` begins no formula.

    What no font or SVG can have, such as a byte of a name that is no UTF-8, is written as an
    escape.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in title)
    figure.suptitle(shown, parse_math=False, **style)


@typed
def save_figure(figure: Figure, path: Path | str) -> None:
    """Writes a figure as PNG or SVG, as the suffix says; equal figures give equal bytes.

    A picture that was there stays whole where the new one cannot be written.

    Raises:
        ValueError: if the suffix is neither .png nor .svg.
    """
    path = picture_path(path)
    kind = path.suffix.lower()[1:]
    # The salt fixes the ids in an SVG, which are random otherwise; its date is left out below.
    with matplotlib.rc_context({"svg.hashsalt": "fastnas"}):
        metadata = {"Date": None} if kind == "svg" else None
        # It is drawn into memory first: a figure that fails half-way must not replace the picture
        # before.
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=DPI, metadata=metadata)
    write_atomically(path, lambda file: file.write(drawn.getvalue()))
