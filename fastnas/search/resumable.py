"""Runs over epochs and steps, and can stop at any step and go on as if it had not."""

from __future__ import annotations

import logging
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
from fastnas.processes import here
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
from fastnas.strategies.precision import Precision

logger = logging.getLogger("fastnas")

SECONDS_SHOWN = 0.5
STEPS_SHOWN = 16
"""Figures are read, which waits for the device, after that time or that many steps."""


class ResumableRun:
    """Runs epochs and keeps checkpoints; subclasses say what a step and the end of an epoch do.

    Attributes:
        precision: of its steps; by default fp32.
        epoch, step: epochs done, and steps done in the one under way.
        seconds: spent in steps.
        processes: make the run together.
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
        self.precision = Precision()
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.sums: dict[str, float | Tensor] = dict.fromkeys(self.summed, 0.0)
        self.history: list[dict[str, Any]] = []
        self._unread: list[tuple[int, str, Tensor]] = []
        """Step, name and value of the figures added since `sums` was read last."""
        self.processes = here()
        self._figures: list[dict[str, Tensor]] = []
        """Those of the step under way, a mapping for each call of `add`."""
        self._begun_by: int | None = None
        """How many processes have made the run that this one goes on with."""
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
        """Takes figures of a step [], which are added to `sums` at its end."""
        self._figures.append({})
        for name, value in figures.items():
            # It is a copy, because the next replay of a CUDA graph overwrites the loss itself. It
            # is summed in float64, which a checkpoint holds as a Python float without rounding: an
            # epoch that is resumed has the means of one that was not.
            self._figures[-1][name] = value.detach().to(torch.float64, copy=True)

    def make_step(self) -> None:
        """Makes a step and sums its figures, without waiting for the device (but in fp16)."""
        self._figures.clear()
        self.run_step()
        problem = self.precision.problem()
        if problem is not None:
            raise self.diverged(problem, self.step)
        # Of several processes they are the mean: all have the same sums, in the checkpoint too.
        means = iter(self.processes.means([v for half in self._figures for v in half.values()]))
        for half in self._figures:
            found = dict(zip(half, means))
            if not self.precision.holds(found):
                continue  # the step was skipped, and is counted
            for name, mean in found.items():
                self.sums[name] = self.sums[name] + mean
                self._unread.append((self.step, name, mean))
        self.step += 1

    def means(self) -> dict[str, float]:
        """Returns `sums` over the steps of the epoch so far.

        In fp16 a step whose loss is not finite is skipped, and is in no mean; where that is so of
        all of them so far, the mean is NaN.

        Raises:
            DivergedError: a figure of a step was not finite, which its sum tells for good; in fp16
                that of every step of the epoch.
        """
        counts = {name: self.step - self.precision.lost(name) for name in self.sums}
        means = {n: float(s) / counts[n] if counts[n] else math.nan for n, s in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean) and (counts[name] or self.step == self.steps_per_epoch):
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
            "processes": self.processes.size,
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
        mine = self.identity()
        # Sums are brought together, so that the number of threads may differ.
        self.processes.check_same({name: mine[name] for name in mine if name != "threads"})
        if self._begun_by not in (None, self.processes.size) and not self.finished:
            logger.warning(
                "fastnas: this %s was made by %d processes and goes on with %d: its batches are the"
                " same, but their sums and batch statistics are formed in other parts, so that it"
                " ends at other bits",
                self.kind, self._begun_by, self.processes.size,
            )  # fmt: skip
        with closing(self), deaths_told(), signals.deferred() as stop:
            while not self.finished:
                self.start_epoch()
                self._run_steps(checkpoint, bar, stop)
                self._end_epoch(checkpoint, logs, bar)
            # A signal may have come while the last epoch was evaluated, after the last step had
            # looked. `deferred` would raise as well, but could not tell what was saved.
            self._agreed(stop)
            stop.check(self._saved)

    def _end_epoch(self, checkpoint: Path | None, logs: Logs, bar: StepBar) -> None:
        # `end_epoch` derives a genotype, which refuses logits that are not finite by an error that
        # names neither step nor epoch. So the run is judged first.
        self.check_finite()
        if self.processes.size > 1:  # to ask for states is work
            # Each process continues with its own; a computation that gives other bits on another
            # machine, or draws another number of times, would part them.
            drawn = [torch.get_rng_state(), *(g.get_state() for g in self.generators().values())]
            parts = {name: part.state_dict() for name, part in self.checkpointed().items()}
            self.processes.check_bits({**parts, "random state": drawn})
        figures = {**self.means(), **self.precision.figures(), **self.end_epoch()}
        self.history.append({"epoch": self.epoch, **figures})
        self.precision.end_epoch()
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
            self.make_step()
            steps += 1
            stops = self._agreed(stop)
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

    def _agreed(self, stop: signals.Stop) -> bool:
        """Tells whether the run stops here: all processes do, after the same step, or none."""
        stop.number = self.processes.largest(stop.number or 0) or None
        return stop.number is not None

    def save(self, path: Path | None) -> None:
        """Saves everything that the rest of the run depends on; nothing where there is no path.

        Of several processes the first one writes, and the others wait until it has.

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
        if self.processes.is_first:
            save_checkpoint(path, self.kind, state)
        self.processes.wait()
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
        """Returns what the run that saved a state has otherwise than this one, by its name.

        Another number of processes is no other run, and then nor is another number of threads.
        """
        found = differences({"processes": _processes_of(state), **state["run"]}, self.identity())
        if found.pop("processes", None):
            found.pop("threads", None)
        return found

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
        self._begun_by = _processes_of(state)
        self._saved_as(path)


def _processes_of(state: Mapping[str, Any]) -> int:
    # Checkpoints from before there were several do not tell.
    return int(state["run"].get("processes", 1))
