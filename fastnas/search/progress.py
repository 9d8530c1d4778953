"""Shows a person how a run goes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def memory_text(device: torch.device) -> str:
    """Returns the peak memory so far: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # macOS counts in bytes, Linux in KiB.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.2f} GiB"


def plain_console(width: int | None = None, quiet: bool = False) -> Console:
    """Returns a console that prints names as they are: brackets are no markup, lines not broken.

    Args:
        width: of tables in columns; None: the terminal's.
        quiet: whether nothing is printed at all.
    """
    return Console(
        width=width, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True
    )


class StepBar:
    """Shows a bar over the steps of a run with its latest figures, and a line an epoch."""

    def __init__(self, console: Console, what: str, steps: int, done: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task(what, total=steps, completed=done, figures="")

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, steps: int, figures: str) -> None:
        self._progress.update(self._task, advance=steps, figures=figures)

    def line(self, text: str) -> None:
        self.console.print(text)


@contextmanager
def stage(console: Console, text: str) -> Iterator[None]:
    """Announces something that takes seconds and has no steps to count."""
    with console.status(Text(text)):
        yield
