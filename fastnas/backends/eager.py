"""Eager torch: the reference itself, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends.held import Held, accumulation_dtype
from fastnas.backends.layout import common_format, state_format
from fastnas.backends.request import Request
from fastnas.backends.sampling import PathDraw
from fastnas.reference import EdgeTable


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd records, also inside of an op's kernel, where the dispatcher has left it behind."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradCPU,
                keys.AutogradCUDA, keys.AutogradMeta, keys.ADInplaceOrView):  # fmt: skip
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


class EagerBackend:
    name = "eager"

    def unavailable(self) -> str | None:
        return None

    def can_run(self, request: Request) -> str | None:
        return None

    def mixed_sum_fwd(
        self,
        x: list[Tensor],
        w: Tensor,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        std = reference.standard_deviations(x, noisy, form)
        y = reference.mixed_sum(x, w, noisy, form, level, rng)
        return y.contiguous(memory_format=common_format(x)), std

    def mixed_sum_bwd(
        self,
        dy: Tensor,
        x: list[Tensor],
        w: Tensor,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        std: Tensor,
        needs_dx: list[bool],
        needs_dw: bool,
    ) -> tuple[list[Tensor], Tensor]:
        terms = x if needs_dw else []
        dx, dw = reference.mixed_sum_grads(dy, terms, w, noisy, form, level, rng, std)
        layout = common_format([dy])
        if dw is None:
            dw = torch.empty(0, dtype=w.dtype, device=w.device)
        kept = [d.contiguous(memory_format=layout) for d, needed in zip(dx, needs_dx) if needed]
        return kept, dw.to(w.dtype)

    def mixed_norm_sum_fwd(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = None if mean is None or var is None else (mean.clone(), var.clone())
        v, (mean, var) = reference.batch_norms(z, normed, eps, given)
        std = reference.standard_deviations(z, noisy, form)
        y = reference.mixed_sum(v, w, noisy, form, level, rng)
        return y.contiguous(memory_format=common_format(z)), mean, var, std

    def mixed_norm_sum_bwd(
        self,
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
    ) -> tuple[list[Tensor], Tensor]:
        wide = mean.dtype
        read = reference.terms_read(normed, training, needs_dz, needs_dw)
        given = iter(z)
        terms = [next(given).to(wide) if is_read else None for is_read in read]
        dz, dw = reference.mixed_norm_sum_grads(
            dy.to(wide), terms, w, normed, (mean, var), eps, training, needs_dz, needs_dw,
            noisy, form, level, rng, std,
        )  # fmt: skip
        layout = common_format(z or [dy])
        if dw is None:
            dw = torch.empty(0, dtype=w.dtype, device=w.device)
        return [d.to(dy.dtype).contiguous(memory_format=layout) for d in dz], dw.to(w.dtype)

    def mixed_edges_fwd(
        self,
        x: list[Tensor],
        w: Tensor,
        params: list[Tensor],
        table: EdgeTable,
        running: Tensor | None,
        eps: float,
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        memory: str,
        keep_gram: bool,
    ) -> tuple[Tensor, Held]:
        """Holds only what the noise needs: backward computes all of forward again."""
        size, training = table.node_size([t.shape for t in x]), running is None
        held = Held.empty(x[0], table, size, form, memory, keep_gram, training)
        for tensor in held:
            tensor.zero_()
        if running is not None:
            held.stats.copy_(running)
        out = reference.mixed_edges(
            x, w, params, table, held.stats, training=training, eps=eps,
            form=form, level=level, rng=rng, std=held.std if held.std.numel() else None,
        )  # fmt: skip
        return out.contiguous(memory_format=state_format(x[0])), held

    def mixed_edges_bwd(
        self,
        dout: Tensor,
        x: list[Tensor],
        out: Tensor,
        w: Tensor,
        params: list[Tensor],
        held: Held,
        table: EdgeTable,
        eps: float,
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        needs_dx: list[bool],
        needs_dw: bool,
        needs_dparams: bool,
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        with _recording():
            x = [t.detach().requires_grad_(need) for t, need in zip(x, needs_dx)]
            w = w.detach().requires_grad_(needs_dw)
            params = [p.detach().requires_grad_(needs_dparams) for p in params]
            y = reference.mixed_edges(
                x, w, params, table, torch.empty_like(held.stats), eps=eps,
                form=form, level=level, rng=rng,
            )  # fmt: skip
            wanted = [t for t in (*x, w, *params) if t.requires_grad]
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if y.requires_grad:
                found = torch.autograd.grad(y, wanted, dout, allow_unused=True)
        grads = iter(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found))
        layout = state_format(dout)
        dx = [next(grads).contiguous(memory_format=layout) for need in needs_dx if need]
        dw = next(grads) if needs_dw else w.detach().new_empty(0)
        return dx, dw, [g.contiguous() for g in grads]

    def relu_conv_bn_fwd(
        self, x: Tensor, params: list[Tensor], running: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        C = sum(p.shape[0] for p in params)
        stats = torch.empty(2, C, dtype=accumulation_dtype(x.dtype), device=x.device)
        if running is not None:
            stats.copy_(running)
        y = reference.relu_conv_bn(x, params, stats, training=running is None, eps=eps)
        return y.contiguous(memory_format=state_format(x)), stats

    def relu_conv_bn_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor,
        params: list[Tensor],
        stats: Tensor,
        eps: float,
        needs_dx: bool,
        needs_dparams: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        with _recording():
            x = x.detach().requires_grad_(needs_dx)
            params = [p.detach().requires_grad_(needs_dparams) for p in params]
            again = reference.relu_conv_bn(x, params, torch.empty_like(stats), eps=eps)
            wanted = [t for t in (x, *params) if t.requires_grad]
            grads = list(torch.autograd.grad(again, wanted, dy))
        dx = [grads.pop(0).contiguous(memory_format=state_format(x))] if needs_dx else []
        return dx, [g.contiguous() for g in grads]

    def sample_paths_fwd(self, draw: PathDraw, paths: int) -> tuple[Tensor, Tensor]:
        op, weight = reference.sample_paths(*draw, paths)
        return op.contiguous(), weight.contiguous()

    def sample_paths_bwd(
        self, draw: PathDraw, op: Tensor, dweight: Tensor
    ) -> tuple[Tensor, Tensor]:
        dalpha, dbeta = reference.sample_paths_grads(*draw, op, dweight)
        dbeta = dalpha.new_empty(0) if dbeta is None else dbeta
        return dalpha.contiguous(), dbeta.contiguous()
