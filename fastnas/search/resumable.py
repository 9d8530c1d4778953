"""A run over epochs and steps that can stop at any step and go on as if it had not."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastnas.search.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from fastnas.search.config import SearchConfig, TrainConfig
from fastnas.search.diverged import DivergedError, first_not_finite
from fastnas.search.logs import Logs
from fastnas.search.progress import StepBar

SECONDS_SHOWN = 0.5
STEPS_SHOWN = 16
"""Figures are read, which waits for the device, after that time or that many steps."""


class ResumableRun:
    """Epochs, steps and checkpoints; subclasses say what a step and the end of an epoch do.

    Attributes:
        epoch, step: epochs done, and steps done in the one under way.
        seconds: spent in steps.
        sums: figures summed over the steps of the epoch under way, in float64 on the device.
        history: one mapping of figures per epoch done.
    """

    kind: ClassVar[str]
    """What its checkpoints say they are of."""
    summed: ClassVar[tuple[str, ...]]
    """Names of the figures in `sums`."""
    config: SearchConfig | TrainConfig
    device: torch.device

    def __init__(self) -> None:
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.sums: dict[str, float | Tensor] = dict.fromkeys(self.summed, 0.0)
        self.history: list[dict[str, Any]] = []
        self._unread: list[tuple[int, str, Tensor]] = []
        """Step, name and value of the figures added since `sums` was read last."""
        self._saved: str | None = None
        """Which checkpoint holds the run, and of which moment it is."""

    @property
    def steps_per_epoch(self) -> int:
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        """Name to what has state_dict() and load_state_dict()."""
        raise NotImplementedError

    def generators(self) -> dict[str, torch.Generator]:
        raise NotImplementedError

    def start_epoch(self) -> None:
        """Sets what depends on the epoch; called again when the run resumes within it."""
        raise NotImplementedError

    def run_step(self) -> None:
        """One step, its figures given to `add`."""
        raise NotImplementedError

    def end_epoch(self) -> dict[str, Any]:
        """The figures of the epoch besides the means of `sums`."""
        raise NotImplementedError

    def progress(self, means: Mapping[str, float], seconds: float) -> str:
        """What the bar shows: from `sums` over the epoch's steps so far, and seconds a step."""
        raise NotImplementedError

    def epoch_line(self) -> str:
        """What stays on the screen of an epoch done."""
        raise NotImplementedError

    def advice(self) -> str:
        """What a user may change when the run has diverged."""
        raise NotImplementedError

    @property
    def epochs(self) -> int:
        assert self.config.epochs is not None  # a TrainConfig is completed
        return self.config.epochs

    @property
    def finished(self) -> bool:
        return self.epoch == self.epochs

    def add(self, **figures: Tensor) -> None:
        """Adds figures of a step [] to `sums`, without waiting for the device."""
        for name, value in figures.items():
            # A copy: the next replay of a CUDA graph overwrites the loss itself.
            mine = value.detach().to(torch.float64, copy=True)
            self.sums[name] = self.sums[name] + mine
            self._unread.append((self.step, name, mine))

    def means(self) -> dict[str, float]:
        """`sums` over the steps of the epoch so far.

        Raises:
            DivergedError: a figure of a step was not finite, which its sum tells for good.
        """
        means = {name: float(total) / self.step for name, total in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                first = next((u for u in self._unread if not u[2].isfinite()), None)
                step, name, value = first or (self.step - 1, name, mean)
                raise self.diverged(f"{name} is {float(value)}", step)
        self._unread.clear()
        return means

    def check_finite(self) -> None:
        """Makes sure that the run can go on from here, and be derived from.

        Raises:
            DivergedError: a loss so far, or a parameter, a statistic or a moment of an optimizer
                is not finite. The loss may be finite still: it was computed before the step.
        """
        if self.step:
            self.means()
        name = first_not_finite(self.parts())
        if name is not None:
            raise self.diverged(f"{name} is not finite", self.step - 1)

    def diverged(self, what: str, step: int) -> DivergedError:
        """The error that ends the run.

        Args:
            what: is not finite.
            step: of the epoch under way, from 0, in or after which it was seen.
        """
        kept = "nothing was saved" if self._saved is None else f"{self._saved} is kept"
        return DivergedError(
            f"{self.kind} diverged: {what} in epoch {self.epoch + 1}, step {step + 1} of"
            f" {self.steps_per_epoch}; {self.advice()}; {kept}"
        )

    def run(self, checkpoint: Path | None, logs: Logs, bar: StepBar) -> None:
        """Goes on to the last epoch.

        Args:
            checkpoint: where the state is kept; None: it is not.
        """
        while not self.finished:
            self.start_epoch()
            self._run_steps(checkpoint, bar)
            self.check_finite()
            self.history.append({"epoch": self.epoch, **self.means(), **self.end_epoch()})
            self.sums = dict.fromkeys(self.summed, 0.0)
            self.epoch += 1
            self.step = 0
            logs.epoch(self.history[-1])
            bar.line(self.epoch_line())
            self.save(checkpoint)

    def _run_steps(self, checkpoint: Path | None, bar: StepBar) -> None:
        every = self.config.checkpoint_every
        started, steps = time.perf_counter(), 0
        while self.step < self.steps_per_epoch:
            self.run_step()
            self.step += 1
            steps += 1
            saves = every and self.step % every == 0
            shows = steps == STEPS_SHOWN or time.perf_counter() - started > SECONDS_SHOWN
            if not (saves or shows or self.step == self.steps_per_epoch):
                continue
            means = self.means()
            seconds = time.perf_counter() - started
            self.seconds += seconds
            bar.advance(steps, self.progress(means, seconds / steps))
            if saves:
                self.save(checkpoint)
            started, steps = time.perf_counter(), 0

    def save(self, path: Path | None) -> None:
        """Everything that the rest of the run depends on; nothing where there is no path.

        Raises:
            DivergedError: the state is not finite; the checkpoint before it stays.
        """
        if path is None:
            return
        self.check_finite()
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "sums": {name: float(total) for name, total in self.sums.items()},
            "history": self.history,
            "random": random_state(),
            **{name: g.get_state() for name, g in self.generators().items()},
            **{name: part.state_dict() for name, part in self.parts().items()},
        }
        save_checkpoint(path, self.kind, state)
        self._saved_as(path)

    def _saved_as(self, path: Path) -> None:
        self._saved = f"{path}, after {self.epoch} epochs and {self.step} steps,"

    def resume(self, path: Path) -> None:
        """Goes back to the state that a checkpoint holds, bit for bit."""
        state = load_checkpoint(path, self.kind)
        try:
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            for name, generator in self.generators().items():
                generator.set_state(state[name])
            self.epoch, self.step = state["epoch"], state["step"]
            self.seconds, self.sums = state["seconds"], dict(state["sums"])
            self.history = list(state["history"])
            self._saved_as(path)
            restore_random_state(state["random"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {path} does not fit this run: {text}") from error
