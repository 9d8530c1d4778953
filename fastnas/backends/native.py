"""What the compiled backends share: addresses out of tensors."""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.address import address, addresses
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
        on, layout = y.device, noise.layout
        self.call(
            "mixed_sum_fwd",
            y,
            y.numel(),
            DTYPE_TAGS[y.dtype],
            addresses(x, on, layout),
            address(w, on),
            address(partial, on),
            self._noise(noise, on),
            address(y, on, layout),
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
        on, layout = dy.device, noise.layout
        self.call(
            "mixed_sum_bwd",
            dy,
            dy.numel(),
            DTYPE_TAGS[dy.dtype],
            addresses(x, on, layout) or [0] * w.numel(),
            address(w, on),
            address(partial, on),
            self._noise(noise, on),
            address(dy, on, layout),
            addresses(dx, on, layout),
            address(dw, on),
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
        on, layout = y.device, noise.layout
        self.call(
            "mixed_norm_sum_fwd",
            y,
            y.numel(),
            DTYPE_TAGS[y.dtype],
            addresses(z, on, layout),
            address(w, on),
            address(partial, on),
            self._noise(noise, on),
            self._norm(norm, moments, on),
            address(y, on, layout),
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
        on, layout = dy.device, noise.layout
        self.call(
            "mixed_norm_sum_bwd",
            dy,
            dy.numel(),
            DTYPE_TAGS[dy.dtype],
            addresses(z, on, layout),
            address(w, on),
            self._noise(noise, on),
            self._norm(norm, partial, on),
            address(dy, on, layout),
            addresses(dz, on, layout),
            address(dw, on),
            self.launch_argument(dy),
        )

    def launch_sample_paths_fwd(self, draw: PathDraw, op: Tensor, weight: Tensor) -> None:
        taken = addresses((op, weight), op.device)
        launch = self.launch_argument(op)
        self.call("sample_paths_fwd", op, *draw.addresses(len(op)), *taken, launch)

    def launch_sample_paths_bwd(
        self, draw: PathDraw, op: Tensor, dweight: Tensor, dalpha: Tensor, dbeta: Tensor
    ) -> None:
        taken = addresses((op, dweight, dalpha, dbeta), op.device)
        launch = self.launch_argument(op)
        self.call("sample_paths_bwd", op, *draw.addresses(len(op)), *taken, launch)

    def _norm(self, norm: Norm, partial: Tensor, on: torch.device) -> Any:
        rows = itertools.count()
        return self.module.NormArguments(
            [next(rows) if normed else -1 for normed in norm.normed],
            norm.channels,
            norm.pixels,
            norm.channels_last,
            norm.training,
            norm.eps,
            *addresses((norm.mean, norm.var, partial), on),
        )

    def _noise(self, noise: MixedSumNoise, on: torch.device) -> Any:
        if not noise.noisy:
            return self._no_noise
        return self.module.NoiseArguments(
            getattr(self.module.NoiseForm, noise.form),
            noise.noisy,
            *addresses((noise.level, noise.rng, noise.std), on),
            noise.channels,
            noise.pixels,
        )
