"""What the compiled backends share: addresses out of tensors."""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from typing import Any

from torch import Tensor

from fastnas.backends.fused import FusedBackend, MixedSumNoise, Norm
from fastnas.backends.native_edges import DTYPE_TAGS, NativeEdges
from fastnas.backends.sampling import FusedSampling, PathDraw


def load_native(module: str) -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it does not import)."""
    try:
        return importlib.import_module(f"fastnas.{module}"), None
    except ImportError as error:
        return None, f"fastnas.{module} does not import ({error}); FASTNAS_BUILD governs the build"


class NativeBackend(NativeEdges, FusedSampling, FusedBackend):
    """A backend whose kernels take addresses; subclasses say what to launch them with."""

    def __init__(self, module: ModuleType | None, missing: str | None) -> None:
        self.module: Any = module
        self.missing = missing
        if module is not None:
            self._no_noise = module.NoiseArguments(module.NoiseForm.none, [], 0, 0, 0, 0, 0)

    def launch_argument(self, like: Tensor) -> int:
        """Threads on a CPU, the current stream on a GPU."""
        raise NotImplementedError

    def unavailable(self) -> str | None:
        return self.missing

    def block_count(self, n: int) -> int:
        return self.module.block_count(n)

    def launch_mixed_sum_fwd(
        self, x: list[Tensor], w: Tensor, y: Tensor, noise: MixedSumNoise, partial: Tensor
    ) -> None:
        self.call(
            "mixed_sum_fwd",
            y,
            y.numel(),
            DTYPE_TAGS[y.dtype],
            [t.data_ptr() for t in x],
            w.data_ptr(),
            partial.data_ptr(),
            self._noise(noise),
            y.data_ptr(),
            self.launch_argument(y),
        )

    def launch_mixed_sum_bwd(
        self,
        dy: Tensor,
        x: list[Tensor],
        w: Tensor,
        dx: list[Tensor | None],
        dw: Tensor,
        noise: MixedSumNoise,
        partial: Tensor,
    ) -> None:
        self.call(
            "mixed_sum_bwd",
            dy,
            dy.numel(),
            DTYPE_TAGS[dy.dtype],
            [t.data_ptr() for t in x] or [0] * w.numel(),
            w.data_ptr(),
            partial.data_ptr(),
            self._noise(noise),
            dy.data_ptr(),
            [0 if d is None else d.data_ptr() for d in dx],
            dw.data_ptr() if dw.numel() else 0,
            self.launch_argument(dy),
        )

    def norm_parts(self, like: Tensor, norm: Norm) -> int:
        return self.module.mixed_norm_sum_parts(
            like.numel(), norm.channels, norm.pixels, norm.channels_last
        )

    def launch_mixed_norm_sum_fwd(
        self,
        z: list[Tensor],
        w: Tensor,
        y: Tensor,
        norm: Norm,
        noise: MixedSumNoise,
        moments: Tensor,
        partial: Tensor,
    ) -> None:
        self.call(
            "mixed_norm_sum_fwd",
            y,
            y.numel(),
            DTYPE_TAGS[y.dtype],
            [t.data_ptr() for t in z],
            w.data_ptr(),
            partial.data_ptr(),
            self._noise(noise),
            self._norm(norm, moments),
            y.data_ptr(),
            self.launch_argument(y),
        )

    def launch_mixed_norm_sum_bwd(
        self,
        dy: Tensor,
        z: list[Tensor | None],
        w: Tensor,
        dz: list[Tensor | None],
        dw: Tensor,
        norm: Norm,
        noise: MixedSumNoise,
        partial: Tensor,
    ) -> None:
        self.call(
            "mixed_norm_sum_bwd",
            dy,
            dy.numel(),
            DTYPE_TAGS[dy.dtype],
            _addresses(z),
            w.data_ptr(),
            self._noise(noise),
            self._norm(norm, partial),
            dy.data_ptr(),
            _addresses(dz),
            dw.data_ptr() if dw.numel() else 0,
            self.launch_argument(dy),
        )

    def launch_sample_paths_fwd(self, draw: PathDraw, op: Tensor, weight: Tensor) -> None:
        taken = (t.data_ptr() for t in (op, weight))
        launch = self.launch_argument(op)
        self.call("sample_paths_fwd", op, *draw.addresses(len(op)), *taken, launch)

    def launch_sample_paths_bwd(
        self, draw: PathDraw, op: Tensor, dweight: Tensor, dalpha: Tensor, dbeta: Tensor
    ) -> None:
        taken = (t.data_ptr() for t in (op, dweight, dalpha, dbeta))
        launch = self.launch_argument(op)
        self.call("sample_paths_bwd", op, *draw.addresses(len(op)), *taken, launch)

    def _norm(self, norm: Norm, partial: Tensor) -> Any:
        rows = itertools.count()
        return self.module.NormArguments(
            [next(rows) if normed else -1 for normed in norm.normed],
            norm.channels,
            norm.pixels,
            norm.channels_last,
            norm.training,
            norm.eps,
            norm.mean.data_ptr(),
            norm.var.data_ptr(),
            partial.data_ptr(),
        )

    def _noise(self, noise: MixedSumNoise) -> Any:
        if not noise.noisy:
            return self._no_noise
        assert noise.level is not None and noise.rng is not None
        return self.module.NoiseArguments(
            getattr(self.module.NoiseForm, noise.form),
            noise.noisy,
            noise.level.data_ptr(),
            noise.rng.data_ptr(),
            noise.std.data_ptr(),
            noise.channels,
            noise.pixels,
        )


def _addresses(tensors: list[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
