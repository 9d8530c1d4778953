"""Runs the compiled kernels of mixed_sum, mixed_norm_sum and sample_paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnas.backends.address import address, addresses, places
from fastnas.backends.calls import NormSumCall, PathsCall, SumCall
from fastnas.backends.native import CPU, CUDA, DTYPES, Native
from fastnas.backends.op_table import ALL, LOGITS, ON_GPU, register
from fastnas.backends.outputs import NormSumKernel, PathsKernel, Place, SumKernel


def _sum_params(
    native: Native, call: SumCall | NormSumCall, place: Place, like: Tensor, **fields: Any
) -> Any:
    """Fills MixedSumParams for a call of either sum on terms shaped like `like`.

    Args:
        fields: addresses that forward and backward do not share.
    """
    on, noise = like.device, call.noise
    own = {"n": like.numel(), "dtype": DTYPES[like.dtype], "w": address(call.w, on)}
    # Terms that backward does not read are null there; their number is still that of w.
    own["x"] = addresses(call[0], on, place.layout) or [0] * call.w.numel()
    # channels and pixels turn a place in channels-last memory into the NCHW position that noise is
    # indexed by; 0 tells kernels that memory is in that order already.
    if noise.noisy:
        own |= noise._asdict() | places(on, level=noise.level, rng=noise.rng)
        if place.channels_last:
            own |= {"channels": place.channels, "pixels": place.pixels}
    return native.params("MixedSumParams", **own, **fields, **native.launch(like))


class NativeSum(SumKernel):
    def __init__(self, native: Native) -> None:
        self.native = native

    def blocks(self, n: int) -> int:
        return self.native.blocks(n)

    def fill(self, call: SumCall, place: Place, y: Tensor, std: Tensor, partial: Tensor) -> None:
        rows = _filled(y.device, std=std, partial=partial)
        at = address(y, y.device, place.layout)
        params = _sum_params(self.native, call, place, y, y=at, **rows)
        self.native.run("mixed_sum_fwd", params, y)

    def fill_grads(
        self,
        dy: Tensor,
        call: SumCall,
        place: Place,
        std: Tensor,
        dx: list[Tensor | None],
        dw: Tensor,
        partial: Tensor,
    ) -> None:
        rows = _filled(dy.device, std=std, dw=dw, partial=partial)
        grads = places(dy.device, place.layout, dy=dy, dx=dx)
        params = _sum_params(self.native, call, place, dy, **rows, **grads)
        self.native.run("mixed_sum_bwd", params, dy)


def _filled(on: torch.device, **tensors: Tensor) -> dict[str, Any]:
    """Gives the addresses of those that have room: the others' fields are null as they are."""
    return places(on, **{name: t for name, t in tensors.items() if t.numel()})


class NativeNormSum(NormSumKernel):
    def __init__(self, native: Native) -> None:
        self.native = native

    def blocks(self, n: int) -> int:
        return self.native.blocks(n)

    def parts(self, n: int, place: Place) -> int:
        make = self.native.params
        # The answer depends on sizes alone; the struct refuses to be made without a term.
        terms = make("MixedSumParams", n=n, x=[0])
        params = make("MixedNormSumParams", sum=terms, **_shape(place))
        count: int = self.native.module.mixed_norm_sum_parts(params)
        return count

    def _params(
        self, call: NormSumCall, training: bool, place: Place, terms: Any, partial: Tensor
    ) -> Any:
        """Fills MixedNormSumParams for a call, `terms` being its MixedSumParams."""
        # Statistics are stored for normed terms only, so a term needs to know its row among them.
        rows, row = [], 0
        for is_normed in call.normed:
            rows.append(row if is_normed else -1)
            row += is_normed
        return self.native.params(
            "MixedNormSumParams", sum=terms, norm=rows, training=training, eps=call.eps,
            **_shape(place),
            **places(partial.device, mean=call.mean, var=call.var, partial=partial),
        )  # fmt: skip

    def fill(
        self,
        call: NormSumCall,
        training: bool,
        place: Place,
        y: Tensor,
        std: Tensor,
        moments: Tensor,
        partial: Tensor,
    ) -> None:
        rows = places(y.device, std=std, partial=partial)
        out = places(y.device, place.layout, y=y)
        terms = _sum_params(self.native, call, place, y, **rows, **out)
        params = self._params(call, training, place, terms, moments)
        self.native.run("mixed_norm_sum_fwd", params, y)

    def fill_grads(
        self,
        dy: Tensor,
        call: NormSumCall,
        training: bool,
        place: Place,
        std: Tensor,
        dz: list[Tensor | None],
        dw: Tensor,
        partial: Tensor,
    ) -> None:
        rows = places(dy.device, std=std, dw=dw)
        grads = places(dy.device, place.layout, dy=dy, dx=dz)
        terms = _sum_params(self.native, call, place, dy, **rows, **grads)
        params = self._params(call, training, place, terms, partial)
        self.native.run("mixed_norm_sum_bwd", params, dy)


def _shape(place: Place) -> dict[str, Any]:
    names = ("channels", "pixels", "channels_last")
    return {name: getattr(place, name) for name in names}


class NativePaths(PathsKernel):
    def __init__(self, native: Native) -> None:
        self.native = native

    def fill(self, call: PathsCall, op: Tensor, weight: Tensor) -> None:
        self._run("sample_paths_fwd", call, op, weight=weight)

    def fill_grads(
        self, dweight: Tensor, call: PathsCall, op: Tensor, dalpha: Tensor, dbeta: Tensor
    ) -> None:
        self._run("sample_paths_bwd", call, op, dweight=dweight, dalpha=dalpha, dbeta=dbeta)

    def _run(self, kernel: str, call: PathsCall, op: Tensor, **own: Tensor) -> None:
        """Runs a kernel whose struct has the call's fields, and the tensors in `own`."""
        edges, ops = call.alpha.shape[-2:]
        # The names of the fields are those of the struct, so nothing is listed twice. None stands
        # for a pointer that is null.
        given = call._asdict()
        tensors = {k: t for k, t in given.items() if t is None or isinstance(t, Tensor)}
        params = self.native.params(
            "SamplePathsParams",
            **given | places(op.device, **tensors, op=op, **own),
            dtype=DTYPES[call.alpha.dtype],
            types=call.alpha.numel() // (edges * ops),
            ops=ops,
            **self.native.launch(op),
        )
        self.native.run(kernel, params, op)


for _native, _dtypes in ((CPU, ALL), (CUDA, ON_GPU)):
    register("mixed_sum", _native.name, NativeSum(_native), _dtypes)
    register("mixed_norm_sum", _native.name, NativeNormSum(_native), _dtypes)
    register("sample_paths", _native.name, NativePaths(_native), LOGITS)
