"""Implements NoisyDARTS (Chu, Zhang, Li, arXiv 2005.03566): DARTS with noise on the skips."""

from __future__ import annotations

from fastnas.bounds import Bounds
from fastnas.options import option
from fastnas.reference import SkipNoise, cosine_decay
from fastnas.reference.skip_noise import MIXTURES
from fastnas.strategies.base import check_epoch
from fastnas.strategies.mixture import Mixture

KINDS = ("gaussian", "uniform")
DECAYS = ("none", "cosine")


class NoisyDARTS(Mixture):
    """Searches without `none` and adds noise to the skips, whose advantage must survive it.

    Noise as the released code has it: on the output, fresh in every forward of both steps, sigma
    from the whole tensor. The unrolled step is ours (that code's does not run): its forward passes
    share one draw, else their finite difference measures the noise.

    The cosine decay runs over the whole search, where the code fixes 50 epochs. A skip_drop_path
    of 0 is the paper's formula; the code has a hidden 0.3, there also in eval mode.
    """

    name = "noisy-darts"
    source = "Chu et al., arXiv 2005.03566"
    drops_none = True
    defaults = {"lr": 0.05, "batch_size": 128}

    noise_kind: str = option("gaussian", "distribution of the noise", choices=KINDS)
    noise_mixture: str = option("additive", "how a skip takes the noise", choices=MIXTURES)
    noise_mean: float | None = option(
        None, "mean of the noise (0; multiplicative: 1)", Bounds(-1e6, 1e6)
    )
    noise_factor: float = option(0.2, "lambda: the strength of the noise", Bounds(0, 1e6))
    noise_decay: str = option("none", "how the noise falls over the epochs", choices=DECAYS)
    skip_drop_path: float = option(0.0, "drop-path on the skips", Bounds(0, 1, below=True))

    def skip_noise(self) -> SkipNoise:
        return SkipNoise(self.noise_kind, self.noise_mixture, self.noise_mean, self.noise_factor)

    def noise_amplitude(self, epoch: int, epochs: int) -> float:
        check_epoch(epoch, epochs, beyond=True)
        return cosine_decay(epoch, epochs) if self.noise_decay == "cosine" else 1.0

    def skip_drop_probability(self) -> float:
        return self.skip_drop_path
