"""Computes every op by its reference, in eager torch, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends.calls import ConvCall, EdgesCall, NormSumCall, PathsCall, SumCall
from fastnas.backends.layout import common_format, state_format
from fastnas.backends.op_table import ALL, LOGITS, Request, register
from fastnas.backends.outputs import given
from fastnas.backends.saved import SavedTensors, accumulation_dtype


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record, also inside of an op's kernel, which the dispatcher calls below it."""
    # An op's kernel runs below autograd: the dispatcher has excluded its keys for this thread. With
    # `torch.enable_grad` alone nothing would be recorded, and `torch.autograd.grad` would fail for
    # want of a graph.
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradCPU,
                keys.AutogradCUDA, keys.AutogradMeta, keys.ADInplaceOrView):  # fmt: skip
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


class EagerBackend:
    """Runs everything everywhere, as slowly as torch's own operations."""

    name = "eager"

    def unavailable(self) -> str | None:
        return None

    def can_run(self, request: Request) -> str | None:
        return None


class EagerSum:
    def forward(self, call: SumCall) -> tuple[Tensor, list[Tensor]]:
        noise = call.noise
        # std is float64, one for each noisy term of a relative form: backward scales its draws by
        # the same numbers, to the bit.
        std = reference.standard_deviations(call.x, noise.noisy, noise.form)
        y = reference.mixed_sum(call.x, call.w, *noise)
        return y.contiguous(memory_format=common_format(call.x)), [std]

    def backward(
        self, grad: Tensor, call: SumCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        needs_dw, *needs_dx = needs
        # `Op.reads` saves the terms for dw alone, so call.x holds None otherwise.
        terms = call.x if needs_dw else []
        dx, dw = reference.mixed_sum_grads(grad, terms, call.w, *call.noise, saved[0])
        layout = common_format([grad])
        found = [] if dw is None else [dw.to(call.w.dtype)]
        return found + [d.contiguous(memory_format=layout) for d, n in zip(dx, needs_dx) if n]


class EagerNormSum:
    def forward(self, call: NormSumCall) -> tuple[Tensor, list[Tensor]]:
        training = call.mean is None
        own = None if training else given(call)
        v, statistics = reference.batch_norms(call.z, call.normed, call.eps, own)
        std = reference.standard_deviations(call.z, call.noise.noisy, call.noise.form)
        y = reference.mixed_sum(v, call.w, *call.noise)
        kept = [std, *(statistics if training else ())]
        return y.contiguous(memory_format=common_format(call.z)), kept

    def backward(
        self, grad: Tensor, call: NormSumCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        needs_dw, *needs_dz = needs
        std, mean, var = saved if call.mean is None else (*saved, *given(call))
        # Everything is widened to the dtype of the statistics, and rounded once, at the end: the
        # mean of dy and that of dy v would lose their last digits in bfloat16.
        terms = [None if z_k is None else z_k.to(mean.dtype) for z_k in call.z]
        dz, dw = reference.mixed_norm_sum_grads(
            grad.to(mean.dtype), terms, call.w, call.normed, (mean, var), call.eps,
            call.mean is None, needs_dz, needs_dw, *call.noise, std,
        )  # fmt: skip
        layout = common_format([z_k for z_k in call.z if z_k is not None] or [grad])
        found = [] if dw is None else [dw.to(call.w.dtype)]
        return found + [d.to(grad.dtype).contiguous(memory_format=layout) for d in dz]


def reference_edges(call: EdgesCall, stats: Tensor, std: Tensor | None = None) -> Tensor:
    """Runs the reference on a call's leaves, for autograd to record; fills stats in training.

    Outside of it the statistics are those of the call.
    """
    drawn = call.noise._asdict()
    del drawn["noisy"]  # every skip is
    leaves_and_table = call[:4]
    given = stats if call.running is None else call.running
    return reference.mixed_edges(
        *leaves_and_table, given, training=call.running is None, eps=call.eps, std=std, **drawn
    )


class EagerEdges:
    """Saves only what the noise needs: backward computes all of forward again."""

    def forward(self, call: EdgesCall) -> tuple[Tensor, list[Tensor]]:
        size, training = call.table.node_size([t.shape for t in call.x]), call.running is None
        saved = SavedTensors.empty(
            call.x[0], call.table, size, call.noise.form, call.memory, call.keep_gram, training
        )
        # Zeros stand in for what the other backends save, so that an op never returns memory that
        # nobody has written.
        for tensor in saved:
            tensor.zero_()
        if call.running is not None:
            saved.stats.copy_(call.running)
        out = reference_edges(call, saved.stats, saved.std if saved.std.numel() else None)
        return out.contiguous(memory_format=state_format(call.x[0])), list(saved)

    def backward(
        self, grad: Tensor, call: EdgesCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        stats = SavedTensors(*saved[1:]).stats
        with _recording():
            # New leaves keep this graph apart from the caller's: backward of an op must not add
            # anything to `.grad` of a parameter.
            leaves = [call.w, *call.x, *call.params]
            w, *rest = (t.detach().requires_grad_(need) for t, need in zip(leaves, needs))
            x, params = rest[: len(call.x)], rest[len(call.x) :]
            # The statistics go into a tensor of their own. Those that were saved are an output of
            # forward, and writing to them would raise their version: a second backward would be
            # refused.
            y = reference_edges(call._replace(w=w, x=x, params=params), torch.empty_like(stats))
            wanted = [t for t in (w, *rest) if t.requires_grad]
            found: Sequence[Tensor | None] = [None] * len(wanted)
            # Of a table all of whose edges are empty y is zeros, which depend on nothing.
            if y.requires_grad:
                found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
        # A schema has no optional gradients in a list, so what y does not depend on gets zeros.
        grads = iter(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found))
        own_dw = [next(grads)] if needs[0] else []
        layout, states = state_format(grad), sum(needs[1 : 1 + len(x)])
        dx = [next(grads).contiguous(memory_format=layout) for _ in range(states)]
        return own_dw + dx + [g.contiguous() for g in grads]


def reference_conv(call: ConvCall, stats: Tensor) -> Tensor:
    """Runs the reference on a call's leaves, for autograd to record; as `reference_edges`."""
    given = stats if call.running is None else call.running
    return reference.relu_conv_bn(*call[:2], given, training=call.running is None, eps=call.eps)


class EagerConv:
    def forward(self, call: ConvCall) -> tuple[Tensor, list[Tensor]]:
        x, C = call.x, sum(p.shape[0] for p in call.params)
        stats = torch.empty(2, C, dtype=accumulation_dtype(x.dtype), device=x.device)
        if call.running is not None:
            stats.copy_(call.running)
        return reference_conv(call, stats).contiguous(memory_format=state_format(x)), [stats]

    def backward(
        self, grad: Tensor, call: ConvCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        with _recording():
            leaves = [call.x, *call.params]
            x, *params = (t.detach().requires_grad_(need) for t, need in zip(leaves, needs))
            y = reference_conv(call._replace(x=x, params=params), torch.empty_like(saved[1]))
            wanted = [t for t in (x, *params) if t.requires_grad]
            grads = list(torch.autograd.grad(y, wanted, grad))
        dx = [grads.pop(0).contiguous(memory_format=state_format(x))] if needs[0] else []
        return dx + [g.contiguous() for g in grads]


class EagerPaths:
    def forward(self, call: PathsCall) -> tuple[Tensor, list[Tensor]]:
        op, weight = reference.sample_paths(*call)
        return weight.contiguous(), [op.contiguous()]

    def backward(
        self, grad: Tensor, call: PathsCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        draw = call[:-1]  # all but the number of paths, which op tells
        found = reference.sample_paths_grads(*draw, saved[0], grad)
        return [d.contiguous() for d, need in zip(found, needs) if need and d is not None]


BACKEND = EagerBackend()
register("mixed_sum", "eager", EagerSum(), ALL)
register("mixed_norm_sum", "eager", EagerNormSum(), ALL)
register("mixed_edges", "eager", EagerEdges(), ALL)
register("relu_conv_bn", "eager", EagerConv(), ALL)
register("sample_paths", "eager", EagerPaths(), LOGITS)
