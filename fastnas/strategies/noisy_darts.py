"""NoisyDARTS (Chu, Zhang, Li, arXiv 2005.03566): DARTS with noise on the skip connections."""

from __future__ import annotations

from typing import Any

from fastnas.bounds import Bounds
from fastnas.checks import check_choice
from fastnas.reference import SkipNoise, cosine_decay
from fastnas.strategies.base import ORDERS, Strategy, check_epoch

DECAYS = ("none", "cosine")


class NoisyDARTS(Strategy):
    """DARTS without `none`, the skip's output noised so that its advantage must survive noise.

    Noise as the released code has it: on the output, fresh in every forward of both steps, sigma
    from the whole tensor. The unrolled step is ours (that code's does not run): its forward passes
    share one draw, else their finite difference measures the noise.

    Options: order; noise_kind, noise_mixture, noise_mean, noise_factor (`SkipNoise`); noise_decay
    "none" or "cosine" (over the whole search; the code fixes 50 epochs); skip_drop_path (0 is the
    paper's formula; the code has a hidden 0.3, there also in eval mode).
    """

    name = "noisy-darts"
    source = "Chu et al., arXiv 2005.03566"
    drops_none = True
    defaults = {"lr": 0.05, "batch_size": 128}
    options = {
        "order": 1,
        "noise_kind": "gaussian",
        "noise_mixture": "additive",
        "noise_mean": None,
        "noise_factor": 0.2,
        "noise_decay": "none",
        "skip_drop_path": 0.0,
    }

    bounds = {
        "order": ORDERS,
        "noise_mean": Bounds(-1e6, 1e6),
        "noise_factor": Bounds(0, 1e6),
        "skip_drop_path": Bounds(0, 1, below=True),
    }

    order: int
    noise_kind: str
    noise_mixture: str
    noise_mean: float | None
    noise_factor: float
    noise_decay: str
    skip_drop_path: float

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_choice("noise_decay", self.noise_decay, DECAYS)
        self.skip_noise()

    def skip_noise(self) -> SkipNoise:
        return SkipNoise(self.noise_kind, self.noise_mixture, self.noise_mean, self.noise_factor)

    def noise_amplitude(self, epoch: int, epochs: int) -> float:
        check_epoch(epoch, epochs, beyond=True)
        return cosine_decay(epoch, epochs) if self.noise_decay == "cosine" else 1.0

    def skip_drop_probability(self) -> float:
        return self.skip_drop_path
