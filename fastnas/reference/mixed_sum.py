"""y = sum_k w_k v_k,  v_k = x_k | x_k + d_k | x_k d_k,  d = shift + scale eps (std(x) eps if gaussian additive)
dx_k = w_k dy | w_k dy | w_k d_k dy,  dw_k = <dy, v_k>.  d is constant in backward: drawn again, never stored.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.checks import typed
from fastnas.reference.arguments import check_noise, check_shape, check_terms
from fastnas.reference.skip_noise import apply_draw, noise_draw, philox_draw


def weighted_sum(x: Sequence[Tensor], w: Tensor) -> Tensor:
    """Sums w_k x_k as the public DARTS code writes it: the baseline of the benchmarks.

    Nothing is checked, so that what is timed is that code.
    """
    return sum(w_k * x_k for w_k, x_k in zip(w, x))


@typed
def standard_deviations(x: Sequence[Tensor], noisy: Sequence[int], form: str) -> Tensor:
    """Returns each whole noisy term's unbiased std, float64 [len(noisy)]; [0] if not relative."""
    check_terms("x", x, torch.empty(len(x)))
    check_noise(len(x), noisy, form, torch.empty(2), torch.empty(2))
    if form != "gaussian_additive" or not noisy:
        return torch.empty(0, dtype=torch.float64, device=x[0].device)
    if x[0].numel() < 2:  # torch warns of it
        return torch.full((len(noisy),), float("nan"), dtype=torch.float64, device=x[0].device)
    # It is detached: the noise is a constant in backward, though its size follows x.
    return torch.stack([x[k].detach().to(torch.float64).std() for k in noisy])


def draws(
    like: Tensor, noisy: Sequence[int], form: str, level: Tensor, rng: Tensor, std: Tensor
) -> dict[int, Tensor]:
    """Draws d_k for each noisy term k, shaped and typed as `like`."""
    return {
        k: noise_draw(
            form,
            philox_draw(form, rng, j, like),
            level,
            std[j] if std.numel() else None,
            like.dtype,
        )
        for j, k in enumerate(noisy)
    }


@typed
def mixed_sum(
    x: Sequence[Tensor],
    w: Tensor,
    noisy: Sequence[int] = (),
    form: str = "none",
    level: Tensor | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    """Specifies `fastnas.ops.mixed_sum`: its maths in eager torch, autograd included.

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
    check_terms("x", x, w)
    check_noise(len(x), noisy, form, level, rng)
    v = list(x)
    if level is not None and rng is not None and noisy:
        # v_k = x_k + d_k or x_k d_k; other terms are summed as they are.
        std = standard_deviations(x, noisy, form)
        for k, d in draws(x[0], noisy, form, level, rng, std).items():
            v[k] = apply_draw(x[k], d, form)
    return weighted_sum(v, w.to(x[0].dtype))


@typed
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
    """Returns (dx_k for every k, dw) by the formula at the top; x may be empty, then dw is None."""
    if x:
        check_terms("x", x, torch.empty(len(x)))
        check_shape("dy", dy, x[0].shape)
    check_shape("w", w, [len(x) or None])
    check_noise(len(w), noisy, form, level, rng)
    w = w.to(dy.dtype)
    # dx_k = w_k dy, of noisy terms too where the noise is added: d counts as a constant.
    dx = [w_k * dy for w_k in w]
    v = list(x)
    if noisy and std is None:
        raise ValueError(f"std is None, but noisy is {list(noisy)}; what was drawn is needed")
    if level is not None and rng is not None and std is not None and noisy:
        for k, d in draws(dy, noisy, form, level, rng, std).items():
            if v:
                v[k] = apply_draw(x[k], d, form)
            # v = x d, so dx_k = w_k d_k dy.
            if form.endswith("multiplicative"):
                dx[k] = dx[k] * d
    return dx, torch.stack([(dy * v_k).sum() for v_k in v]) if v else None
