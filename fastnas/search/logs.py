"""Writes the TensorBoard logs of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from fastnas.extras import require


class Logs:
    """Logs scalars by epoch; a resumed run hides what was logged after its checkpoint."""

    def __init__(self, folder: Path | None, enabled: bool, first_epoch: int = 0) -> None:
        self._writer = None
        if folder is not None and enabled:
            # It belongs to the extra `search`; a run without logs must not need it.
            require("tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def epoch(self, figures: Mapping[str, object]) -> None:
        if self._writer is None:
            return
        step = int(figures["epoch"])  # type: ignore[call-overload]
        for name, value in figures.items():
            # TensorBoard breaks a curve at NaN, and texts such as the genotype are no scalars.
            if isinstance(value, int | float) and name != "epoch" and math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
