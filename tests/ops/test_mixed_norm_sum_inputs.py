"""Bad input to mixed_norm_sum: an error that names the argument and what is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import make as make_sum
from torch import Tensor

import fastnas
from fastnas import BackendError, SkipNoise
from fastnas.ops import OPS

Z = torch.arange(12.0).view(2, 3, 2)
NOISE = SkipNoise()
PAIR = torch.zeros(3), torch.ones(3)
NORMED = {"normed": [True]}
W1, W2 = torch.ones(1), torch.ones(2)

BAD: list[tuple[type[Exception], str, list[Any], Any, dict[str, Any]]] = [
    (ValueError, "z is empty; at least one term is needed", [], torch.ones(0), {"normed": []}),
    (TypeError, "z[0] is a float; a Tensor is needed", [1.0], W1, NORMED),
    (TypeError, "z[0] is torch.int64; allowed: float32, bfloat16, float16, float64",
     [Z.long()], W1, NORMED),
    (ValueError, "z[1] has shape [3, 2, 2], z[0] has [2, 3, 2]; all terms need one shape",
     [Z, Z.transpose(0, 1)], W2, {"normed": [True] * 2}),
    (TypeError, "z[1] is torch.float64, z[0] is torch.float32; one dtype is needed",
     [Z, Z.double()], W2, {"normed": [True] * 2}),
    (ValueError, "z[1] is on meta, z[0] on cpu", [Z, Z.to("meta")], W2, {"normed": [True] * 2}),
    (ValueError, "z[0] has shape [12]; [N, C, ...] is needed", [Z.flatten()], W1, NORMED),
    (TypeError, "w is a list; a Tensor is needed", [Z], [1.0], NORMED),
    (ValueError, "w has shape [2] for 1 terms; [1] is needed", [Z], W2, NORMED),
    (TypeError, "w is torch.int64; a floating point dtype is needed", [Z], W1.long(), NORMED),
    (ValueError, "w is on meta, the terms on cpu", [Z], W1.to("meta"), NORMED),
    (ValueError, "normed is [True, True] for 1 terms; a bool each is needed",
     [Z], W1, {"normed": [True, True]}),
    (ValueError, "normed is [2] for 1 terms; a bool each is needed", [Z], W1, {"normed": [2]}),
    (ValueError, "eps is -1; a finite number >= 0 is allowed", [Z], W1, {**NORMED, "eps": -1}),
    (ValueError, "eps is nan; a finite number >= 0", [Z], W1, {**NORMED, "eps": float("nan")}),
    (ValueError, "running has 2 entries for 1 terms; a (running_mean, running_var) or None each",
     [Z], W1, {**NORMED, "running": [PAIR, PAIR]}),
    (ValueError, "running[0] is given, but term 0 is not normed; None is needed",
     [Z], W1, {"normed": [False], "running": [PAIR]}),
    (TypeError, "running[0] is no pair of Tensors (running_mean, running_var)",
     [Z], W1, {**NORMED, "running": [PAIR[:1]]}),
    (ValueError, "running[0] is torch.float32 [3] on cpu and torch.float32 [2] on cpu; floating"
     " point [3] on cpu is needed for both",
     [Z], W1, {**NORMED, "running": [(PAIR[0], PAIR[1][:2])]}),
    (ValueError, "running[0] is torch.int64 [3] on cpu and torch.float32 [3] on cpu; floating",
     [Z], W1, {**NORMED, "running": [(PAIR[0].long(), PAIR[1])]}),
    (ValueError, "running[0] is None, but training is False; a (running_mean, running_var)",
     [Z], W1, {**NORMED, "training": False}),
    (ValueError, "noisy is [0], but term 0 is normed; only a term that is not can carry noise",
     [Z], W1, {**NORMED, "noisy": [0], "noise": NOISE}),
    (ValueError, "noisy is [0], but noise is None", [Z], W1, {"normed": [False], "noisy": [0]}),
    (ValueError, "noisy is [1]; distinct indices in 0..0 are allowed",
     [Z], W1, {"normed": [False], "noisy": [1], "noise": NOISE}),
    (ValueError, "level is torch.float32 [2]; torch.float64 [2] is needed",
     [Z], W1, {"normed": [False], "noisy": [0], "noise": NOISE, "level": NOISE.level().float()}),
    (ValueError, "rng is torch.int32 [2]; torch.int64 [2] is needed",
     [Z], W1, {"normed": [False], "noisy": [0], "noise": NOISE,
               "rng": torch.ones(2, dtype=torch.int32)}),
    (BackendError, "backend is 'cdua'; allowed: eager, cpu", [Z], W1,
     {**NORMED, "backend": "cdua"}),
    (BackendError, "backend='cuda' cannot run mixed_norm_sum", [Z], W1,
     {**NORMED, "backend": "cuda"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "z", "w", "settings"), BAD, ids=[case[1] for case in BAD]
)
def test_bad_input(
    error: type[Exception], message: str, z: list[Any], w: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fastnas.mixed_norm_sum(z, w, **settings)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_per_channel_raises_what_torch_raises(shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as torchs:
        torch.nn.functional.batch_norm(z, None, None, training=True)
    with pytest.raises(ValueError, match=re.escape(str(torchs.value))):
        fastnas.mixed_norm_sum([z], W1, **NORMED)
    assert fastnas.mixed_norm_sum([z], W1, normed=[False]).shape == shape
    y = fastnas.mixed_norm_sum([z], W1, **NORMED, running=[PAIR], training=False)
    assert y.shape == shape


def test_nothing_is_updated_when_a_call_fails() -> None:
    running = torch.zeros(3), torch.ones(3)
    with pytest.raises(BackendError):
        fastnas.mixed_norm_sum([Z], W1, **NORMED, running=[running], backend="cuda")
    assert not running[0].any()


def test_more_terms_than_a_kernel_takes_fall_back_to_eager() -> None:
    z, normed = make_sum((2, 3, 4), 129, torch.float32).x, [True] * 129
    with pytest.raises(BackendError, match="129 terms; the cpu kernel takes 128"):
        fastnas.mixed_norm_sum(z, torch.ones(129), normed=normed, backend="cpu")
    y = fastnas.mixed_norm_sum(z, torch.ones(129), normed=normed)
    assert torch.equal(
        y, fastnas.mixed_norm_sum(z, torch.ones(129), normed=normed, backend="eager")
    )


def test_meta_tensors_give_the_shape() -> None:
    y = fastnas.mixed_norm_sum([Z.to("meta")], W1.to("meta"), **NORMED)
    assert y.shape == Z.shape
    assert y.device.type == "meta"


def test_the_binding_refuses_what_would_overrun_its_tables() -> None:
    native = pytest.importorskip("fastnas._C")
    terms = native.MixedSumParams(x=[0] * 3)
    for rows in (0, 2, 4, native.max_terms + 1):
        with pytest.raises(ValueError, match=f"norm has {rows} of 3 terms"):
            native.MixedNormSumParams(sum=terms, norm=[-1] * rows)


def test_auto_on_cuda_falls_back_to_eager_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnas.backends import BACKENDS, choose
    from fastnas.backends.registry import forget_choices

    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(BACKENDS[name]), "unavailable", lambda self: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget_choices()
    asked = OPS["mixed_norm_sum"], torch.device("cuda")
    assert choose(*asked, torch.float32, 7, "auto") == "cuda"
    assert choose(*asked, torch.float64, 7, "auto") == "eager"
    forget_choices()


def test_any_sequence_will_do() -> None:
    z: tuple[Tensor, ...] = (Z, Z + 1)
    y = fastnas.mixed_norm_sum(z, W2, normed=(True, False))
    assert y.shape == Z.shape
