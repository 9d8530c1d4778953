"""Implements SmoothDARTS (Chen, Hsieh, ICML 2020, arXiv 2002.05283): weights trained on perturbed
mixtures, so that the loss is flat in the mixing weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastnas.bounds import Bounds, whole
from fastnas.nn import ArchParameters
from fastnas.ops import draw_rng
from fastnas.options import option
from fastnas.reference.skip_noise import philox_draw
from fastnas.spaces import CELL_TYPES
from fastnas.strategies.hypergradient import frozen
from fastnas.strategies.scheduled import Scheduled
from fastnas.strategies.steps import WeightStep, cross_entropy
from fastnas.transfer import to_device

RADII = Bounds(0, 1)


class SmoothDARTS(Scheduled):
    """Trains the weights of the network on mixing weights in a ball around softmax(alpha).

    In the max norm its radius is eps_e = start + (end - start) e / E in epoch e of E. Perturbed are
    the mixing weights and not the logits. After each move they are brought back to weights of a
    mixture (`onto_simplex`). The logits move by the loss on softmax(alpha), as in DARTS.
    """

    source = "Chen & Hsieh, ICML 2020, arXiv 2002.05283"
    figure = "perturbation"
    layout_defaults = {"nb201": {"epochs": 100}}

    perturbation_start: float = option(0.03, "radius of the first epoch", RADII)
    perturbation_end: float = option(0.3, "radius that it grows to linearly", RADII)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._trained_on: dict[str, Tensor] | None = None

    def level_of(self, epoch: int, epochs: int) -> float:
        start = self.perturbation_start
        return start + (self.perturbation_end - start) * epoch / epochs

    def draw(self) -> Tensor:
        """Returns the bits of the radius and a stream for each cell type, int64 [1 + 2 types]."""
        return torch.cat([super().draw(), draw_rng(len(CELL_TYPES)).flatten()])

    def forward_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        return self.mixing_weights(arch) if self._trained_on is None else self._trained_on

    def params_gradient(self, step: WeightStep) -> tuple[Tensor, Tensor]:
        if self._drawn is None:
            self.begin(to_device(self.draw(), step.train.images.device))
        with torch.no_grad():
            centre = self.mixing_weights(step.arch)
        self._trained_on = self.perturbed(centre, step)
        try:
            return super().params_gradient(step)
        finally:
            # The other half of the step, and the validation, are on softmax(alpha).
            self._trained_on = None

    def perturbed(self, centre: Mapping[str, Tensor], step: WeightStep) -> dict[str, Tensor]:
        """Returns what the weights are trained on, [E, K] of each cell type."""
        return self.uniform(centre)

    def uniform(self, centre: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draws each weight uniformly from centre - eps to centre + eps, then `onto_simplex`."""
        assert self._drawn is not None
        streams = self._drawn[1:].view(-1, 2)
        found = {}
        for (cell, w), rng in zip(centre.items(), streams):
            u = philox_draw("uniform_additive", rng, 0, w).to(w.dtype)
            found[cell] = onto_simplex(w + self.current(w) * u)
        return found


class SDARTSRS(SmoothDARTS):
    """Draws what the weights are trained on uniformly from the ball, anew in every step."""

    name = "sdarts-rs"


class SDARTSADV(SmoothDARTS):
    """Searches the ball for the worst mixture, by ascent on the training loss of the step's batch.

    w_0 = P(centre + eps U(-1, 1)),  w_i = P(centre + clip(w_{i-1} + (2 eps / n) sign(g) - centre))

    g is the gradient of the loss at w_{i-1}, clip to -eps .. eps, P is `onto_simplex`, and n is
    `attack_steps`. What is weaker than the centre itself is dropped for it. As in the released code
    the network is in eval mode meanwhile. Of several processes all ascend by the mean of their
    gradients.
    """

    name = "sdarts-adv"

    attack_steps: int = option(7, "steps of ascent", whole(1, 1000))

    def not_capturable(self) -> str | None:
        return super().not_capturable() or "the attack of sdarts-adv runs the network in eval mode"

    def perturbed(self, centre: Mapping[str, Tensor], step: WeightStep) -> dict[str, Tensor]:
        step.network.eval()
        try:
            with frozen(step.params):
                return self._attacked(centre, step)
        finally:
            step.network.train()

    def _attacked(self, centre: Mapping[str, Tensor], step: WeightStep) -> dict[str, Tensor]:
        def loss_at(weights: Mapping[str, Tensor]) -> Tensor:
            with step.precision.autocast():
                return cross_entropy(step.network(step.train.images, weights), step.train.labels)

        processes = step.precision.processes

        found = self.uniform(centre)
        for _ in range(self.attack_steps):
            leaves = [w.requires_grad_() for w in found.values()]
            ascent = processes.means(step.precision.grad(loss_at(found), leaves))
            with torch.no_grad():
                found = {
                    cell: self._moved(w, found[cell], g)
                    for (cell, w), g in zip(centre.items(), ascent)
                }
        with torch.no_grad():
            losses = torch.stack([loss_at(centre), loss_at(found)])
            (losses,) = processes.means([losses])
            # It is chosen on the device, without a word to the host.
            weaker = losses[0] > losses[1]
            return {cell: torch.where(weaker, w, found[cell]) for cell, w in centre.items()}

    def _moved(self, centre: Tensor, w: Tensor, slope: Tensor) -> Tensor:
        eps = self.current(w)
        away = w + 2 * eps / self.attack_steps * slope.sign() - centre
        return onto_simplex(centre + away.clamp(-eps, eps))


def onto_simplex(w: Tensor) -> Tensor:
    """Returns weights [E, K] of mixtures: clipped to 0 .. 1, then divided by their sum.

    Where nothing is left of an edge its largest weight becomes 1.
    """
    clipped = w.clamp(0, 1)
    largest = torch.zeros_like(w).scatter(-1, w.argmax(-1, keepdim=True), 1)
    kept = torch.where(clipped.sum(-1, keepdim=True) == 0, largest, clipped)
    return kept / kept.sum(-1, keepdim=True)
