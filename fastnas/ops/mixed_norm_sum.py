"""mixed_norm_sum: schema, fake, autograd, public function, checks. The kernels are two steps down:

backends/cpu.py     -> csrc/cpu/mixed_norm_sum.cpp (csrc/formulas/*.h)
backends/cuda.py    -> csrc/cuda/mixed_norm_sum.cu (csrc/formulas/*.h)
backends/triton.py  -> kernels/mixed_norm_sum.py
backends/eager.py   -> reference/mixed_norm_sum.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends import BACKENDS, accumulation_dtype
from fastnas.backends.layout import common_format
from fastnas.ops.checks import (
    as_list,
    check_noise,
    check_norm_settings,
    check_running,
    check_terms,
)
from fastnas.ops.dispatch import (
    choose_backend,
    is_plain_call,
    needs_graph,
    own_output,
    reference_grads,
    wants_graph_of_backward,
)
from fastnas.ops.mixed_sum import draw_rng
from fastnas.ops.running import Running, stack_running, update_running
from fastnas.ops.table import OPS
from fastnas.reference import SkipNoise, terms_read

OP = OPS["mixed_norm_sum"]

torch.library.define(
    "fastnas::mixed_norm_sum_fwd",
    "(Tensor[] z, Tensor w, bool[] normed, Tensor? mean, Tensor? var, float eps, int[] noisy,"
    " str form, Tensor? level, Tensor? rng, str? backend)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor std)",
)
torch.library.define(
    "fastnas::mixed_norm_sum_bwd",
    "(Tensor dy, Tensor[] z, Tensor w, bool[] normed, Tensor mean, Tensor var, float eps,"
    " bool training, int[] noisy, str form, Tensor? level, Tensor? rng, Tensor std,"
    " bool[] needs_dz, bool needs_dw, str? backend) -> (Tensor[] dz, Tensor dw)",
)


def _fwd(
    z: list[Tensor],
    w: Tensor,
    normed: list[bool],
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    noisy: list[int],
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = BACKENDS[choose_backend(OP.stem, z[0], backend, len(z))].mixed_norm_sum_fwd
    y, mean, var, std = run(z, w, normed, mean, var, eps, noisy, form, level, rng)
    return y, mean, var, own_output(std)


def _bwd(
    dy: Tensor,
    z: list[Tensor],
    w: Tensor,
    normed: list[bool],
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
    noisy: list[int],
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    std: Tensor,
    needs_dz: list[bool],
    needs_dw: bool,
    backend: str | None,
) -> tuple[list[Tensor], Tensor]:
    run = BACKENDS[choose_backend(OP.stem, dy, backend, w.numel())].mixed_norm_sum_bwd
    return run(dy, z, w, normed, mean, var, eps, training, noisy, form, level, rng, std,
               needs_dz, needs_dw)  # fmt: skip


torch.library.impl("fastnas::mixed_norm_sum_fwd", "default", _fwd)
torch.library.impl("fastnas::mixed_norm_sum_bwd", "default", _bwd)


@torch.library.register_fake("fastnas::mixed_norm_sum_fwd")
def _fwd_fake(
    z: list[Tensor],
    w: Tensor,
    normed: list[bool],
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    noisy: list[int],
    form: str,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = len(noisy) if form == "gaussian_additive" else 0
    y = torch.empty_like(z[0], memory_format=common_format(z))
    statistics = y.new_empty((sum(normed), y.shape[1]), dtype=accumulation_dtype(y.dtype))
    std = torch.empty(size, dtype=torch.float64, device=w.device)
    return y, statistics, torch.empty_like(statistics), std


@torch.library.register_fake("fastnas::mixed_norm_sum_bwd")
def _bwd_fake(
    dy: Tensor,
    z: list[Tensor],
    w: Tensor,
    normed: list[bool],
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
    noisy: list[int],
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    std: Tensor,
    needs_dz: list[bool],
    needs_dw: bool,
    backend: str | None,
) -> tuple[list[Tensor], Tensor]:
    layout = common_format(z or [dy])
    dz = [torch.empty_like(dy, memory_format=layout) for need in needs_dz if need]
    return dz, w.new_empty(w.numel() if needs_dw else 0)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_fwd`, by torch's dispatcher where somebody watches it."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = (
        _fwd if is_plain_call() else torch.ops.fastnas.mixed_norm_sum_fwd
    )(*arguments)
    return found


class _MixedNormSum(torch.autograd.Function):
    """Saves the terms that backward reads, the statistics, and of the noise what mixed_sum does."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        normed: list[bool],
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        backend: str | None,
        *z: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        training = mean is None
        y, mean, var, std = _forward(
            list(z), w, normed, mean, var, eps, noisy, form, level, rng, backend
        )
        ctx.settings = normed, eps, training, noisy, form, backend
        read = terms_read(normed, training, ctx.needs_input_grad[10:], ctx.needs_input_grad[0])
        ctx.read = read
        kept = (z_k for z_k, is_read in zip(z, read) if is_read)
        ctx.save_for_backward(w, mean, var, level, rng, std, *kept)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        normed, eps, training, noisy, form, backend = ctx.settings
        w, mean, var, level, rng, std, *z = ctx.saved_tensors
        needs_dw, needs_dz = ctx.needs_input_grad[0], list(ctx.needs_input_grad[10:])
        if wants_graph_of_backward(dy):
            saved, statistics = iter(z), None if training else (mean, var)
            own_dw, *own_dz = reference_grads(
                lambda leaves: reference.mixed_norm_sum(
                    leaves[1:], leaves[0], normed, eps, statistics, noisy, form, level, rng
                ),
                [w, *(next(saved) if is_read else None for is_read in ctx.read)],
                [needs_dw, *needs_dz],
                dy,
            )
            return own_dw, *(None,) * 9, *own_dz
        bwd = _bwd if is_plain_call() else torch.ops.fastnas.mixed_norm_sum_bwd
        dz, dw = bwd(dy, z, w, normed, mean, var, eps, training, noisy, form, level, rng, std,
                     needs_dz, needs_dw, backend)  # fmt: skip
        wanted = iter(dz)
        all_dz = (next(wanted) if need else None for need in needs_dz)
        return dw if needs_dw else None, *(None,) * 9, *all_dz


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
    form = "none"
    if noise is not None and noisy:
        form = noise.form
        level = noise.level(device=w.device) if level is None else level
        rng = draw_rng(device=w.device)[0] if rng is None else rng
    else:
        level = rng = None
    mean, var = (None, None) if training else _given(z[0], running or ())
    if not torch.compiler.is_compiling():
        backend = choose_backend(OP.stem, z[0], backend, len(z))
    settings = normed, mean, var, float(eps), noisy, form, level, rng, backend
    if needs_graph((w, *z)):
        y, mean, var = _MixedNormSum.apply(w, *settings, *z)
    else:
        y, mean, var, _ = _forward(z, w, *settings)
    if training and running is not None and y.numel():
        pairs = [pair for pair, is_normed in zip(running, normed) if is_normed]
        update_running(pairs, torch.stack([mean, var], 1), y.numel() // y.shape[1], momentum)
    return y


def _given(like: Tensor, running: Sequence[Running | None]) -> tuple[Tensor, Tensor]:
    """The running statistics as [normed terms, C] each."""
    pairs, dtype = [pair for pair in running if pair is not None], accumulation_dtype(like.dtype)
    if not pairs:
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
