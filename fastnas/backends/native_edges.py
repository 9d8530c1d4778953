"""mixed_edges on the compiled backends: tensors laid out for the kernels, addresses in a struct."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.address import address, addresses, laid_out
from fastnas.backends.held import Held, accumulation_dtype
from fastnas.backends.layout import state_format
from fastnas.reference import EDGE_OPS, EdgeTable

DTYPE_TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class NativeEdges:
    """Calls the module of a backend, which says how tensors lie and what runs the kernels."""

    module: Any
    edges_format: torch.memory_format
    """Of states and their gradients, as the kernels read and write them."""
    takes_choice = False
    """Whether kernels read the sampled candidates."""

    def set_launch(self, call: Any, like: Tensor) -> None:
        """Gives the arguments of a call the threads or the stream that run it."""
        raise NotImplementedError

    def call(self, name: str, like: Tensor, *arguments: Any) -> None:
        """Runs a function of the module on the device of `like`."""
        getattr(self.module, name)(*arguments)

    def _edge_table(self, table: EdgeTable) -> Any:
        return _edge_table(self.module, table)

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
        choice: Tensor | None = None,
    ) -> tuple[Tensor, Held]:
        x = [laid_out(t, self.edges_format) for t in x]
        size, training = table.node_size([t.shape for t in x]), running is None
        out = self._new(x[0], size[0], table.nodes * size[1], *size[2:])
        held = Held.empty(x[0], table, size, form, memory, keep_gram, training, choice is not None)
        if running is not None:
            held.stats.copy_(running)
        if out.numel():
            call = self._call(x, out, w, params, held, table, eps, form, level, rng, choice)
            call.training = training
            self._run("mixed_edges_fwd", table, call, out.device)
        else:
            for tensor in held:
                tensor.zero_()
        return out.contiguous(memory_format=state_format(out)), held

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
        choice: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        dout, out, *x = (laid_out(t, self.edges_format) for t in (dout, out, *x))
        held = Held(*(laid_out(t) for t in held))
        dx = [self._new(t, *t.shape) if need else None for t, need in zip(x, needs_dx)]
        # Kernels write no gradient of a candidate that is not sampled, and do not run on nothing.
        new = torch.empty_like if choice is None and out.numel() else torch.zeros_like
        dparams = [new(p, memory_format=torch.contiguous_format) for p in params]
        dw = torch.zeros(w.shape if needs_dw else (0,), dtype=torch.float64, device=w.device)
        if out.numel():
            call = self._call(x, out, w, params, held, table, eps, form, level, rng, choice)
            on = out.device
            call.dout = address(dout, on, self.edges_format)
            call.dx = addresses(dx, on, self.edges_format)
            call.dparams = addresses(dparams, on) if needs_dparams else []
            call.dw = address(dw, on)
            self._run("mixed_edges_bwd", table, call, on)
        layout = state_format(out)
        wanted = [d.contiguous(memory_format=layout) for d in dx if d is not None]
        return wanted, dw.to(w.dtype), dparams if needs_dparams else []

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
        choice: Tensor | None,
    ) -> Any:
        """The arguments that forward and backward share; keeps the tensors that it made alive."""
        call = self.module.MixedEdgesArguments()
        params = [laid_out(p) for p in params]
        w = laid_out(w.to(accumulation_dtype(x[0].dtype)))
        on = out.device
        call.dtype = DTYPE_TAGS[x[0].dtype]
        call.images = x[0].shape[0]
        call.channels = x[0].shape[1]
        call.sizes = [size for t in x for size in t.shape[2:]]
        call.x = addresses(x, on, self.edges_format)
        call.params = addresses(params, on)
        call.w, call.out = address(w, on), address(out, on, self.edges_format)
        for name in ("stats", "shift", "gram", "v", "u", "std"):
            setattr(call, name, address(getattr(held, name), on))
        call.eps = eps
        if form != "none":
            assert level is not None and rng is not None
            rng, level = laid_out(rng), laid_out(level)
            call.form = getattr(self.module.NoiseForm, form)
            call.level, call.rng = address(level, on), address(rng, on)
        if choice is not None:
            choice = laid_out(choice)
            call.choice = address(choice, on)
        self.set_launch(call, out)
        call.alive = params, w, rng, level, choice, held
        return call

    def _run(self, name: str, table: EdgeTable, call: Any, device: torch.device) -> None:
        edges = self._edge_table(table)
        size = self.module.mixed_edges_workspace(edges, call)
        space = torch.empty(size, dtype=torch.uint8, device=device)
        self.call(name, space, edges, call, address(space, device))

    def _new(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(
            shape, dtype=like.dtype, device=like.device, memory_format=self.edges_format
        )


@lru_cache(maxsize=256)
def _edge_table(module: Any, table: EdgeTable) -> Any:
    edges = [(e.source, e.target, e.stride, len(e.terms)) for e in table.edges]
    terms = [(EDGE_OPS.index(t.op), t.weight, t.size, t.dilation) for _, t in table.terms]
    return module.EdgeTable(table.inputs, table.nodes, table.candidates, edges, terms)
