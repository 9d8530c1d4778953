"""Runs every op once, forward and backward, and sampled paths: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m fastnas.benchmarks.sanitize

torch's caching allocator hides what is read or written outside a tensor from it, so
PYTORCH_NO_CUDA_MEMORY_CACHING=1 has to be set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from fastnas.benchmarks.harness.verify import Case
from fastnas.benchmarks.ops.mixed_edges import CellCase, MixedOpCase
from fastnas.benchmarks.ops.mixed_norm_sum import MixedNormSumCase
from fastnas.benchmarks.ops.mixed_sum import NOISE, MixedSumCase
from fastnas.benchmarks.ops.relu_conv_bn import ReluConvBnCase
from fastnas.benchmarks.ops.sample_paths import SamplePathsCase
from fastnas.benchmarks.search.providers import Size
from fastnas.benchmarks.search.single_path import PROVIDERS, build
from fastnas.ops import OPS
from fastnas.ops.device_choice import choice_on_device
from fastnas.reference import TOPOLOGIES

ODD = (3, 5, 7, 9)
EVEN = (2, 8, 6, 6)
"""Small sizes: the first divides by no vector, warp or tile."""
PATHS = Size(C=4, layers=3, batch=3, pixels=9)


def cases() -> dict[str, list[Case]]:
    """Maps an op to its cases: odd sizes, both strides, both layouts, bf16, noise."""
    bf16 = torch.bfloat16
    return {
        "mixed_sum": [
            MixedSumCase(ODD, K=3),
            MixedSumCase(EVEN, noise=NOISE),
            MixedSumCase(EVEN, bf16, layout="channels_last", noise=NOISE),
        ],
        "mixed_norm_sum": [
            MixedNormSumCase(ODD),
            MixedNormSumCase(EVEN, bf16, layout="channels_last"),
        ],
        "mixed_edges": [
            *(MixedOpCase((2, 16, 7, 9), stride) for stride in (1, 2)),
            MixedOpCase((2, 16, 8, 8), dtype=bf16),
            CellCase((2, 16, 8, 8)),
            CellCase((2, 16, 8, 8), "reduce"),
        ],
        "relu_conv_bn": [
            ReluConvBnCase((2, 16, 7, 9), 8),
            ReluConvBnCase((2, 16, 8, 8), 16, stride=2),
        ],
        "sample_paths": [SamplePathsCase(topology, 9) for topology in TOPOLOGIES],
    }


def run(case: Case, device: str) -> int:
    """Runs forward and backward of every fused provider of a case; returns how many ran.

    Raises:
        RuntimeError: a result is not finite.
    """
    problem = case.problem(device, full=False)
    # Eager's kernels are torch's own, which are not what this watches.
    fused = [name for name in problem.forwards if name.startswith("fastnas")]
    for name in fused:
        for what, t in problem.outputs(name).items():
            # A read beyond a tensor may end in no error of the tool, but in whatever lay there.
            if not bool(t.isfinite().all()):
                raise RuntimeError(f"{case.op} {case.shape} {name}: {what} is not finite")
    return len(fused)


def run_paths(device: str) -> None:
    """Makes a search step on sampled paths that the kernels read, as in a CUDA graph.

    Raises:
        RuntimeError: a parameter is not finite after it.
    """
    search = build(PROVIDERS["fastnas-rome"], PATHS, device)
    # Without it the path is read on the host, and the kernels that read it would not run.
    with choice_on_device():
        search.step()
    if not all(bool(p.isfinite().all()) for p in search.network.parameters()):
        raise RuntimeError("search step on sampled paths: a parameter is not finite")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--op", choices=OPS, default=None, help="only this op")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("sanitize: torch finds no CUDA device", file=sys.stderr)
        return 2
    ran = 0
    for op, table in cases().items():
        for case in table if given.op in (None, op) else ():
            count = run(case, given.device)
            ran += count
            why = "" if count else f", {OPS[op].absent.get(given.device, 'none can run here')}"
            print(f"{case.op} {case.dtype} {case.shape}: {count} providers{why}", flush=True)
    if given.op is None:
        run_paths(given.device)
        print("search step on sampled paths", flush=True)
    if not ran:
        print(f"sanitize: no op has kernels that run on {given.device}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
