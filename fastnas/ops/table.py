"""The op table: what each op computes, where, in which dtypes. Dispatch, tests and info read it."""

from __future__ import annotations

import torch

from fastnas.backends import OpInfo

_GPU = (torch.float32, torch.bfloat16, torch.float16)
_CELL = (torch.float32, torch.bfloat16, torch.float64)
_GPU_CELL = (torch.float32, torch.bfloat16)

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
    "mixed_norm_sum": OpInfo(
        stem="mixed_norm_sum",
        summary="y = sum_k w_k BN(z_k), and skips as in mixed_sum; dw and every dz_k in two passes",
        dtypes={
            "eager": (*_GPU, torch.float64),
            "cpu": (*_GPU, torch.float64),
            "cuda": _GPU,
            "triton": _GPU,
        },
        max_terms=128,
        absent={},
    ),
    "mixed_edges": OpInfo(
        stem="mixed_edges",
        summary="the nodes of a DARTS cell straight from its states, batch norm folded in",
        dtypes={"eager": _CELL, "cpu": _CELL, "cuda": _GPU_CELL},
        max_terms=1,
        absent={"triton": "its cells run candidate by candidate and by mixed_norm_sum"},
    ),
    "relu_conv_bn": OpInfo(
        stem="relu_conv_bn",
        summary="BN(W relu(x)) with 1x1 kernels: the preprocessing of a DARTS cell",
        dtypes={"eager": _CELL, "cpu": _CELL, "cuda": _GPU_CELL, "triton": _GPU_CELL},
        max_terms=1,
        absent={},
    ),
    "sample_paths": OpInfo(
        stem="sample_paths",
        summary="paths through a cell: operations and edges by Gumbel noise, straight-through",
        dtypes={"eager": (torch.float32, torch.float64)},
        max_terms=128,
        absent={},
    ),
}
