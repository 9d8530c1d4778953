"""Eager torch: the reference itself, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends.layout import common_format
from fastnas.backends.request import Request


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
