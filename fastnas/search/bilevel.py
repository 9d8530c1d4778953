"""Makes one step of the bilevel search: logits on a validation batch, weights on a training batch.

Bilevel.arch_step      draws what the passes read, moves the logits by
  Strategy.arch_gradient(ArchStep)         a hypergradient: first order or unrolled, of
    ArchStep.valid_loss                    the network on the strategy's weights or paths
Bilevel.weight_step    the same with
  Strategy.params_gradient(WeightStep)     gradients of WeightStep.forward, accumulated
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fastnas.nn import ArchParameters, SearchNetwork
from fastnas.search.optimizers import step_where
from fastnas.strategies import Strategy
from fastnas.strategies.precision import Precision
from fastnas.strategies.steps import ArchStep, Batch, Inputs, WeightStep
from fastnas.transfer import to_device


class Bilevel:
    """Makes the two halves of a search step, each without the other's gradients.

    The architecture step forms no weight gradient and the weight step no logit gradient, which
    the public code does for nothing (1.4 to 1.6 times the work).

    Args:
        network, arch: what is searched; both on one device.
        strategy: the method.
        params_optimizer: SGD over the network's parameters (its settings are also those of the
            unrolled step).
        arch_optimizer: over the logits.
        grad_clip: largest norm of the weight gradient.
        precision: of both halves, by default fp32, and which processes make them together: weights,
            logits and running statistics end the same on all.
        cost: what the loss of the logits has besides, a function of them.
    """

    def __init__(
        self,
        network: SearchNetwork,
        arch: ArchParameters,
        strategy: Strategy,
        params_optimizer: Optimizer,
        arch_optimizer: Optimizer,
        grad_clip: float = 5.0,
        precision: Precision | None = None,
        cost: Callable[[ArchParameters], Tensor] | None = None,
    ) -> None:
        self.network = network
        self.arch = arch
        self.strategy = strategy
        self.params_optimizer = params_optimizer
        self.arch_optimizer = arch_optimizer
        self.grad_clip = grad_clip
        self.precision = Precision() if precision is None else precision
        self.cost = cost
        self.params = list(network.parameters())
        self.alphas = list(arch.parameters())

    def arch_step(self, valid: Batch, train: Batch) -> Tensor:
        """Moves the logits by their gradient of the loss on `valid`; returns that loss.

        `train` is what the unrolled gradient looks ahead on.
        """
        # The validation batch draws before the training batch, as in `GraphedBilevel`: the streams
        # come from one generator, so another order would be another run.
        return self.move_alphas(self._drawn(valid), self._drawn(train))

    def weight_step(self, train: Batch) -> tuple[Tensor, Tensor]:
        """Moves the weights by their gradient of the loss on `train`; returns loss and logits,
        [N, classes] or, of several passes or paths, with axes before these."""
        return self.move_params(self._drawn(train))

    def move_alphas(self, valid: Inputs, train: Inputs) -> Tensor:
        """Makes an `arch_step` on inputs that are on the device; draws nothing on the host."""
        self.strategy.begin(valid.sample)
        step = ArchStep(
            self.strategy, self.network, self.arch, self.params, self.alphas, valid, train,
            self.params_optimizer, self.precision.logits, self.cost,
        )  # fmt: skip
        gradient, loss = self.strategy.arch_gradient(step)
        gradient = self.precision.processes.means(gradient)
        for alpha, g in zip(self.alphas, gradient):
            # The gradient is assigned, not added: `arch_gradient` has summed up the passes already.
            alpha.grad = g
        if self.strategy.arch_grad_clip is not None:
            clip_grad_norm_(self.alphas, self.strategy.arch_grad_clip)
        self.precision.logits.move(self.alphas, loss, self.arch_optimizer.step)
        return loss

    def move_params(self, train: Inputs) -> tuple[Tensor, Tensor]:
        """Makes a `weight_step` on inputs that are on the device; draws nothing on the host."""
        self.strategy.begin(train.sample)
        # None and not 0: SGD skips a candidate that no pass has run, where a gradient of 0 would
        # let momentum and weight decay move it.
        self.params_optimizer.zero_grad(set_to_none=True)
        step = WeightStep(
            self.strategy, self.network, self.arch, self.params, train, self.grad_clip,
            self.precision.weights,
        )  # fmt: skip
        loss, logits = self.strategy.params_gradient(step)
        self.precision.processes.join_statistics(self.network.buffers())
        # In a CUDA graph every candidate has a gradient, 0 where it did not run. Which ones ran is
        # known on the device only, and SGD is told there to leave the others alone.
        ran = self.network.on_device(step.passes)
        self.precision.weights.move(
            self.params, loss, lambda: step_where(self.params_optimizer, ran)
        )
        return loss, logits.detach()

    def _drawn(self, batch: Batch) -> Inputs:
        images, labels = batch
        # The sample is drawn before the noise of the skips, as in `GraphedBilevel._drawn`: with and
        # without graphs a search is the same, bit for bit.
        sample = self.strategy.draw()
        if sample is not None:
            sample = to_device(sample, images.device)
        return Inputs(images, labels, self.network.draw(images.device), sample)
