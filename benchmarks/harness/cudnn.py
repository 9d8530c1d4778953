"""Says how cuDNN runs the baselines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cudnn_as_measured() -> Iterator[None]:
    """Lets cuDNN pick its algorithms by timing, as the public DARTS code does; fp32 is fp32.

    torch lets cuDNN round the inputs of fp32 convolutions to TF32 unless it is told not to. fastnas
    does not round them unless it is told to, so a comparison of the same work has it off.
    """
    cudnn = torch.backends.cudnn
    # They are global, so whoever runs in this process later gets them back.
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = True, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before
