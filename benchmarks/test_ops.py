"""Runs the op cases under pytest-benchmark (`pytest benchmarks/`), each verified, then timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch_config

from fastnas.benchmarks.harness.run import OP_PASSES, op_cases, pass_call
from fastnas.benchmarks.harness.verify import EAGER, YES, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = op_cases(DEVICE, None, quick=True, full=False)


def _label(case: Any) -> str:
    return f"{case.op}-{str(case.dtype).removeprefix('torch.')}"


@pytest.fixture(autouse=True)
def keep_buffers() -> Iterator[None]:
    """Makes a compiled backward keep its buffers, without which it can run only once."""
    with functorch_config.patch(donated_buffer=False):
        yield


@pytest.mark.parametrize("pass_", OP_PASSES)
@pytest.mark.parametrize("provider", ["eager", "compile", "fastnas-cpu", "fastnas-cuda"])
@pytest.mark.parametrize("case", CASES, ids=_label)
def test_op(benchmark: Any, case: Any, provider: str, pass_: str) -> None:
    problem = case.problem(DEVICE, full=False)
    if provider not in problem.forwards:
        pytest.skip(f"{provider} cannot run on {DEVICE}")
    # Eager stays, because the check holds the others against it; what is not timed here is not
    # compiled.
    wanted = {name: problem.forwards[name] for name in {provider, EAGER}}
    problem = replace(problem, forwards=wanted)
    verdict = verify(problem)[provider]
    if verdict.startswith("not run"):
        pytest.skip(verdict)
    assert verdict == YES
    benchmark.group = f"{_label(case)} {pass_}"
    call = pass_call(problem, provider, pass_)

    def run() -> None:
        call()
        if DEVICE == "cuda":
            # A launch returns before its kernel ends, and pytest-benchmark stops its clock there.
            torch.cuda.synchronize()

    benchmark(run)
