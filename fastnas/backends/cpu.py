"""C++ on the CPU: fastnas._C, vector width chosen at run time, OpenMP threads as torch has them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.held import Held, accumulation_dtype
from fastnas.backends.native import DTYPE_TAGS, NativeBackend, load_native
from fastnas.reference import EDGE_OPS, EdgeTable


class CpuBackend(NativeBackend):
    name = "cpu"
    device = "cpu"

    def __init__(self) -> None:
        super().__init__(*load_native("_C"))
        self.edge_table = lru_cache(maxsize=256)(self._edge_table)

    def launch_argument(self, like: Tensor) -> int:
        return torch.get_num_threads()

    def _edge_table(self, table: EdgeTable) -> Any:
        edges = [(e.source, e.target, e.stride, len(e.terms)) for e in table.edges]
        terms = [(EDGE_OPS.index(t.op), t.weight, t.size, t.dilation) for _, t in table.terms]
        return self.module.EdgeTable(table.inputs, table.nodes, table.candidates, edges, terms)

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
        x = [_channels_last(t) for t in x]
        size, training = table.node_size([t.shape for t in x]), running is None
        out = _new_channels_last(x[0], size[0], table.nodes * size[1], *size[2:])
        held = Held.empty(x[0], table, size, form, memory, keep_gram, training)
        if running is not None:
            held.stats.copy_(running)
        call = self._call(x, out, w, params, held, table, eps, form, level, rng)
        call.training = training
        self._run("mixed_edges_fwd", table, call)
        return out, held

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
        x, dout = [_channels_last(t) for t in x], _channels_last(dout)
        dx = [_new_channels_last(t, *t.shape) if need else None for t, need in zip(x, needs_dx)]
        dparams = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params]
        dw = torch.zeros(w.shape if needs_dw else (0,), dtype=torch.float64)
        call = self._call(x, out, w, params, held, table, eps, form, level, rng)
        call.dout = dout.data_ptr()
        call.dx = [0 if d is None else d.data_ptr() for d in dx]
        call.dparams = [d.data_ptr() for d in dparams] if needs_dparams else []
        call.dw = dw.data_ptr() if needs_dw else 0
        self._run("mixed_edges_bwd", table, call)
        return [d for d in dx if d is not None], dw.to(w.dtype), dparams if needs_dparams else []

    def _call(
        self,
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
    ) -> Any:
        """The arguments that forward and backward share; keeps the tensors that it made alive."""
        call = self.module.MixedEdgesArguments()
        params = [p.contiguous() for p in params]
        w = w.to(accumulation_dtype(x[0].dtype)).contiguous()
        call.dtype = DTYPE_TAGS[x[0].dtype]
        call.images = x[0].shape[0]
        call.channels = x[0].shape[1]
        call.sizes = [size for t in x for size in t.shape[2:]]
        call.x = [t.data_ptr() for t in x]
        call.params = [p.data_ptr() for p in params]
        call.w, call.out = w.data_ptr(), out.data_ptr()
        for name in ("stats", "shift", "gram", "v", "u", "std"):
            tensor = getattr(held, name)
            setattr(call, name, tensor.data_ptr() if tensor.numel() else 0)
        call.eps = eps
        if form != "none":
            assert level is not None and rng is not None
            rng, level = rng.contiguous(), level.contiguous()
            call.form = getattr(self.module.NoiseForm, form)
            call.level, call.rng = level.data_ptr(), rng.data_ptr()
        call.threads = torch.get_num_threads()
        call.alive = params, w, rng, level
        return call

    def _run(self, name: str, table: EdgeTable, call: Any) -> None:
        edges = self.edge_table(table)
        space = torch.empty(self.module.mixed_edges_workspace(edges, call), dtype=torch.uint8)
        getattr(self.module, name)(edges, call, space.data_ptr())

    def relu_conv_bn_fwd(
        self, x: Tensor, params: list[Tensor], running: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = _channels_last(x)
        stride, C = len(params), sum(p.shape[0] for p in params)
        y = _new_channels_last(x, x.shape[0], C, *(-(-size // stride) for size in x.shape[2:]))
        stats = torch.empty(2, C, dtype=accumulation_dtype(x.dtype))
        if running is not None:
            stats.copy_(running)
        self._run_relu_conv_bn("fwd", x, params, [], y, 0, 0, stats, running is None, eps)
        return y, stats

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
        x, dy = _channels_last(x), _channels_last(dy)
        dx = [_new_channels_last(x, *x.shape)] if needs_dx else []
        dparams = [
            torch.empty_like(p, memory_format=torch.contiguous_format)
            for p in (params if needs_dparams else [])
        ]
        into = dx[0].data_ptr() if dx else 0
        self._run_relu_conv_bn("bwd", x, params, dparams, y, dy.data_ptr(), into, stats, True, eps)
        return dx, dparams

    def _run_relu_conv_bn(
        self,
        direction: str,
        x: Tensor,
        params: list[Tensor],
        dparams: list[Tensor],
        y: Tensor,
        dy: int,
        dx: int,
        stats: Tensor,
        training: bool,
        eps: float,
    ) -> None:
        params = [p.contiguous() for p in params]
        N, in_C, rows, cols = x.shape
        fixed = (
            DTYPE_TAGS[x.dtype], N, rows, cols, in_C, y.shape[1], x.data_ptr(),
            [p.data_ptr() for p in params], [d.data_ptr() for d in dparams],
            y.data_ptr(), dy, dx, stats.data_ptr(), training, eps,
        )  # fmt: skip
        threads = torch.get_num_threads()
        size = self.module.relu_conv_bn_workspace(*fixed, 0, threads)
        space = torch.empty(size, dtype=torch.uint8)
        run = getattr(self.module, f"relu_conv_bn_{direction}")
        run(*fixed, space.data_ptr(), threads)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _new_channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)
