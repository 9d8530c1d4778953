"""Runs over epochs and steps, and can stop at any step and go on as if it had not."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastnas import signals
from fastnas.data.source import ImageSource
from fastnas.data.workers import deaths_told
from fastnas.search.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from fastnas.search.config import GradientConfig, TrainConfig
from fastnas.search.diverged import DivergedError, first_not_finite
from fastnas.search.identity import FREE, LAST_STAGE, differences
from fastnas.search.logs import Logs
from fastnas.search.progress import StepBar
from fastnas.search.saved_state import problem_of_optimizer, problem_of_state

SECONDS_SHOWN = 0.5
STEPS_SHOWN = 16
"""Figures are read, which waits for the device, after that time or that many steps."""


class ResumableRun:
    """Runs epochs and keeps checkpoints; subclasses say what a step and the end of an epoch do.

    Attributes:
        epoch, step: epochs done, and steps done in the one under way.
        seconds: spent in steps.
        sums: figures summed over the steps of the epoch under way, in float64 on the device.
        history: one mapping of figures per epoch done.
    """

    kind: ClassVar[str]
    """What its checkpoints say they are of."""
    checkpoint: ClassVar[str]
    """The name of the file, in the folder of the run, that keeps them."""
    summed: ClassVar[tuple[str, ...]]
    """Names of the figures in `sums`."""
    remembered: ClassVar[Mapping[str, type]] = {}
    """Figures of past epochs that it reads again, and their types."""
    config: GradientConfig | TrainConfig
    device: torch.device
    images: ImageSource

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

    def checkpointed(self) -> dict[str, Any]:
        """Returns name to what has state_dict() and load_state_dict()."""
        raise NotImplementedError

    def generators(self) -> dict[str, torch.Generator]:
        raise NotImplementedError

    def start_epoch(self) -> None:
        """Sets what depends on the epoch; called again when the run resumes within it."""
        raise NotImplementedError

    def run_step(self) -> None:
        """Makes one step and gives its figures to `add`."""
        raise NotImplementedError

    def end_epoch(self) -> dict[str, Any]:
        """Returns the figures of the epoch besides the means of `sums`."""
        raise NotImplementedError

    def after_epoch(self) -> None:
        """Does what follows an epoch before the run is saved; here nothing."""

    def close(self) -> None:
        """Ends the processes that read ahead, when `run` ends; here there are none."""

    def extra_state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds besides the parts; here nothing."""
        return {}

    def restore_extra(self, state: Mapping[str, Any]) -> None:
        """Goes to the extra state of a checkpoint before its parts are loaded; raises anything."""

    def progress(self, means: Mapping[str, float], seconds: float) -> str:
        """Returns what the bar shows, from the means of the epoch so far and seconds a step."""
        raise NotImplementedError

    def epoch_line(self) -> str:
        """Returns what stays on the screen of an epoch done."""
        raise NotImplementedError

    def advice(self) -> str:
        """Tells what a user may change when the run has diverged."""
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
            # It is a copy, because the next replay of a CUDA graph overwrites the loss itself. It
            # is summed in float64, which a checkpoint holds as a Python float without rounding: an
            # epoch that is resumed has the means of one that was not.
            mine = value.detach().to(torch.float64, copy=True)
            self.sums[name] = self.sums[name] + mine
            self._unread.append((self.step, name, mine))

    def means(self) -> dict[str, float]:
        """Returns `sums` over the steps of the epoch so far.

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
        name = first_not_finite(self.checkpointed())
        if name is not None:
            raise self.diverged(f"{name} is not finite", self.step - 1)

    def diverged(self, what: str, step: int) -> DivergedError:
        """Returns the error that ends the run.

        Args:
            what: is not finite.
            step: of the epoch under way, from 0, in or after which it was seen.
        """
        kept = "nothing was saved" if self._saved is None else f"{self._saved} is kept"
        return DivergedError(
            f"{self.kind} diverged: {what} in epoch {self.epoch + 1}, step {step + 1} of"
            f" {self.steps_per_epoch}; {self.advice()}; {kept}"
        )

    def identity(self) -> dict[str, Any]:
        """Returns what a run that goes on from a checkpoint of this one must have as well."""
        free = FREE | LAST_STAGE
        return {
            **{name: value for name, value in self.config.settings().items() if name not in free},
            # Torch splits a sum on the CPU by the number of threads, so another number rounds
            # otherwise and the run would end elsewhere.
            "threads": torch.get_num_threads(),
            "fingerprint of the data": self.images.fingerprint,
        }

    def run(self, checkpoint: Path | None, logs: Logs, bar: StepBar) -> None:
        """Goes on to the last epoch.

        Args:
            checkpoint: where the state is kept; None: it is not.

        Raises:
            DivergedError: a loss, or what a step left, is not finite.
            Stopped: a signal has asked for it, where signals are handled. The state of that step is
                in the checkpoint.
        """
        # A signal only sets `stop.number`, which is read between two steps: a checkpoint never
        # holds half a step.
        with closing(self), deaths_told(), signals.deferred() as stop:
            while not self.finished:
                self.start_epoch()
                self._run_steps(checkpoint, bar, stop)
                self._end_epoch(checkpoint, logs, bar)
            # A signal may have come while the last epoch was evaluated, after the last step had
            # looked. `deferred` would raise as well, but could not tell what was saved.
            stop.check(self._saved)

    def _end_epoch(self, checkpoint: Path | None, logs: Logs, bar: StepBar) -> None:
        # `end_epoch` derives a genotype, which refuses logits that are not finite by an error that
        # names neither step nor epoch. So the run is judged first.
        self.check_finite()
        self.history.append({"epoch": self.epoch, **self.means(), **self.end_epoch()})
        self.sums = dict.fromkeys(self.summed, 0.0)
        self.epoch += 1
        self.step = 0
        logs.epoch(self.history[-1])
        bar.line(self.epoch_line())
        # It comes before the save: at the end of a stage the checkpoint must hold the network of
        # the next one, which is what `restore_extra` builds for that epoch.
        self.after_epoch()
        self.save(checkpoint)

    def _run_steps(self, checkpoint: Path | None, bar: StepBar, stop: signals.Stop) -> None:
        every = self.config.checkpoint_every
        started, steps = time.perf_counter(), 0
        while self.step < self.steps_per_epoch:
            self.run_step()
            self.step += 1
            steps += 1
            stops = stop.number is not None
            saves = stops or (every and self.step % every == 0)
            shows = steps == STEPS_SHOWN or time.perf_counter() - started > SECONDS_SHOWN
            if not (saves or shows or self.step == self.steps_per_epoch):
                continue
            # Reading the figures waits for the device, so the clock below counts whole steps.
            # Without it, it would count how long it takes to queue them.
            means = self.means()
            seconds = time.perf_counter() - started
            self.seconds += seconds
            bar.advance(steps, self.progress(means, seconds / steps))
            if saves:
                self.save(checkpoint)
            if stops:
                stop.check(self._saved)
            started, steps = time.perf_counter(), 0

    def save(self, path: Path | None) -> None:
        """Saves everything that the rest of the run depends on; nothing where there is no path.

        Raises:
            DivergedError: the state is not finite; the checkpoint before it stays.
        """
        if path is None:
            return
        # A checkpoint of NaN would replace the last one that a person can still go back to.
        self.check_finite()
        state = {
            "run": self.identity(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "sums": {name: float(total) for name, total in self.sums.items()},
            "history": self.history,
            "random": random_state(),
            **{name: g.get_state() for name, g in self.generators().items()},
            **{name: part.state_dict() for name, part in self.checkpointed().items()},
            **self.extra_state(),
        }
        save_checkpoint(path, self.kind, state)
        self._saved_as(path)

    def _saved_as(self, path: Path) -> None:
        self._saved = f"{path}, after {self.epoch} epochs and {self.step} steps,"

    def resume(self, path: Path) -> None:
        """Goes back to the state that a checkpoint of this run holds, bit for bit.

        Raises:
            CheckpointError: as `read` and `restore`; or it is of a run of other settings, threads
                or data.
        """
        state = self.read(path)
        differing = self.differences(state)
        if differing:
            raise CheckpointError(
                f"checkpoint {path} is of another run: {', '.join(differing.values())}"
            )
        self.restore(state, path)

    def read(self, path: Path) -> dict[str, Any]:
        """Reads the state in a checkpoint; CheckpointError where it is none of such a run."""
        state = load_checkpoint(path, self.kind)
        parts = [*self.generators(), *self.checkpointed(), *self.extra_state()]
        problem = problem_of_state(
            state, parts, self.summed, self.remembered, self.epochs, self.steps_per_epoch
        )
        if problem is not None:
            raise CheckpointError(f"checkpoint {path} holds no state of a {self.kind}: {problem}")
        return state

    def differences(self, state: Mapping[str, Any]) -> dict[str, str]:
        """Returns what the run that saved a state has otherwise than this one, by its name."""
        return differences(state["run"], self.identity())

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Goes to a state that `read` has read from `path`.

        Raises:
            CheckpointError: it does not fit, or holds a number that is not finite. The run is no
                longer usable then.
        """
        try:
            # It builds the network of the stage, so the parts that are loaded below are its parts.
            self.restore_extra(state)
            for name, part in self.checkpointed().items():
                part.load_state_dict(state[name])
                wrong = isinstance(part, Optimizer) and problem_of_optimizer(part)
                if wrong:
                    raise ValueError(f"{name}: {wrong}")
            for name, generator in self.generators().items():
                generator.set_state(state[name])
            # It comes last, because building a network draws its weights from the global
            # generators.
            restore_random_state(state["random"])
        except Exception as error:  # a state dict made by hand raises anything
            text = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {path} does not fit this run: {text}") from error
        bad = first_not_finite(self.checkpointed())
        if bad is not None:
            raise CheckpointError(f"checkpoint {path} is of no use: {bad} is not finite")
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.sums = state["seconds"], dict(state["sums"])
        self.history = list(state["history"])
        self._saved_as(path)
