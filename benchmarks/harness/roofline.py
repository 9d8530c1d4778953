"""Measures the roof of the other rows: what this device copies and multiplies at most."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastnas.benchmarks.harness.schema import Conditions, Row, new_row
from fastnas.benchmarks.harness.timing import Roof, Timing, measure
from fastnas.benchmarks.harness.verify import SEED, YES, eps_of, not_run

SUITE = "roofline"
MiB = 1 << 20
COPIES = (4 * MiB, 64 * MiB)
"""One tensor of a search, and all of a mixed op's."""
LARGE = {"cpu": 256 * MiB, "cuda": 1024 * MiB}
"""Far beyond every cache: the copy whose bandwidth is the roof."""
SIDES = {"cpu": 1024, "cuda": 8192}
TURNS = 512
PROGRAMS_PER_SM = 128
REPEATS = 11
QUICK_SHARE = 16


@dataclass(frozen=True)
class Probe:
    """Does work of a known amount; `check` says how its result is wrong, or None."""

    op: str
    backend: str
    dtype: torch.dtype
    shape: str
    call: Callable[[], object]
    check: Callable[[], str | None]
    bytes_moved: int | None = None
    fma: int | None = None


def copy_probe(device: str, size: int) -> Probe:
    # In uint8 a size is a number of bytes.
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def check() -> str | None:
        return None if torch.equal(source, target) else "the copy differs"

    return Probe(
        "copy", "torch", torch.uint8, str(size), lambda: target.copy_(source), check, 2 * size
    )


def matmul_probe(device: str, dtype: torch.dtype, side: int) -> Probe:
    """Multiplies matrices: IEEE fp32 unless torch is told otherwise; bf16 on tensor cores."""
    generator = torch.Generator().manual_seed(SEED)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    c = torch.empty_like(a)

    def check() -> str | None:
        # Eight rows are checked: the whole product in fp64 would take longer than what is measured.
        exact = a[:8].double() @ b.double()
        error, allowed = float((c[:8] - exact).abs().max()), eps_of(dtype) * side
        return None if error <= allowed else f"off by {error:.2g}, {allowed:.2g} is allowed"

    return Probe(
        *("matmul", "torch", dtype, f"{side}x{side}x{side}"),
        lambda: torch.mm(a, b, out=c),
        check,
        fma=side**3,
    )


def fma_probe(programs: int, turns: int, device: str = "cuda") -> Probe:
    """Multiplies and adds on CUDA cores; needs Triton."""
    kernels = importlib.import_module("fastnas.benchmarks.harness.fma")
    x = torch.linspace(-1, 1, programs * kernels.BLOCK, device=device)
    y = torch.empty_like(x)
    count = turns * kernels.UNROLLED

    def check() -> str | None:
        # This is the closed form of count steps x <- A x + B, whose fixed point is 2.
        exact = 2 + kernels.A**count * (x.double() - 2)
        error, allowed = float((y - exact).abs().max()), count * eps_of(torch.float32)
        return None if error <= allowed else f"off by {error:.2g}, {allowed:.2g} is allowed"

    return Probe(
        *("fma", "triton", torch.float32, f"{x.numel()}x{count}"),
        lambda: kernels.run(x, y, turns),
        check,
        fma=x.numel() * count,
    )


def measure_roof(device: str, quick: bool = False) -> Roof:
    """Measures copy bandwidth of a large array and the FMA rate (on a CPU by a matrix product)."""
    share = QUICK_SHARE if quick else 1
    size = LARGE[device] // share
    copied, _ = _run(copy_probe(device, size), device)
    probe = _fma_probe(device, quick)
    rate = None
    if not isinstance(probe, str):
        timing, verdict = _run(probe, device)
        assert probe.fma is not None
        rate = probe.fma / (timing.median_ms * 1e-3) if verdict == YES else None
    # A copy reads and writes every byte.
    return Roof(2 * size / (copied.median_ms * 1e-3), rate)


def _fma_probe(device: str, quick: bool) -> Probe | str:
    """Returns what the FMA rate is measured with, or why it cannot be."""
    if device == "cpu":
        return matmul_probe(device, torch.float32, SIDES[device] // (4 if quick else 1))
    if importlib.util.find_spec("triton") is None:
        return "not run: triton is not installed"
    # There are so many programs that those which end last are few beside all.
    programs = torch.cuda.get_device_properties().multi_processor_count * PROGRAMS_PER_SM
    return fma_probe(programs, TURNS // (QUICK_SHARE if quick else 1))


def _run(probe: Probe, device: str) -> tuple[Timing, str]:
    timing = measure({"": probe.call}, repeats=REPEATS, warmup=2, device=device)[""]
    wrong = probe.check()
    return timing, YES if wrong is None else f"no: {wrong}"


def roofline_rows(
    conditions: Conditions, device: str, quick: bool, say: Callable[[str], object]
) -> Iterator[Row]:
    """Times copies of three sizes, matrix products, and a GPU's multiply-adds."""
    share = QUICK_SHARE if quick else 1
    side = SIDES[device] // (4 if quick else 1)
    makers: list[Callable[[], Probe | str]] = [
        *(
            (lambda size=size: copy_probe(device, size // share))
            for size in (*COPIES, LARGE[device])
        ),
        *(
            (lambda dtype=dtype: matmul_probe(device, dtype, side))
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ]
    if device == "cuda":
        makers.append(lambda: _fma_probe(device, quick))
    for make in makers:
        yield _row(make, conditions, device, say)


def _row(
    make: Callable[[], Probe | str],
    conditions: Conditions,
    device: str,
    say: Callable[[str], object],
) -> Row:
    blank: dict[str, Any] = {"suite": SUITE, "pass_": "fwd", "K": None, "layout": "contiguous"}
    probe = make()
    if isinstance(probe, str):
        blank |= {"op": "fma", "backend": "triton", "dtype": "float32", "shape": ""}
        return new_row(conditions, verified=probe, **blank)
    say(f"{probe.op} {probe.shape}")
    timing: Timing | None = None
    try:
        timing, verified = _run(probe, device)
    except Exception as error:
        # A probe that fails is a row that says so, not the end of the run.
        verified = not_run(error)
    return new_row(
        conditions,
        **blank,
        op=probe.op,
        backend=probe.backend,
        dtype=str(probe.dtype).removeprefix("torch."),
        shape=probe.shape,
        verified=verified,
        timing=timing if verified == YES else None,
        bytes_moved=probe.bytes_moved,
        fma=probe.fma,
    )
