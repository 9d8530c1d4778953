"""Runs the compiled kernels of mixed_edges and relu_conv_bn."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.address import ROWS, address, laid_out, places
from fastnas.backends.calls import ConvCall, EdgesCall
from fastnas.backends.dense_edges import DenseEdges
from fastnas.backends.layout import in_format, state_format
from fastnas.backends.native import CPU, CUDA, DTYPES, Native
from fastnas.backends.native_sums import NativeNormSum
from fastnas.backends.op_table import CELLS_ON_CPU, ON_GPU, register
from fastnas.backends.relu_conv_bn import MatmulConv
from fastnas.backends.saved import SavedTensors, accumulation_dtype
from fastnas.spaces import EdgeTable

LAST = torch.channels_last


class NativeEdges:
    """Computes mixed_edges on states that lie as `layout` says."""

    def __init__(
        self, native: Native, layout: torch.memory_format, takes_choice: bool = False
    ) -> None:
        self.native = native
        self.layout = layout
        self.takes_choice = takes_choice
        """Whether kernels read the sampled candidates from the device."""

    def forward(self, call: EdgesCall) -> tuple[Tensor, list[Tensor]]:
        x = in_format(call.x, self.layout)
        table, training = call.table, call.running is None
        N, C, rows, cols = size = table.node_size([t.shape for t in x])
        out = self._new(x[0], N, table.outputs * C, rows, cols)
        saved = SavedTensors.empty(
            x[0], table, size, call.noise.form, call.memory, call.keep_gram, training,
            sampled=call.choice is not None,
        )  # fmt: skip
        if call.running is not None:
            saved.stats.copy_(call.running)
        # There is nothing to compute without images, and CUDA refuses a grid of size 0.
        if out.numel():
            self._run("mixed_edges_fwd", call, x, out, saved, {})
        else:
            for tensor in saved:
                tensor.zero_()
        return out.contiguous(memory_format=state_format(out)), list(saved)

    def backward(
        self, grad: Tensor, call: EdgesCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        needs_dw, needs_dx, needs_dp = split_needs(call, needs)
        dout, out, *x = in_format([grad, saved[0], *call.x], self.layout)
        # saved is [out, *SavedTensors]: backward reads the nodes, which are states of the nodes
        # after them.
        own = SavedTensors(*in_format(saved[1:], ROWS))
        dx = [self._new(t, *t.shape) if need else None for t, need in zip(x, needs_dx)]
        # Kernels write no gradient of a candidate that is not sampled, and do not run on nothing.
        new = torch.empty_like if call.choice is None and out.numel() else torch.zeros_like
        # Kernels take room for all of them or for none (`dparams` of csrc/params.h), because the
        # sweeps that gather weight gradients are shared.
        dparams = [new(p, memory_format=ROWS) for p in (call.params if any(needs_dp) else [])]
        w = call.w
        # The kernels add to dw [E, K], edge by edge. Its sums run over whole states and would lose
        # digits in float32.
        dw = torch.zeros(w.shape if needs_dw else (0,), dtype=torch.float64, device=w.device)
        if out.numel():
            grads = places(out.device, self.layout, dout=dout, dx=dx)
            grads |= places(out.device, dparams=dparams, dw=dw)
            self._run("mixed_edges_bwd", call, x, out, own, grads)
        found = [dw.to(w.dtype)] if needs_dw else []
        layout = state_format(out)
        found += [d.contiguous(memory_format=layout) for d in dx if d is not None]
        return found + [d for d, need in zip(dparams, needs_dp) if need]

    def _run(
        self,
        kernel: str,
        call: EdgesCall,
        x: list[Tensor],
        out: Tensor,
        saved: SavedTensors,
        fields: dict[str, Any],
    ) -> None:
        """Runs a kernel on laid-out states; `fields` are those that only it has."""
        on, native, noise = out.device, self.native, call.noise
        # The kernels' own copies, where there are any, live until they have ended.
        params = in_format(call.params, ROWS)
        # `rows` holds what lies one value after the other, whatever the layout of the states.
        rows = {"w": laid_out(call.w.to(accumulation_dtype(x[0].dtype)))} | saved._asdict()
        # The form is set here alone, so that a kernel never finds a form without a stream to draw
        # from.
        if noise.form != "none" and noise.level is not None and noise.rng is not None:
            fields["form"] = noise.form
            rows |= {"level": laid_out(noise.level), "rng": laid_out(noise.rng)}
        if call.choice is not None:
            rows["choice"] = laid_out(call.choice)
        filled = native.params(
            "MixedEdgesParams",
            table=_edge_table(native.module, call.table),
            dtype=DTYPES[x[0].dtype],
            images=x[0].shape[0],
            channels=x[0].shape[1],
            training=call.running is None,
            sizes=[size for t in x for size in t.shape[2:]],
            eps=call.eps,
            tf32=native.uses_tf32(),
            **places(on, self.layout, x=x, out=out),
            **places(on, params=params, **rows),
            **fields,
            **native.launch(out),
        )
        # The size follows from all fields but this one. torch allocates it, so that the memory is
        # counted by its statistics, lies in the pool of a graph being captured, and is freed with
        # the call.
        size = native.module.mixed_edges_workspace(filled)
        space = torch.empty(size, dtype=torch.uint8, device=on)
        filled.set(workspace=address(space, on))
        native.run(kernel, filled, out)

    def _new(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=self.layout)


def split_needs(call: EdgesCall, needs: list[bool]) -> tuple[bool, list[bool], list[bool]]:
    """Splits `needs` into those of w, of the states and of the parameters."""
    first = 1 + len(call.x)
    return needs[0], needs[1:first], needs[first:]


@lru_cache(maxsize=256)
def _edge_table(module: Any, table: EdgeTable) -> Any:
    # The compiled table is built once for each table and module, and not at each of the calls of a
    # step: it holds about 100 terms of a DARTS cell.
    edges = [(e.source, e.target, e.stride, len(e.terms)) for e in table.edges]
    return module.EdgeTable(
        table.inputs, table.nodes, table.outputs, table.candidates, edges, list(table.rows)
    )


class NativeConv:
    """Computes relu_conv_bn on the CPU, channels last."""

    def __init__(self, native: Native) -> None:
        self.native = native

    def forward(self, call: ConvCall) -> tuple[Tensor, list[Tensor]]:
        x = laid_out(call.x, LAST)
        stride, C = len(call.params), sum(p.shape[0] for p in call.params)
        # An odd size is rounded up, as a convolution of stride 2 does; kernels read zeros beyond
        # the edge.
        y = _new_last(x, x.shape[0], C, *(-(-size // stride) for size in x.shape[2:]))
        stats = torch.empty(2, C, dtype=accumulation_dtype(x.dtype), device=x.device)
        if call.running is not None:
            stats.copy_(call.running)
        if y.numel():
            self._run("relu_conv_bn_fwd", call, x, y, stats)
        return y, [stats]

    def backward(
        self, grad: Tensor, call: ConvCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        needs_dx, *needs_dp = needs
        x, y, dy = in_format([call.x, saved[0], grad], LAST)
        dx = [_new_last(x, *x.shape)] if needs_dx else []
        wanted = call.params if any(needs_dp) else []
        # Kernels sum over images, so that without any they would write no gradient.
        new = torch.empty_like if y.numel() else torch.zeros_like
        dparams = [new(p, memory_format=ROWS) for p in wanted]
        grads = places(x.device, LAST, dy=dy, dx=dx[0] if dx else None)
        grads |= places(x.device, dparams=dparams)
        if y.numel():
            self._run("relu_conv_bn_bwd", call, x, y, laid_out(saved[1]), **grads)
        return dx + [d for d, need in zip(dparams, needs_dp) if need]

    def _run(
        self, kernel: str, call: ConvCall, x: Tensor, y: Tensor, stats: Tensor, **fields: Any
    ) -> None:
        on, native = x.device, self.native
        N, in_C, rows, cols = x.shape
        weights = in_format(call.params, ROWS)
        filled = native.params(
            "ReluConvBnParams", dtype=DTYPES[x.dtype], images=N, rows=rows, cols=cols,
            in_channels=in_C, channels=y.shape[1], reduce=len(weights) == 2, eps=call.eps,
            training=call.running is None,
            **places(on, LAST, x=x, y=y), **places(on, params=weights, stats=stats), **fields,
            **native.launch(x),
        )  # fmt: skip
        size = native.module.relu_conv_bn_workspace(filled)
        space = torch.empty(size, dtype=torch.uint8, device=on)
        filled.set(workspace=address(space, on))
        native.run(kernel, filled, x)


def _new_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAST)


register("mixed_edges", CPU.name, NativeEdges(CPU, LAST), CELLS_ON_CPU)
register("relu_conv_bn", CPU.name, NativeConv(CPU), CELLS_ON_CPU)
_ON_GPU = NativeEdges(CUDA, ROWS, takes_choice=True)
register("mixed_edges", CUDA.name, DenseEdges(_ON_GPU, NativeNormSum(CUDA)), ON_GPU)
register("relu_conv_bn", CUDA.name, MatmulConv(NativeNormSum(CUDA)), ON_GPU)
