"""Holds mixed_norm_sum: its description, its checks and its public function. Its kernels:

backends/native_sums.py -> csrc/cpu/mixed_norm_sum.cpp, csrc/cuda/mixed_norm_sum.cu
                           (csrc/formulas/*.h)
backends/triton.py      -> kernels/mixed_norm_sum.py
backends/eager.py       -> reference/mixed_norm_sum.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends import OPS, accumulation_dtype
from fastnas.backends.calls import NormSumCall
from fastnas.backends.layout import common_format
from fastnas.ops.batch_norm import Running, stack_running, update_running
from fastnas.ops.call import Needs, Op
from fastnas.ops.checks import (
    as_list,
    check_noise,
    check_norm_settings,
    check_running,
    check_terms,
)
from fastnas.ops.mixed_sum import fake_deviations, noise_of
from fastnas.reference import SkipNoise, terms_read

OP = OPS["mixed_norm_sum"]


def _fake(call: NormSumCall) -> tuple[Tensor, list[Tensor]]:
    y = torch.empty_like(call.z[0], memory_format=common_format(call.z))
    std = fake_deviations(call.noise, call.w.device)
    if call.mean is not None:
        return y, [std]
    mean = y.new_empty((sum(call.normed), y.shape[1]), dtype=accumulation_dtype(y.dtype))
    return y, [std, mean, torch.empty_like(mean)]


def _reference(call: NormSumCall) -> Tensor:
    statistics = None if call.mean is None or call.var is None else (call.mean, call.var)
    return reference.mixed_norm_sum(call.z, call.w, call.normed, call.eps, statistics, *call.noise)


def _reads(call: NormSumCall, needs: Needs) -> Sequence[bool]:
    needs_dw, *needs_dz = needs
    # Every dz reads w. Of the terms, backward reads those alone whose dz or dw depends on their
    # values.
    return [True, *terms_read(call.normed, call.mean is None, needs_dz, needs_dw)]


def _format(call: NormSumCall, grad: Tensor) -> torch.memory_format:
    """Returns the common format of the terms that backward reads."""
    return common_format([z_k for z_k in call.z if z_k is not None] or [grad])


MIXED_NORM_SUM = Op(
    "mixed_norm_sum",
    NormSumCall,
    leaves=("w", "z"),
    fake=_fake,
    reference=_reference,
    terms=lambda call: len(call.z),
    format=_format,
    reads=_reads,
    shows=(1, 3),  # mean and variance, in training
)


def mixed_norm_sum(
    z: Sequence[Tensor],
    w: Tensor,
    *,
    normed: Sequence[bool],
    eps: float = 1e-5,
    running: Sequence[Running | None] | None = None,
    momentum: float = 0.1,
    training: bool = True,
    noise: SkipNoise | None = None,
    noisy: Sequence[int] = (),
    level: Tensor | None = None,
    rng: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = sum_k w_k BN(z_k) + sum_j w_j z_j: non-affine batch norms folded into the mixed sum.

    For a term k with normed[k], per channel c (dimension 1) over all n values of the channel::

        v_k = (z_k - mu_k) r_k,   r_k = (var_k + eps)^-1/2,   mu and biased var of the batch
        dz_k = w_k r_k (dy - mean(dy) - v_k mean(dy v_k)),    dw_k = sum(dy v_k)

    and with training=False by the running statistics, dz_k = w_k r_k dy. The other terms, and the
    noise on those named by `noisy`, are as in `mixed_sum`, with the same draws of the same `rng`.
    Forward reads the terms twice (statistics, mix), backward twice (sums, every dz_k). Saved for
    backward are the terms themselves and per channel mean and variance; only the gradients that
    are needed are formed. A variance beyond the range of float32 (z beyond about 1e19) is NaN, as
    are the results. Source: Ioffe and Szegedy, ICML 2015, as torch computes it.

    Args:
        z: at least one term, all of one shape [N, C, ...] (any rank >= 2), dtype and device:
            float32, bfloat16, float16, float64 (not on CUDA). Contiguous and channels-last terms
            are read as they lie; other layouts, and mixed ones, are copied to contiguous.
        w: [len(z)] floating point on the same device; may be wider than z. Sums are accumulated
            in float32 (float64 for float64), in an order that does not depend on threads.
        normed: a bool per term.
        eps: added to the variance, >= 0.
        running: a (running_mean, running_var) or None per term, None where not normed. Updated in
            place in training as `torch.nn.functional.batch_norm` does: running = (1 - momentum)
            running + momentum (batch mean, n / (n - 1) batch variance). Needed if not training.
        momentum: of that update, 0 to 1.
        training: whether to normalise by the statistics of the batch.
        noise, noisy, level, rng: as in `mixed_sum`; a noisy term may not be normed.
        backend: as in `mixed_sum`.

    Returns:
        Tensor shaped and typed as the terms.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed; as torch,
            for one value per channel in training.
        BackendError: the explicit backend cannot run this.
    """
    z, normed = as_list(OP.stem, "z", z), as_list(OP.stem, "normed", normed, "bools")
    noisy = as_list(OP.stem, "noisy", noisy, "indices")
    if running is not None:
        running = as_list(OP.stem, "running", running, "pairs of Tensors")
    check_norm_settings(OP.stem, training, momentum, eps)
    _check(z, w, normed, running, training)
    check_noise(OP.stem, len(z), w.device, noise, noisy, level, rng)
    for k in noisy:
        if normed[k]:
            raise ValueError(
                f"{OP.stem}: noisy is {list(noisy)}, but term {k} is normed; only a term that is"
                " not can carry noise"
            )
    mean, var = (None, None) if training else _given(z[0], running or ())
    drawn = noise_of(noise, noisy, level, rng, w.device)
    call = NormSumCall(z, w, normed, float(eps), mean, var, drawn)
    y, *statistics = MIXED_NORM_SUM(call, backend)
    # An empty batch has no statistics that could move the running ones.
    if training and running is not None and y.numel():
        pairs = [pair for pair, is_normed in zip(running, normed) if is_normed]
        update_running(pairs, torch.stack(statistics, 1), y.numel() // y.shape[1], momentum)
    return y


def _given(like: Tensor, running: Sequence[Running | None]) -> tuple[Tensor, Tensor]:
    """Returns the running statistics as [normed terms, C] each."""
    pairs, dtype = [pair for pair in running if pair is not None], accumulation_dtype(like.dtype)
    if not pairs:
        # It must not be None, which would tell the kernels that the call is in training.
        none = like.new_empty((2, 0, like.shape[1]), dtype=dtype)
        return none[0], none[1]
    mean, var = stack_running(pairs, dtype).unbind(1)
    return mean.contiguous(), var.contiguous()


def _check(
    z: list[Tensor],
    w: Tensor,
    normed: list[bool],
    running: list[Running | None] | None,
    training: bool,
) -> None:
    check_terms(OP, "z", z, w)
    shape = z[0].shape
    if len(shape) < 2:
        raise ValueError(f"{OP.stem}: z[0] has shape {list(shape)}; [N, C, ...] is needed")
    if len(normed) != len(z) or not all(isinstance(wanted, bool) for wanted in normed):
        raise ValueError(f"{OP.stem}: normed is {normed} for {len(z)} terms; a bool each is needed")
    if training and any(normed) and shape[0] * shape[2:].numel() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )
    _check_running(z[0], normed, running, training)


def _check_running(
    like: Tensor, normed: list[bool], running: list[Running | None] | None, training: bool
) -> None:
    pairs = [None] * len(normed) if running is None else running
    if len(pairs) != len(normed):
        raise ValueError(
            f"{OP.stem}: running has {len(pairs)} entries for {len(normed)} terms;"
            " a (running_mean, running_var) or None each is needed"
        )
    for k, (pair, is_normed) in enumerate(zip(pairs, normed)):
        name = f"running[{k}]"
        if is_normed:
            check_running(OP.stem, name, pair, like.shape[1], like.device, training)
        elif pair is not None:
            raise ValueError(
                f"{OP.stem}: {name} is given, but term {k} is not normed; None is needed"
            )
