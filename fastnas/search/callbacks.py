"""Defines what a `ChoiceSearch` tells its callers on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastnas.search.logs import Logs

if TYPE_CHECKING:
    from fastnas.search.choice_search import ChoiceSearch


class StopSearch(Exception):
    """Ends a search where a callback raises it: after a step or an epoch."""


class Callback:
    """Does something after each step or epoch of a search: a subclass overrides what it needs."""

    def on_step(self, search: ChoiceSearch, figures: Mapping[str, Tensor]) -> None:
        """Does something after a step; here nothing.

        Args:
            figures: train_loss and valid_loss, [] on the device. To read one waits for it.
        """

    def on_epoch(self, search: ChoiceSearch, figures: Mapping[str, Any]) -> None:
        """Does something after an epoch, whose checkpoint is written by then; here nothing.

        Args:
            figures: the epoch's row of `search.history`.
        """


class TensorBoard(Callback):
    """Logs the figures of each epoch, of several processes in the first one.

    Args:
        folder: of the logs; what was logged after a checkpoint that a search resumes from is
            hidden.

    Raises:
        MissingPackage: tensorboard is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._logs: Logs | None = None

    def on_epoch(self, search: ChoiceSearch, figures: Mapping[str, Any]) -> None:
        if not search.processes.is_first:
            return
        if self._logs is None:
            self._logs = Logs(self.folder, True, int(figures["epoch"]))
        self._logs.epoch(figures)
        if search.epoch == search.epochs:
            self._logs.close()
            self._logs = None
