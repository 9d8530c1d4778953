"""What the compiled backends share: addresses out of tensors, one allocation per output."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.layout import channels_and_pixels, common_format, in_common_format
from fastnas.backends.request import Request

DTYPE_TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def load_native(module: str) -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it does not import)."""
    try:
        return importlib.import_module(f"fastnas.{module}"), None
    except ImportError as error:
        return None, f"fastnas.{module} does not import ({error}); FASTNAS_BUILD governs the build"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class NativeBackend:
    """A backend whose kernels take addresses; subclasses say what to launch them with."""

    name: str
    device: str

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

    def can_run(self, request: Request) -> str | None:
        return request.refusal(self.name, self.device)

    def mixed_sum_fwd(
        self,
        x: list[Tensor],
        w: Tensor,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, layout = in_common_format(x)
        y = torch.empty_like(x[0], memory_format=layout)
        std = self._float64(y, len(noisy) if form == "gaussian_additive" else 0)
        n = y.numel()
        partial = self._float64(y, 3 * self.module.block_count(n) * std.numel())
        w = w.to(accumulation_dtype(y.dtype)).contiguous()
        self.module.mixed_sum_fwd(
            n,
            DTYPE_TAGS[y.dtype],
            [t.data_ptr() for t in x],
            w.data_ptr(),
            partial.data_ptr(),
            self._noise(y, layout, noisy, form, level, rng, std),
            y.data_ptr(),
            self.launch_argument(y),
        )
        return y, std

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
        layout = common_format([dy])
        dy = dy.contiguous(memory_format=layout)
        x = [t.contiguous(memory_format=layout) for t in x]
        terms, n = w.numel(), dy.numel()
        wide_w = w.to(accumulation_dtype(dy.dtype)).contiguous()
        dw = torch.empty_like(wide_w) if needs_dw else wide_w.new_empty(0)
        dx = [torch.empty_like(dy, memory_format=layout) if need else None for need in needs_dx]
        partial = self._float64(dy, terms * self.module.block_count(n) if needs_dw else 0)
        self.module.mixed_sum_bwd(
            n,
            DTYPE_TAGS[dy.dtype],
            [t.data_ptr() for t in x] if needs_dw else [0] * terms,
            wide_w.data_ptr(),
            partial.data_ptr(),
            self._noise(dy, layout, noisy, form, level, rng, std),
            dy.data_ptr(),
            [0 if d is None else d.data_ptr() for d in dx],
            dw.data_ptr() if needs_dw else 0,
            self.launch_argument(dy),
        )
        return [d for d in dx if d is not None], dw.to(w.dtype)

    def _noise(
        self,
        like: Tensor,
        layout: torch.memory_format,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        std: Tensor,
    ) -> Any:
        if not noisy:
            return self._no_noise
        channels, pixels = channels_and_pixels(like, layout)
        return self.module.NoiseArguments(
            getattr(self.module.NoiseForm, form),
            noisy,
            0 if level is None else level.data_ptr(),
            0 if rng is None else rng.data_ptr(),
            std.data_ptr(),
            channels,
            pixels,
        )

    def _float64(self, like: Tensor, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=like.device)
