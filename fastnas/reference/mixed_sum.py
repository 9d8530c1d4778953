"""y = sum_k w_k v_k,  v_k = x_k | x_k + d_k | x_k d_k,  d = shift + scale eps (std(x) eps if gaussian additive)
dx_k = w_k dy | w_k dy | w_k d_k dy,  dw_k = <dy, v_k>.  d is constant in backward: drawn again, never stored.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.reference.skip_noise import apply_draw, noise_draw, philox_draw


def weighted_sum(x: Sequence[Tensor], w: Tensor) -> Tensor:
    """sum_k w_k x_k as the public DARTS code writes it: the baseline of the benchmarks."""
    return sum(w_k * x_k for w_k, x_k in zip(w, x))


def standard_deviations(x: Sequence[Tensor], noisy: Sequence[int], form: str) -> Tensor:
    """Unbiased std of each whole noisy term, float64 [len(noisy)]; [0] if not relative."""
    if form != "gaussian_additive" or not noisy:
        return torch.empty(0, dtype=torch.float64, device=x[0].device)
    if x[0].numel() < 2:  # torch warns of it
        return torch.full((len(noisy),), float("nan"), dtype=torch.float64, device=x[0].device)
    return torch.stack([x[k].detach().to(torch.float64).std() for k in noisy])


def draws(
    like: Tensor, noisy: Sequence[int], form: str, level: Tensor, rng: Tensor, std: Tensor
) -> dict[int, Tensor]:
    """d_k for each noisy term k, shaped and typed as `like`."""
    return {
        k: noise_draw(
            philox_draw(form, rng, j, like).to(like.dtype), level, std[j] if std.numel() else None
        )
        for j, k in enumerate(noisy)
    }


def mixed_sum(
    x: Sequence[Tensor],
    w: Tensor,
    noisy: Sequence[int] = (),
    form: str = "none",
    level: Tensor | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    """The specification of `fastnas.ops.mixed_sum`: its maths in eager torch, autograd included.

    Args:
        x: K tensors of one shape and dtype.
        w: [K] mixing weights.
        noisy: indices of the terms that carry noise; the j-th draws at Philox offset + j.
        form: `SkipNoise.form`, or "none".
        level: float64 [2], shift and scale (`SkipNoise.level`).
        rng: int64 [2], Philox key and offset.

    Returns:
        Tensor shaped and typed as the terms. Sums run in the dtype of the inputs.
    """
    v = list(x)
    if noisy:
        assert level is not None and rng is not None
        std = standard_deviations(x, noisy, form)
        for k, d in draws(x[0], noisy, form, level, rng, std).items():
            v[k] = apply_draw(x[k], d, form)
    return weighted_sum(v, w.to(x[0].dtype))


def mixed_sum_grads(
    dy: Tensor,
    x: Sequence[Tensor],
    w: Tensor,
    noisy: Sequence[int] = (),
    form: str = "none",
    level: Tensor | None = None,
    rng: Tensor | None = None,
    std: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """(dx_k for every k, dw) from the formula at the top; x may be empty, then dw is None."""
    w = w.to(dy.dtype)
    dx = [w_k * dy for w_k in w]
    v = list(x)
    if noisy:
        assert level is not None and rng is not None and std is not None
        for k, d in draws(dy, noisy, form, level, rng, std).items():
            if v:
                v[k] = apply_draw(x[k], d, form)
            if form.endswith("multiplicative"):
                dx[k] = dx[k] * d
    return dx, torch.stack([(dy * v_k).sum() for v_k in v]) if v else None
