"""Searches a network of one's own: the choices in it, on data of one's own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map
from torch.utils.data import DistributedSampler

from fastnas.checks import check_int, check_number, check_type
from fastnas.nn import Choice, InputChoice, derived_network, split_parameters
from fastnas.nn.logits import Logits
from fastnas.processes import here
from fastnas.reference import cosine_decay
from fastnas.search.callbacks import Callback, StopSearch
from fastnas.search.choice_cost import cost_of_choices
from fastnas.search.choice_settings import (
    check_batches,
    check_callbacks,
    check_loss,
    check_settings,
    checked_precision,
    checked_tau,
    logit_optimizer_of,
    weight_optimizer_of,
)
from fastnas.search.choice_state import parts_of, restore_state, write_state
from fastnas.search.choice_steps import ArchHalf, Loss, cross_entropy, endless
from fastnas.search.choice_together import batches_together, check_alike
from fastnas.search.diverged import DivergedError, first_not_finite
from fastnas.strategies.hypergradient import first_order, frozen, unrolled


class ChoiceSearch:
    """Searches a network with choices: moves its logits and its weights in turns, and derives.

    A step takes a batch of `valid` and one of `train`, with the logits alpha and the weights w::

        alpha <- alpha - Adam(grad_alpha L_valid(w, alpha))       (order 2: DARTS eq. 7 and 8)
        w     <- w - SGD(clip(grad_w L_train(w, alpha)))

    neither half forms the other's gradients. What mixes or samples is said by each `Choice` and
    `InputChoice` ("softmax": DARTS, with noise NoisyDARTS; "sigmoid": FairDARTS; "gdas": GDAS;
    "top2", "pairs": ROME). With K `samples` each half runs K times on its batch, each with samples
    of its own: gradients of the logits are averaged, those of the weights added (ROME eq. 11, 12).
    What was not sampled has no gradient (None), and the optimizer leaves it alone.

    In torch's default process group (`torchrun`) the processes make the steps together: each has
    batches of its own, gradients and running statistics are means over the processes, and samples
    agree, as all draw from the same random state. Each begins with the same seed, and its loaders
    with its own share, such as by a DistributedSampler, whose epoch is set here. The first process
    writes checkpoints.

    Sources: Liu et al., ICLR 2019 (DARTS), algorithm 1; Chu et al., ECCV 2020 (FairDARTS), eq. 5;
    Wang et al., ICCV 2023 (ROME).

    Args:
        network: on the device where it is to run; at least one choice in it has logits.
        train: batches, in what can be iterated anew for each epoch, such as a DataLoader; an epoch
            is one pass over it. Tensors in a batch, in tuples, lists and dicts, are moved to the
            network's device.
        valid: the same; it begins with each epoch, and again where it ends.
        loss: maps (network, batch) to a loss []; by default the cross entropy of pairs of inputs
            and labels. Whatever a batch holds, it is up to this function.
        epochs: of the whole search.
        order: 1: first order, 2: unrolled, which nothing that samples allows.
        samples: K, of what samples.
        tau: temperature of what samples in the first epoch and the last, linear between (GDAS' code
            has (10, 0.1)); None: it stays what each choice has.
        noise_decay: how the noise of choices falls, by `noise_amplitude`: "none", or "cosine".
        zero_one_weight: w01 of FairDARTS' loss -w01 mean((sigmoid(alpha) - 1/2)^2), over all
            choices that mix by sigmoids.
        weight_optimizer: over the weights of `split_parameters(network)`; by default SGD with rate
            .025, momentum .9 and weight decay 3e-4, as DARTS has it.
        logit_optimizer: over its logits; by default Adam with rate 3e-4, betas (.5, .999) and
            weight decay 1e-3.
        scheduler: of the weights' rate, moved once an epoch; by default a cosine to .001 for the
            default optimizer, and none for another.
        grad_clip: largest norm of the gradient of the weights.
        precision: of forward and backward: "fp32" (as the network is), or by `torch.autocast`
            "bf16" or "fp16", with a scaled loss. Parameters are float32 in these two.
        cost: what the derived network may cost with one sample, "macs:300e6", "params:3e6" or
            "latency:12ms": cost_weight max(0, E[cost] / target - 1) is added to the logits' loss.
        cost_weight: of that term, 1 by default.
        cost_batch: what the costs are counted with; by default the first sample of `train`.
        callbacks: are told of each step and epoch, and may end the search (`StopSearch`).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        ProcessesError: the processes have other networks, or random states.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Iterable[Any],
        valid: Iterable[Any],
        *,
        epochs: int,
        loss: Loss = cross_entropy,
        order: int = 1,
        samples: int = 1,
        tau: tuple[float, float] | None = None,
        noise_decay: str = "none",
        zero_one_weight: float = 0.0,
        weight_optimizer: Optimizer | None = None,
        logit_optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        grad_clip: float = 5.0,
        precision: str = "fp32",
        cost: str | None = None,
        cost_weight: float | None = None,
        cost_batch: Any = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_type("network", network, nn.Module)
        if isinstance(network, DistributedDataParallel):
            raise TypeError(
                "network is a DistributedDataParallel; its module is needed, whose gradients the"
                " search brings together itself"
            )
        check_int("epochs", epochs, 1)
        check_number("grad_clip", grad_clip)
        if not 0 < grad_clip < math.inf:
            raise ValueError(f"grad_clip is {grad_clip}; a finite number > 0 is needed")
        for name, batches in (("train", train), ("valid", valid)):
            check_batches(name, batches)
        check_loss(loss)
        check_callbacks(callbacks)
        self.network, self.train, self.valid, self.loss = network, train, valid, loss
        self.epochs, self.order, self.samples = epochs, order, samples
        self.noise_decay, self.zero_one_weight = noise_decay, zero_one_weight
        self.grad_clip, self.callbacks = grad_clip, list(callbacks)
        self.choices = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, Logits) and module.logits is not None
        }
        """The choices that have logits, by their names in the network."""
        self.tau = checked_tau(tau)
        check_settings(
            self.choices, order=order, samples=samples, tau=self.tau, noise_decay=noise_decay,
            zero_one_weight=zero_one_weight,
        )  # fmt: skip
        self.weights, self.logits = split_parameters(network)
        self.weight_optimizer, self.scheduler = weight_optimizer_of(
            self.weights, self.logits, weight_optimizer, scheduler, epochs, order
        )
        self.logit_optimizer = logit_optimizer_of(self.weights, self.logits, logit_optimizer)
        self.device = self.logits[0].device
        self.processes = here()
        self.precision = checked_precision(precision, self.device, network)
        self.cost = cost_of_choices(self, cost, cost_weight, cost_batch)
        self.epoch = 0
        """Epochs done."""
        self.history: list[dict[str, Any]] = []
        """One mapping of figures for each epoch done."""

    def _sigmoids(self) -> list[Tensor]:
        found = {id(c.logits): c.logits for c in self.choices.values() if c.mixing == "sigmoid"}
        return [logits for logits in found.values() if logits is not None]

    # ---- a step

    def regulariser(self) -> Tensor | float:
        """Returns what the loss of the logits has besides: cost, and FairDARTS' zero-one loss."""
        cost = 0.0 if self.cost is None else self.cost()
        if not self.zero_one_weight:
            return cost
        sigma = torch.cat([logits.sigmoid() for logits in self._sigmoids()])
        return cost - self.zero_one_weight * (sigma - 0.5).square().mean()

    def step(self, train: Any, valid: Any) -> dict[str, Tensor]:
        """Moves the logits on the batch `valid` and then the weights on `train`.

        Returns:
            train_loss and valid_loss, [] on the device.
        """
        train, valid = self.moved(train), self.moved(valid)
        return {"valid_loss": self.logit_step(valid, train), "train_loss": self.weight_step(train)}

    def logit_step(self, valid: Any, train: Any) -> Tensor:
        """Moves the logits by their gradient of the loss on `valid`; returns that loss."""
        half = ArchHalf(
            self.network, self.loss, self.regulariser, self.weights, self.logits, valid, train,
            self.weight_optimizer, self.precision.logits,
        )  # fmt: skip
        gradient = unrolled if self.order == 2 else first_order
        passes = [gradient(half) for _ in range(self.samples)]
        means = [torch.stack(parts).mean(0) for parts in zip(*(found for found, _ in passes))]
        for alpha, mean in zip(self.logits, self.processes.means(means)):
            alpha.grad = mean
        (loss,) = self.processes.means([torch.stack([loss for _, loss in passes]).mean()])
        self.precision.logits.move(self.logits, loss, self.logit_optimizer.step)
        self.logit_optimizer.zero_grad(set_to_none=True)
        return loss

    def weight_step(self, train: Any) -> Tensor:
        """Moves the weights by their gradient of the loss on `train`; returns that loss."""
        # None and not 0, which momentum and weight decay would move.
        self.weight_optimizer.zero_grad(set_to_none=True)
        losses, half = [], self.precision.weights
        with frozen(self.logits):
            for _ in range(self.samples):
                with half.autocast():
                    loss = self.loss(self.network, train)
                half.backward(loss)
                losses.append(loss.detach())
        half.finish(self.weights, self.grad_clip)
        self.processes.join_statistics(self.network.buffers())
        (mean,) = self.processes.means([torch.stack(losses).mean()])
        half.move(self.weights, mean, self.weight_optimizer.step)
        return mean

    def moved(self, batch: Any) -> Any:
        """Returns a batch with its tensors on the network's device."""

        def move(value: Any) -> Any:
            is_tensor = isinstance(value, Tensor)
            return value.to(self.device, non_blocking=True) if is_tensor else value

        return tree_map(move, batch)

    # ---- the search

    def run(
        self, checkpoint: Path | str | None = None, resume: bool = False
    ) -> list[dict[str, Any]]:
        """Goes on to the last epoch, and returns `history`.

        Args:
            checkpoint: is written after each epoch, into a folder that is made if need be; a run
                that is killed goes on from there to the same bits, where the loaders draw from
                torch's generators, or have a `state_dict`.
            resume: whether to go on from it.

        Raises:
            DivergedError: a loss, a parameter or a statistic is not finite. The checkpoint before
                that epoch stays.
            CheckpointError: there is none to resume, or it is of another search.
            ProcessesError: the processes cannot go on together.
        """
        path = None if checkpoint is None else Path(checkpoint)
        if resume:
            if path is None:
                raise ValueError("resume is True, but there is no checkpoint to go on from")
            self.load(path)
        check_alike(self.processes, parts_of(self))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # not after an epoch that would be lost
        begun = self.epoch
        while self.epoch < self.epochs:
            if not self._run_epoch(first=self.epoch == begun):
                break
            if path is not None:
                self.save(path)
            if self._told("on_epoch", self.history[-1]):
                break
        return self.history

    def _told(self, what: str, figures: Mapping[str, Any]) -> bool:
        """Tells the callbacks; returns whether one, in any of the processes, ends the search."""
        ends = False
        for callback in self.callbacks:
            try:
                getattr(callback, what)(self, figures)
            except StopSearch:
                ends = True
                break
        return bool(self.processes.largest(ends))

    def _run_epoch(self, first: bool = False) -> bool:
        """Runs an epoch, the first one of a run or another; returns whether it came to its end."""
        self._start_epoch()
        started, steps = time.perf_counter(), 0
        sums: dict[str, Tensor] = {}
        valid = endless(self.valid, "valid")
        self.network.train()
        for batch in batches_together(self.processes, self.train, first=first):
            figures = self.step(batch, next(valid))
            # In float64 on the device: no step waits for it.
            for name, value in figures.items():
                if self.precision.holds({name: value}):
                    sums[name] = sums.get(name, 0) + value.double()
            steps += 1
            self._stop_for(self.precision.problem())
            if self._told("on_step", figures):
                return False
        if not steps:
            raise ValueError("train has no batches; at least one is needed")
        rate = self.weight_optimizer.param_groups[0]["lr"]
        counts = {name: steps - self.precision.lost(name) for name in figures}
        means = {name: float(sums[name]) / n if n else math.nan for name, n in counts.items()}
        self._check_finite(means)
        if self.scheduler is not None:
            self.scheduler.step()
        self.epoch += 1
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {"epoch": self.epoch, **means, "lr": float(rate)}
        row |= self.precision.figures() | ({} if self.cost is None else self.cost.figures())
        self.precision.end_epoch()
        check_alike(self.processes, parts_of(self))
        self.history.append({**row, "seconds": seconds, "derived": self.derive()})
        return True

    def _start_epoch(self) -> None:
        for batches in (self.train, self.valid):
            sampler = getattr(batches, "sampler", None)
            if isinstance(sampler, DistributedSampler):
                # It shuffles by the epoch alone, and would go through the same order each time.
                sampler.set_epoch(self.epoch)
        done = self.epoch / (self.epochs - 1) if self.epochs > 1 else 0.0
        for choice in self.choices.values():
            if self.tau is not None and choice.mixing in choice.sampled:
                choice.tau = self.tau[0] + (self.tau[1] - self.tau[0]) * done
            if self.noise_decay == "cosine" and isinstance(choice, Choice):
                choice.noise_amplitude = cosine_decay(self.epoch, self.epochs)

    def _check_finite(self, means: Mapping[str, float]) -> None:
        found = (f"{name} is {mean}" for name, mean in means.items() if not math.isfinite(mean))
        bad = next(found, None)
        if bad is None:
            name = first_not_finite(parts_of(self))
            bad = None if name is None else f"{name} is not finite"
        self._stop_for(bad)

    def _stop_for(self, bad: str | None) -> None:
        if bad is not None:
            raise DivergedError(
                f"the search diverged: {bad} in epoch {self.epoch + 1}; a smaller rate may help"
            )

    # ---- what it found

    def derive(self) -> dict[str, str | tuple[int, ...]]:
        """Returns by the name of each choice its best candidate's name, or the inputs it keeps."""
        found: dict[str, str | tuple[int, ...]] = {}
        for name, choice in self.choices.items():
            if isinstance(choice, Choice):
                found[name] = choice.best()[0]
            elif isinstance(choice, InputChoice):
                found[name] = choice.best()
        return found

    def derived_network(self, keep_weights: bool = True) -> nn.Module:
        """Returns a copy of the network with what was chosen in the places of its choices.

        Args:
            keep_weights: whether its parameters and statistics are those of the search; else each
                layer has begun anew.

        Raises:
            ValueError: a layer that holds parameters cannot begin anew.
        """
        return derived_network(self.network, keep_weights)

    # ---- checkpoints

    def save(self, path: Path) -> None:
        """Writes all that the rest of the search depends on, once for all processes."""
        write_state(self, path)

    def load(self, path: Path) -> None:
        """Goes to the state that a checkpoint holds.

        Raises:
            CheckpointError: it cannot be read, or is of another search.
        """
        restore_state(self, path)
