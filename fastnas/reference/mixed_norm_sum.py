"""y = sum_k w_k v_k,  v_k = (z_k - mu_k) r_k,  mu, var of z_k per channel, r = (var + eps)^-1/2;  not normed: as mixed_sum
dz_k = w_k r_k (dy - mean(dy) - v_k mean(dy v_k)),  dw_k = <dy, v_k>.  Given statistics: dz_k = w_k r_k dy
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnas.checks import typed
from fastnas.reference.arguments import check_flags, check_noise, check_shape, check_terms
from fastnas.reference.mixed_sum import mixed_sum, mixed_sum_grads

Statistics = tuple[Tensor, Tensor]
"""Mean and biased variance, [normed terms, C] each, float32 (float64 for float64)."""


def _check_norms(
    z: Sequence[Tensor], normed: Sequence[bool], eps: float, statistics: Statistics | None
) -> None:
    check_terms("z", z, torch.empty(len(z)))
    if z[0].dim() < 2:
        raise ValueError(f"z[0] has shape {list(z[0].shape)}; [N, C, ...] is needed")
    check_flags("normed", normed, len(z))
    if eps < 0:
        raise ValueError(f"eps is {eps}; at least 0 is needed")
    for i, t in enumerate(statistics or ()):
        check_shape(f"statistics[{i}]", t, [sum(normed), z[0].shape[1]])


@typed
def batch_norms(
    z: Sequence[Tensor],
    normed: Sequence[bool],
    eps: float = 1e-5,
    statistics: Statistics | None = None,
) -> tuple[list[Tensor], Statistics]:
    """Returns v_k for every term, and the statistics used: those of the batch unless given.

    The statistics of an empty batch are 0.
    """
    _check_norms(z, normed, eps, statistics)
    training = statistics is None
    # rows is [2, normed terms, C], in float32 at least: so wide are batch norms' own statistics.
    rows = torch.zeros(2, sum(normed), z[0].shape[1], device=z[0].device,
                       dtype=torch.promote_types(z[0].dtype, torch.float32))  # fmt: skip
    found = [(mean.clone(), var.clone()) for mean, var in zip(*(statistics or rows))]
    left = iter(found)
    # Momentum 1 leaves the batch's own statistics, the variance unbiased.
    v = [
        F.batch_norm(z_k, *next(left), training=training, momentum=1.0, eps=eps) if wanted else z_k
        for z_k, wanted in zip(z, normed)
    ]
    if statistics is None:
        count = max(z[0].numel() // max(z[0].shape[1], 1), 1)
        mean, var = (torch.stack(part) for part in zip(*found)) if found else rows
        # The batch is normalised by the biased variance, and momentum 1 has left the unbiased one.
        statistics = mean, var * ((count - 1) / count)
    return v, statistics


@typed
def mixed_norm_sum(
    z: Sequence[Tensor],
    w: Tensor,
    normed: Sequence[bool],
    eps: float = 1e-5,
    statistics: Statistics | None = None,
    noisy: Sequence[int] = (),
    form: str = "none",
    level: Tensor | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    """Specifies `fastnas.ops.mixed_norm_sum`: its maths in eager torch, with autograd.

    Args:
        z: terms of one shape [N, C, ...] and dtype.
        w: [len(z)] mixing weights.
        normed: which terms are normalised.
        eps: added to the variance.
        statistics: to normalise by; None takes those of the batch.
        noisy, form, level, rng: as in `fastnas.reference.mixed_sum`, for terms not normed.

    Returns:
        Tensor shaped and typed as the terms.
    """
    check_terms("z", z, w)
    check_noise(len(z), noisy, form, level, rng)
    v, _ = batch_norms(z, normed, eps, statistics)
    return mixed_sum(v, w, noisy, form, level, rng)


@typed
def terms_read(
    normed: Sequence[bool], training: bool, needs_dz: Sequence[bool], needs_dw: bool
) -> list[bool]:
    """Says which terms backward reads: all for dw, else those whose statistics depend on them."""
    check_flags("normed", normed, len(normed))
    if len(normed) != len(needs_dz):
        raise ValueError(
            f"normed has {len(normed)} flags, needs_dz {len(needs_dz)}; each needs one a term"
        )
    return [needs_dw or (training and n and d) for n, d in zip(normed, needs_dz)]


@typed
def mixed_norm_sum_grads(
    dy: Tensor,
    z: Sequence[Tensor | None],
    w: Tensor,
    normed: Sequence[bool],
    statistics: Statistics,
    eps: float,
    training: bool,
    needs_dz: Sequence[bool],
    needs_dw: bool,
    noisy: Sequence[int] = (),
    form: str = "none",
    level: Tensor | None = None,
    rng: Tensor | None = None,
    std: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Returns (dz_k for every k that needs it, dw or None) by the formula at the top.

    Args:
        z: None for terms that `terms_read` leaves out.
        training: whether the statistics are those of the batch.
    """
    check_terms("z", z, w)
    for z_k in z[:1]:
        check_shape("dy", dy, dy.shape if z_k is None else z_k.shape)
    check_flags("needs_dz", needs_dz, len(z))
    # Means run over images and pixels: all axes but the channels.
    dims = [d for d in range(dy.dim()) if d != 1]
    # A term that is not read does not matter below.
    v, _ = batch_norms([dy if z_k is None else z_k for z_k in z], normed, eps, statistics)
    # dv_k is w_k dy or w_k d_k dy: through the sum, up to the norms.
    dv, dw = mixed_sum_grads(dy, v if needs_dw else [], w, noisy, form, level, rng, std)
    rows = iter(statistics[1])
    dz = []
    for dv_k, v_k, is_normed, needed in zip(dv, v, normed, needs_dz):
        if is_normed:
            # r_k = (var_k + eps)^-1/2 is spread over [1, C, 1, ...].
            r = (next(rows) + eps).rsqrt().view(1, -1, *[1] * (dy.dim() - 2))
            if training and dy.numel():
                # dz_k = r (dv - mean dv - v mean(dv v)): the mean and the variance of the batch
                # depend on z, too.
                dv_k = dv_k - dv_k.mean(dims, True) - v_k * (dv_k * v_k).mean(dims, True)
            dv_k = r * dv_k
        if needed:
            dz.append(dv_k)
    return dz, dw
