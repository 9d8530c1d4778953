"""A fixed part of the fuzzer, the same calls on every machine, and the fuzzer itself."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import DRAW
from draws import Draws
from results import ISAS, OPS, subject_of
from targets import under_test
from torch import Tensor
from worker import run

from fastnas.backends import KERNELS
from fastnas.ops import OPS as TABLE

SCRIPT = Path(__file__).with_name("ops.py")
CALLS = 400  # on each instruction set: 10 s of a core


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_calls_obey_the_rule(isa: str) -> None:
    native = pytest.importorskip("fastnas._C")
    if isa not in native.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    done = fuzz("--calls", str(CALLS), "--isa", isa)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{CALLS} calls: " in done.stdout
    right = int(done.stdout.rpartition(" calls: ")[2].split()[0])
    assert right > 0.8 * CALLS
    for op in TABLE:
        assert f"\n  {op} " in done.stdout, f"no call of {op}"


def test_a_seed_is_one_call() -> None:
    seed = next(seed for seed in range(99) if subject_of(seed)[0] == "mixed_sum")
    one, same = (Draws(seed) for _ in range(2))
    first, second = DRAW["mixed_sum"](one), DRAW["mixed_sum"](same)
    assert one.log == same.log
    for a, b in zip(first.inputs.x, second.inputs.x):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert a.stride() == b.stride()


class Spoiled:
    """The eager kernel of an op, one number of an output of `method` off by an eighth."""

    def __init__(self, op: str, method: str) -> None:
        self.kernel = KERNELS[op, "eager"]
        self.method = method

    def forward(self, *given: Any) -> Any:
        return self._spoiled("forward", self.kernel.forward(*given))

    def backward(self, *given: Any) -> Any:
        return self._spoiled("backward", self.kernel.backward(*given))

    def _spoiled(self, method: str, outputs: Any) -> Any:
        numbers = [t for t in tensors_of(outputs) if t.is_floating_point() and t.any()]
        for t in numbers[: 1 if method == self.method else 0]:
            t[(0,) * t.dim()] += t.abs().max() / 8
        return outputs


def tensors_of(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for part in outputs for t in tensors_of(part)]


def outcomes(op: str, method: str, calls: int) -> Counter[str]:
    """Of the first calls of an op on a backend of which one method is spoiled."""
    seeds = (seed for seed in itertools.count() if subject_of(seed)[0] == op)
    with under_test(op, Spoiled(op, method)) as name:
        return Counter(run(seed, name).outcome for seed in itertools.islice(seeds, calls))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("op", OPS)
def test_a_wrong_kernel_is_noticed_and_the_reference_is_right(op: str) -> None:
    pytest.importorskip("fastnas._C")
    right = outcomes(op, "", 25)
    assert right["right"] >= 15
    assert not right["miss"] + right["error"]
    for method in ("forward", "backward"):
        assert outcomes(op, method, 25)["miss"] >= 5, method


def test_a_process_that_dies_is_told_with_its_seed() -> None:
    done = fuzz("--calls", "1", "--module", "/nowhere/_C.so")
    assert done.returncode == 1
    assert "1 calls: 1 died" in done.stdout
    assert "--replay 0" in done.stdout
