"""Measures the first-order step on random images: eager, torch.compile and fastnas side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo import config as dynamo_config

from fastnas.benchmarks.harness.cudnn import cudnn_as_measured
from fastnas.benchmarks.harness.memory import peak_bytes, peak_rss_of, saved_bytes
from fastnas.benchmarks.harness.schema import Conditions, Row, new_row
from fastnas.benchmarks.harness.timing import Timing, measure
from fastnas.benchmarks.harness.verify import (
    EAGER,
    YES,
    Exact,
    disagreement,
    errors,
    first_line,
    not_run,
)
from fastnas.benchmarks.search.ahead import CompileAhead, step_command
from fastnas.benchmarks.search.providers import DTYPES, PROVIDERS, SIZES, Size, StepSettings
from fastnas.benchmarks.search.setup import Setup, build
from fastnas.spaces import get_space

REPEATS = {"cpu": 3, "cuda": 30}
QUICK_REPEATS = 3
REPEATS_ALONE = {"cpu": 1, "cuda": 5}
"""For the first row of a provider, which another replaces where the run ends by itself."""
LEAST_REPEATS = 7
SECONDS = 60
"""For the repeats on a GPU; slow steps get fewer, down to `LEAST_REPEATS`."""
# A ReLU or max-pooling whose inputs round to the other side moves a gradient by far more than eps:
# over the default network torch's own two layouts are 2.5e-3 of the norm apart.
ROUNDING = 1e-2
EAGER_ROUNDING = {torch.float32: ROUNDING, torch.bfloat16: 0.75}
"""How far eager, the yardstick, may be off in units of the gradient's norm: in bfloat16 it is 0.26
(logits) and 0.18 (params) off in the default network; 1 is what no gradient at all is off."""
RSS_STEPS = 1
VERIFIED_BATCH = 8
"""On a CPU, where the convolutions of fp64 are slow."""
EXACT = "checkpoint"
"""Eager's own mathematics, in the memory that fp64 at batch 256 leaves."""
# A mixed op is compiled for each combination of shape, batch and who needs a gradient.
RECOMPILATIONS = 128

Say = Callable[[str], object]


class Steps:
    """Holds the steps of a run: built, verified against eager in fp64, and kept to be timed.

    Attributes:
        verdicts: provider to "yes", "no: how" or "not run: why".
        setups: of the providers that are right.
    """

    def __init__(self, settings: StepSettings, device: str, say: Say) -> None:
        self.settings, self.device, self.say = settings, device, say
        self.dtype = DTYPES[settings.dtype]
        self.verdicts: dict[str, str] = {}
        self.setups: dict[str, Setup] = {}
        self._ahead = CompileAhead(settings, device)

    def verify(self, providers: Iterable[str]) -> Iterator[str]:
        """Makes one step with each, and yields the name of each that has a verdict.

        Eager is the first, or, where it does not fit into memory, what it may be off at most is the
        yardstick.
        """
        size = self._verified_size()
        exact_setup = build(EXACT, size, self.device, self.dtype, wide=True)
        exact_setup.step()
        exact = {
            name: Exact(value, ROUNDING * float(torch.linalg.vector_norm(value)), by_norm=True)
            for name, value in exact_setup.gradients().items()
        }
        # The fp64 network would otherwise stay in memory beside all that follow.
        del exact_setup
        loose = EAGER_ROUNDING[self.dtype] / ROUNDING
        wide = {name: replace(e, rounding=loose * e.rounding) for name, e in exact.items()}
        eager = {name: float(right.rounding) for name, right in wide.items()}
        for name in providers:
            self.say(f"{size.op}: verifying {name}")
            setup = self._first_step(name, size)
            if isinstance(setup, str):
                self.verdicts[name] = setup
                yield name
                continue
            got = setup.gradients()
            if name == EAGER:
                # From here on eager's own error is the yardstick of all others.
                eager = errors(got, exact)
                reason = disagreement(got, wide, dict.fromkeys(exact, 0.0))
            else:
                reason = disagreement(got, exact, eager)
            self.verdicts[name] = YES if reason is None else f"no: {reason}"
            if reason is None:
                self.setups[name] = self._timed(name, setup, size)
            yield name

    def _first_step(self, name: str, size: Size) -> Setup | str:
        """Returns a search one step on, or a verdict."""
        provider = PROVIDERS[name]
        reason = self._ahead.why_not(name)
        if reason is not None:
            return f"not run: {reason}"
        try:
            setup = build(name, size, self.device, self.dtype)
            if provider.graph:
                setup.capture()
            setup.step()
            return setup
        # A provider that does not fit is a result of its own, not a wrong one.
        except torch.OutOfMemoryError as error:
            return not_run(error)
        except Exception as error:
            # A compilation or a capture may fail for reasons of its own; what runs as it is written
            # may not.
            may_fail = provider.compiled or provider.graph
            return not_run(error) if may_fail else f"no: {first_line(error)}"

    def _timed(self, name: str, setup: Setup, size: Size) -> Setup:
        whole = self.settings.size
        # Where a smaller batch was verified, the whole one is built anew from the same seed.
        return setup if size == whole else build(name, whole, self.device, self.dtype)

    def _verified_size(self) -> Size:
        size = self.settings.size
        if self.device != "cpu":
            return size
        return replace(size, batch=min(size.batch, VERIFIED_BATCH))

    def time_alone(self, name: str) -> dict[str, Timing]:
        """Times one provider, if it is right, while others are still to be verified."""
        calls = {name: self.setups[name].step} if name in self.setups else {}
        repeats = REPEATS_ALONE[self.device]
        return measure(calls, repeats=repeats, warmup=1, device=self.device, drain=True)

    def time(self) -> dict[str, Timing]:
        """Times the setups, in turn."""
        calls = {name: setup.step for name, setup in self.setups.items()}
        repeats = QUICK_REPEATS if self.settings.quick else REPEATS[self.device]
        if self.device != "cpu" and not self.settings.quick:
            # One round tells how many fit into the time that there is.
            once = measure(calls, repeats=1, warmup=1, device=self.device, drain=True)
            round_ms = sum(t.median_ms for t in once.values())
            repeats = min(repeats, max(LEAST_REPEATS, int(SECONDS * 1e3 / max(round_ms, 1.0))))
        return measure(calls, repeats=repeats, warmup=1, device=self.device, drain=True)

    def row(
        self, conditions: Conditions, name: str, timing: Timing | None, weights: Mapping[str, Any]
    ) -> Row:
        """Returns what is known of a provider."""
        size, provider = self.settings.size, PROVIDERS[name]
        return new_row(
            conditions,
            suite="search",
            op=size.op,
            backend=reported_name(name),
            pass_="step",
            dtype=self.settings.dtype,
            shape=size.shape,
            K=get_space(size.space).num_candidates("normal"),
            layout=provider.layout,
            verified=self.verdicts[name],
            timing=timing,
            **weights,
        )

    def weights(self, name: str) -> dict[str, Any]:
        """Returns saved_bytes and peak_bytes of a step, if it is right.

        A graph saves nothing that can be seen from outside. torch.compile compiles anew to have its
        saved tensors seen, and its own memory would count on a CPU.
        """
        if name not in self.setups:
            return {}
        provider, setup = PROVIDERS[name], self.setups[name]
        if provider.graph:
            return {"peak_bytes": setup.graph_peak_bytes}
        found: dict[str, Any] = {}
        if not (provider.compiled and self.device == "cuda"):
            found["saved_bytes"] = saved_bytes(setup.step, exclude=setup.inputs())
        if self.device != "cpu":
            found["peak_bytes"] = peak_bytes(setup.step, self.device)
        elif not provider.compiled:
            found["peak_bytes"] = self._rss_growth(name)
        return found

    def _rss_growth(self, name: str) -> int:
        """Measures peak resident bytes that the steps add to a process that has built all."""
        threads = torch.get_num_threads()

        def peak(steps: int) -> int:
            return peak_rss_of(step_command(name, self.settings, "cpu", steps, threads))

        # Building takes memory too, so a process that makes no step is subtracted.
        return peak(RSS_STEPS) - peak(0)


def search_rows(
    conditions: Conditions, device: str, settings: StepSettings, say: Say
) -> Iterator[Row]:
    """Verifies, times and weighs the step of every provider; `say` hears what is going on.

    A provider's first row comes as soon as it is verified, timed by itself: a run that is stopped
    leaves it. Rows of all, timed in turn and weighed, replace those at the end.
    """
    size, names = settings.size, settings.providers(device)
    with dynamo_config.patch(recompile_limit=RECOMPILATIONS):
        steps = Steps(settings, device, say)
        alone: dict[str, Timing] = {}
        for name in steps.verify(names):
            alone |= steps.time_alone(name)
            best = reported(steps.verdicts, alone)[reported_name(name)]
            yield steps.row(conditions, best, alone.get(best), {})
        say(f"{size.op}: timing")
        timings = steps.time()
        for name in reported(names, timings).values():
            say(f"{size.op}: memory of {name}")
            yield steps.row(conditions, name, timings.get(name), steps.weights(name))


def reported_name(provider: str) -> str:
    return PROVIDERS[provider].reported_as or provider


def reported(names: Iterable[str], timings: Mapping[str, Timing]) -> dict[str, str]:
    """Picks the providers that get a row: of those of one name the fastest that is right."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(reported_name(name), []).append(name)

    def median(name: str) -> float:
        return timings[name].median_ms if name in timings else float("inf")

    return {name: min(group, key=median) for name, group in groups.items()}


def main() -> None:
    """Makes steps and exits: the process whose memory is measured, or that compiles ahead."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=RSS_STEPS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    size = size if arguments.batch is None else replace(size, batch=arguments.batch)
    with cudnn_as_measured(), dynamo_config.patch(recompile_limit=RECOMPILATIONS):
        setup = build(arguments.provider, size, arguments.device, DTYPES[arguments.dtype])
        for _ in range(arguments.steps):
            setup.step()
        if arguments.device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
