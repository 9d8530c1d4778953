"""Runs torch.compile within a time limit, in a process whose cache on disk is used later."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from time import perf_counter

from fastnas.benchmarks.search.providers import GRAPH, PROVIDERS, StepSettings


@dataclass
class CompileAhead:
    """Compiles the steps of providers before they are measured.

    A process can be stopped where a thread cannot; what it had compiled is in the cache, so that a
    second run gets further. A graph runs the same compiled code as the step that it captures.
    """

    settings: StepSettings
    device: str
    _reasons: dict[str, str | None] = field(default_factory=dict)
    _spent: float = 0.0

    def why_not(self, name: str) -> str | None:
        """Says why a provider cannot be measured, or None; compiles it if need be."""
        seconds = self.settings.compile_seconds
        if seconds is None or not PROVIDERS[name].compiled:
            return None
        stream = name.removesuffix(GRAPH)
        if stream not in self._reasons:
            start = perf_counter()
            self._reasons[stream] = self._compile(stream, seconds - self._spent)
            self._spent += perf_counter() - start
        return self._reasons[stream]

    def _compile(self, name: str, seconds: float) -> str | None:
        limit = f"the {self.settings.compile_seconds:.0f} s for torch.compile are used up"
        if seconds <= 0:
            return limit
        try:
            subprocess.run(
                step_command(name, self.settings, self.device),
                timeout=seconds,
                capture_output=True,
                text=True,
                check=True,
            )
        except subprocess.TimeoutExpired:
            return limit
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
            # The last line of a traceback names the error; the cell of a table has room for no
            # more.
            return lines[-1][:200]
        return None


def step_command(
    name: str, settings: StepSettings, device: str, steps: int = 1, threads: int | None = None
) -> list[str]:
    """Returns the command that makes steps and exits."""
    size = settings.size
    options = ["--size", settings.size_name, "--batch", str(size.batch), "--dtype", settings.dtype]
    options += ["--device", device, "--steps", str(steps)]
    if threads is not None:
        options += ["--threads", str(threads)]
    return [sys.executable, "-m", "fastnas.benchmarks.search.step", name, *options]
