"""relu_conv_bn: bad input gets one clear error, and nothing is touched."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conv_cases import make

from fastnas import BackendError
from fastnas.ops import relu_conv_bn

X = make(1, dtype=torch.float32).x
P = torch.ones(6, 3, 1, 1)
HALVES = [torch.ones(3, 3, 1, 1)] * 2
PAIR = torch.zeros(6), torch.ones(6)
BAD: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
    (TypeError, "x is a list; a Tensor is needed", [1.0], [P], {}),
    (ValueError, "x has shape [3, 5, 7]; [N, C, H, W] is needed", X[0], [P], {}),
    (TypeError, "x is torch.int64; allowed: float32, bfloat16, float16, float64",
     X.long(), [P], {}),
    (ValueError, "params has 0 tensors; 1, or 2 at stride 2, are needed", X, [], {}),
    (ValueError, "params has 3 tensors; 1, or 2 at stride 2, are needed", X, [P] * 3, {}),
    (ValueError, "params[0] has shape [6, 4, 1, 1]; [C, 3, 1, 1] is needed, C at least 1",
     X, [torch.ones(6, 4, 1, 1)], {}),
    (ValueError, "params[0] has shape [6, 3, 3, 3]; [C, 3, 1, 1] is needed",
     X, [torch.ones(6, 3, 3, 3)], {}),
    (ValueError, "params[1] has shape [6, 3, 1, 1]; [C, 3, 1, 1] is needed, C at least 1",
     X, [HALVES[0], P], {}),
    (TypeError, "params[0] is torch.float64, x is torch.float32; one dtype is needed",
     X, [P.double()], {}),
    (TypeError, "params[0] is a NoneType; a Tensor is needed", X, [None], {}),
    (ValueError, "params[0] is on meta, x on cpu", X, [P.to("meta")], {}),
    (ValueError, "1 value(s) per channel, x has shape [1, 3, 1, 1]; more than 1 is needed in"
     " training", X[:1, :, :1, :1], [P], {}),
    (ValueError, "1 value(s) per channel, x has shape [1, 3, 2, 2]", X[:1, :, :2, :2], HALVES, {}),
    (ValueError, "0 value(s) per channel", X[:0], [P], {}),
    (ValueError, "training is False and running is None; statistics are needed",
     X, [P], {"training": False}),
    (ValueError, "running", X, [P], {"running": (PAIR[0][:5], PAIR[1][:5])}),
    (ValueError, "running", X, [P], {"running": (PAIR[0][:1], PAIR[1][:1])}),
    (ValueError, "running", X, [P],
     {"running": (PAIR[0][:1], PAIR[1][:1]), "training": False}),
    (TypeError, "running is no pair of Tensors", X, [P], {"running": PAIR[:1]}),
    (ValueError, "eps is -1", X, [P], {"eps": -1}),
    (BackendError, "relu_conv_bn has no float64 kernel on triton", X.double(), [P.double()],
     {"backend": "triton"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "x", "params", "settings"), BAD, ids=[case[1] for case in BAD]
)
def test_bad_input(
    error: type[Exception], message: str, x: Any, params: Any, settings: dict[str, Any]
) -> None:
    before = [t.clone() for t in PAIR]
    with pytest.raises(error, match=re.escape(message)):
        relu_conv_bn(x, params, **settings)
    assert all(torch.equal(t, saved) for t, saved in zip(PAIR, before)), "running was updated"


@pytest.mark.parametrize("paths", [0, 4, 1.5])
def test_paths_divide_the_images(paths: object) -> None:
    x, p = torch.ones(6, 2, 2, 2), torch.ones(2, 2, 1, 1)
    with pytest.raises(ValueError, match=f"paths is {paths}; a divisor of the 6 images"):
        relu_conv_bn(x, [p], paths=paths)
