"""The op table: what each op computes, where, in which dtypes. Dispatch, tests and info read it."""

from __future__ import annotations

import torch

from fastnas.backends import OpInfo

_GPU = (torch.float32, torch.bfloat16, torch.float16)

OPS: dict[str, OpInfo] = {
    "mixed_sum": OpInfo(
        stem="mixed_sum",
        summary="y = sum_k w_k x_k, skip noise in place; dw and every dx_k in one pass",
        dtypes={
            "eager": (*_GPU, torch.float64),
            "cpu": (*_GPU, torch.float64),
            "cuda": _GPU,
            "triton": _GPU,
        },
        max_terms=128,
        absent={},
    ),
}
