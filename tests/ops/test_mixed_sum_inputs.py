"""Bad input to mixed_sum: an error that names the argument, what was given and what is allowed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas import BackendError, SkipNoise

NOISE = SkipNoise()
X = torch.arange(6.0).view(2, 3)
LEVEL, RNG = NOISE.level(), torch.tensor([1, 2])


def ones(terms: int = 2, **settings: Any) -> Tensor:
    return torch.ones(terms, **settings)


BAD: list[tuple[type[Exception], str, list[Any], Any, dict[str, Any]]] = [
    (ValueError, "x is empty; at least one term is needed", [], ones(0), {}),
    (TypeError, "x[1] is a float; a Tensor is needed", [X, 2.0], ones(), {}),
    (TypeError, "x[0] is a list; a Tensor is needed", [[1.0], X], ones(), {}),
    (TypeError, "x[0] is torch.int64; allowed: float32, bfloat16, float16, float64",
     [X.long(), X.long()], ones(), {}),
    (TypeError, "x[0] is torch.complex64; allowed: float32", [X.cfloat()], ones(1), {}),
    (TypeError, "x[0] is torch.float8_e4m3fn; allowed:", [X.to(torch.float8_e4m3fn)], ones(1), {}),
    (ValueError, "x[1] has shape [3, 2], x[0] has [2, 3]; all terms need one shape",
     [X, X.T], ones(), {}),
    (ValueError, "x[1] has shape [3], x[0] has [2, 3]", [X, X[0]], ones(), {}),
    (TypeError, "x[1] is torch.float64, x[0] is torch.float32; one dtype is needed",
     [X, X.double()], ones(), {}),
    (ValueError, "x[1] is on meta, x[0] on cpu", [X, X.to("meta")], ones(), {}),
    (TypeError, "w is a list; a Tensor is needed", [X, X], [0.5, 0.5], {}),
    (ValueError, "w has shape [3] for 2 terms; [2] is needed", [X, X], ones(3), {}),
    (ValueError, "w has shape [1] for 2 terms; [2] is needed", [X, X], ones(1), {}),
    (ValueError, "w has shape [] for 1 terms; [1] is needed", [X], torch.tensor(1.0), {}),
    (ValueError, "w has shape [1, 2] for 2 terms; [2] is needed", [X, X], ones()[None], {}),
    (TypeError, "w is torch.int64; a floating point dtype is needed",
     [X, X], ones(dtype=torch.int64), {}),
    (TypeError, "w is torch.bool; a floating point", [X, X], ones(dtype=torch.bool), {}),
    (ValueError, "w is on meta, the terms on cpu", [X, X], ones(device="meta"), {}),
    (ValueError, "noisy is [0], but noise is None", [X, X], ones(), {"noisy": [0]}),
    (ValueError, "noisy is [2]; distinct indices in 0..1 are allowed",
     [X, X], ones(), {"noisy": [2], "noise": NOISE}),
    (ValueError, "noisy is [-1]; distinct", [X, X], ones(), {"noisy": [-1], "noise": NOISE}),
    (ValueError, "noisy is [1, 1]; distinct", [X, X], ones(), {"noisy": (1, 1), "noise": NOISE}),
    (ValueError, "level is torch.float32 [2]; torch.float64 [2] is needed",
     [X], ones(1), {"noisy": [0], "noise": NOISE, "level": LEVEL.float()}),
    (ValueError, "level is torch.float64 [1]; torch.float64 [2] is needed",
     [X], ones(1), {"noisy": [0], "noise": NOISE, "level": LEVEL[:1]}),
    (ValueError, "level is on meta, the terms on cpu",
     [X], ones(1), {"noisy": [0], "noise": NOISE, "level": LEVEL.to("meta")}),
    (ValueError, "rng is torch.int32 [2]; torch.int64 [2] is needed",
     [X], ones(1), {"noisy": [0], "noise": NOISE, "rng": RNG.int()}),
    (ValueError, "rng is torch.int64 [1, 2]; torch.int64 [2] is needed",
     [X], ones(1), {"noisy": [0], "noise": NOISE, "rng": RNG[None]}),
    (ValueError, "rng is on meta, the terms on cpu",
     [X], ones(1), {"noisy": [0], "noise": NOISE, "rng": RNG.to("meta")}),
    (BackendError, "backend is 'cdua'; allowed: eager, cpu", [X], ones(1), {"backend": "cdua"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "x", "w", "settings"), BAD, ids=[case[1] for case in BAD]
)
def test_bad_input(
    error: type[Exception], message: str, x: list[Any], w: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fastnas.mixed_sum(x, w, **settings)


@pytest.mark.backends("cpu", "cuda", "triton")
def test_more_terms_than_a_kernel_takes(backend: Any) -> None:
    x = [X.to(backend.device)] * 129
    w = ones(129, device=backend.device)
    message = f"129 terms; the {backend.name} kernel takes 128"
    with pytest.raises(BackendError, match=message):
        fastnas.mixed_sum(x, w, backend=backend.name)
    torch.testing.assert_close(fastnas.mixed_sum(x, w), 129 * x[0])


def test_meta_tensors_give_the_shape() -> None:
    x = [X.to("meta"), X.to("meta")]
    y = fastnas.mixed_sum(x, ones(device="meta"))
    assert y.shape == (2, 3)
    assert y.device.type == "meta"


BAD_NOISE: list[tuple[str, dict[str, Any]]] = [
    ("noise kind is 'normal'; allowed: gaussian, uniform", {"kind": "normal"}),
    ("noise mixture is 'sum'; allowed: additive, multiplicative", {"mixture": "sum"}),
    ("noise factor is -0.1; a finite number >= 0 is allowed", {"factor": -0.1}),
    ("factor is nan; a finite number is needed", {"factor": math.nan}),
    ("factor is inf; a finite number is needed", {"factor": math.inf}),
    ("mean is inf; a finite number is needed", {"mean": math.inf}),
    ("mean is nan; a finite number is needed", {"mean": math.nan}),
    ("mixture is 'additive' and mean None; of bernoulli", {"kind": "bernoulli"}),
    (
        "mixture is 'multiplicative' and mean 0.5; of bernoulli",
        {"kind": "bernoulli", "mixture": "multiplicative", "mean": 0.5},
    ),
    (
        "factor is 1; below 1 is allowed of bernoulli",
        {"kind": "bernoulli", "mixture": "multiplicative", "factor": 1},
    ),
]


@pytest.mark.parametrize(("message", "settings"), BAD_NOISE, ids=[m for m, _ in BAD_NOISE])
def test_bad_noise(message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SkipNoise(**settings)


@pytest.mark.parametrize(
    ("noise", "form", "level"),
    [
        (SkipNoise(), "gaussian_additive", [0, 0.2]),
        (SkipNoise("gaussian", "multiplicative"), "gaussian_multiplicative", [1, 0.2]),
        (SkipNoise("uniform", "additive", None, 0.12), "uniform_additive", [0, 0.6]),
        (SkipNoise("uniform", "multiplicative", 0.5, 0.12), "uniform_multiplicative", [0.5, 0.6]),
    ],
)
def test_what_noise_says_of_itself(noise: SkipNoise, form: str, level: list[float]) -> None:
    assert noise.form == form
    assert noise.is_relative == (form == "gaussian_additive")
    assert noise.level().dtype == torch.float64
    assert noise.level().tolist() == pytest.approx(level)
    assert noise.level(0.5).tolist() == pytest.approx([0.5 * value for value in level])


def test_what_dropout_says_of_itself() -> None:
    noise = SkipNoise("bernoulli", "multiplicative", factor=0.6)
    assert noise.form == "bernoulli_multiplicative"
    assert not (noise.is_relative or noise.on_reductions)
    assert noise.level().tolist() == pytest.approx([0.4, 2.5])
    assert noise.level(0.5).tolist() == pytest.approx([0.7, 1 / 0.7])
    with pytest.raises(ValueError, match=r"amplitude is 2; times the factor 0\.6 it has to be"):
        noise.level(2)
