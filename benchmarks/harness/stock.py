"""Profiles torch's own kernels in one eager mixed op: `python -m ...harness.stock OUT.json`.

A profile, not a comparison: it tells why eager takes what it takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastnas import reference
from fastnas.benchmarks.harness.kernels import Kernel, profiled
from fastnas.benchmarks.harness.schema import current_conditions, refuse_existing
from fastnas.benchmarks.harness.verify import SEED
from fastnas.files import write_text
from fastnas.spaces import get_space

SHAPE = (64, 16, 32, 32)
CALLS = 20


def profile_mixed_op(shape: tuple[int, ...] = SHAPE, calls: int = CALLS) -> list[Kernel]:
    """Profiles the eager mixed op of S0 in fp32, all gradients, on the GPU."""
    torch.manual_seed(SEED)
    op = reference.MixedOp(get_space("S0").normal[0], shape[1], 1).cuda()
    x = torch.randn(shape, device="cuda", requires_grad=True)
    w = torch.softmax(torch.randn(8, device="cuda"), 0).requires_grad_()
    dy = torch.randn(shape, device="cuda")
    leaves = [x, w, *op.parameters()]

    def run() -> None:
        torch.autograd.grad(op(x, w), leaves, dy)

    return profiled(run, calls)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("stock: torch finds no CUDA device", file=sys.stderr)
        return 2
    try:
        refuse_existing(given.out)
    except FileExistsError as error:
        print(f"stock: {error}", file=sys.stderr)
        return 2
    found = profile_mixed_op()
    conditions = current_conditions("cuda")
    record = {
        "shape": list(SHAPE),
        "device": conditions.device,
        "torch": conditions.torch,
        "commit": conditions.commit,
        "kernels": [kernel._asdict() for kernel in found],
    }
    write_text(given.out, json.dumps(record, indent=2) + "\n")
    for kernel in found[:12]:
        print(f"{kernel.median_us:8.1f} us x {kernel.calls:4.1f}  {kernel.name[:110]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
