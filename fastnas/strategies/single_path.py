"""Holds what single-path methods share: samples, temperature, accumulation; and a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastnas import reference
from fastnas.bounds import Bounds, whole
from fastnas.nn import ArchParameters, Paths
from fastnas.nn.paths import Weights
from fastnas.ops import PathSample, draw_rng, sample_paths
from fastnas.options import option
from fastnas.processes import WHOLE, Share
from fastnas.reference import HardWeights
from fastnas.reference.amp import Amp
from fastnas.spaces import CELL_TYPES
from fastnas.strategies.accumulation import accumulate
from fastnas.strategies.base import Strategy, check_epoch
from fastnas.strategies.derivation import kept_edges
from fastnas.strategies.hypergradient import first_order
from fastnas.strategies.steps import ArchStep, Batch, WeightStep
from fastnas.transfer import to_device

SCHEDULES = ("linear", "exponential", "constant")
ACCUMULATIONS = ("mean", "sum")
CLIPS = ("together", "each")
TAU_END = 0.1
SAMPLES = whole(1, 1024)
TEMPERATURES = Bounds(1e-6, 1e6)


class SinglePath(Strategy):
    """Runs one sampled candidate per edge in each forward pass, its weight 1 straight-through.

    One sample per forward pass, shared by all cells of a type (as GDAS' code). With several
    samples the gradients of a step are added up before its optimizer moves anything.

    The temperature goes from tau_start to tau_end over the epochs: "linear" (GDAS' code, 10 to
    0.1), "exponential" (tau_start (tau_end / tau_start)^(e / (E - 1))), or "constant". ROME
    averages the K gradients of the logits (eq. 11) and adds those of the weights (eq. 12). The
    papers do not say whether the gradient of the weights is clipped after accumulation
    ("together") or before it ("each").
    """

    siblings = False

    samples: int = option(1, "sub-networks in each half of a step, all on its batch", SAMPLES)
    tau_schedule: str = option("linear", "how the temperature falls", choices=SCHEDULES)
    tau_start: float = option(10.0, "temperature of the first epoch", TEMPERATURES)
    tau_end: float | None = option(None, "temperature of the last epoch (0.1)", TEMPERATURES)
    arch_accumulation: str = option("mean", "over samples, for the logits", choices=ACCUMULATIONS)
    params_accumulation: str = option("sum", "over samples, for the weights", choices=ACCUMULATIONS)
    clip_samples: str = option("together", "when gradients are clipped", choices=CLIPS)
    paths_at_once: bool = option(
        False, "all samples in one forward pass: the same gradients to rounding, more memory"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The default of tau_end is None and not 0.1, or an end that a user gives for nothing could
        # not be told from the default.
        if self.tau_schedule == "constant" and self.tau_end is not None:
            raise ValueError(f"tau_end is {self.tau_end}, but tau_schedule is constant")
        if self.clip_samples == "each" and self.paths_at_once and self.samples > 1:
            raise ValueError(
                "clip_samples is 'each', but paths_at_once gives one gradient for all samples"
            )
        self.tau = self.tau_start
        self.share = WHOLE
        """Which of the samples this process runs, where several share them (`share_samples`)."""
        self._drawn: Tensor | None = None
        self._turn = 0

    @property
    def passes(self) -> int:
        """Returns how many forward passes each half of a step has in this process."""
        return 1 if self.paths_at_once else self.samples // self.share.size

    def share_samples(self, share: Share) -> None:
        """Runs this process' share of the samples only: the mean over all is that of one process.

        Raises:
            ValueError: the samples cannot be shared evenly.
        """
        if self.samples % share.size:
            raise ValueError(
                f"samples is {self.samples}; a multiple of {share.size}, the number of processes"
                " that share them, is needed"
            )
        if self.clip_samples == "each" and share.size > 1:
            raise ValueError("clip_samples is 'each', but a process has not the whole of a sample")
        self.share = share

    def start_epoch(self, epoch: int, epochs: int) -> None:
        check_epoch(epoch, epochs)
        end = TAU_END if self.tau_end is None else self.tau_end
        # The last epoch has the end itself; a search of one epoch has the start.
        done = epoch / (epochs - 1) if epochs > 1 else 0.0
        if self.tau_schedule == "linear":
            self.tau = self.tau_start + (end - self.tau_start) * done
        elif self.tau_schedule == "exponential":
            self.tau = self.tau_start * (end / self.tau_start) ** done

    def figures(self) -> dict[str, float]:
        return {"tau": self.tau}

    def draw(self) -> Tensor:
        """Returns the bits of the temperature and a stream for each cell type, [1 + 2 types]."""
        # The bits of the temperature travel as an int64 beside the streams: one copy moves all, and
        # a CUDA graph reads the temperature of the epoch and not that of its capture.
        tau = torch.tensor([self.tau], dtype=torch.float64)
        return torch.cat([tau.view(torch.int64), draw_rng(len(CELL_TYPES)).flatten()])

    def begin(self, drawn: Tensor | None) -> None:
        self._drawn, self._turn = drawn, 0

    def forward_weights(self, arch: ArchParameters) -> Weights:
        """Returns the sample of each pass in turn, or all; differentiable in alpha and beta.

        The passes share a stream, in which each draws all samples and takes its own, so that
        `paths_at_once` changes none of them. Where no half was begun, one begins here.
        """
        if self._drawn is None:
            self.begin(to_device(self.draw(), arch.normal.device))
        assert self._drawn is not None
        tau, rng = self._drawn[:1].view(torch.float64)[0], self._drawn[1:].view(-1, 2)
        # All samples are drawn in each pass, also where it takes one: otherwise `paths_at_once`
        # would draw others from the stream.
        rank, size = self.share.rank, self.share.size
        turn = rank + self._turn * size
        mine = slice(rank, None, size) if self.paths_at_once else turn
        self._turn += 1
        if self._turn == self.passes:
            self._drawn = None
        return {
            cell: Paths(sample.op[mine], sample.weight[mine], self.siblings)
            for cell, sample in self._samples(arch, tau, rng).items()
        }

    def _samples(self, arch: ArchParameters, tau: Tensor, rng: Tensor) -> dict[str, PathSample]:
        alphas, betas = arch.alphas(), arch.betas()
        draw = partial(
            sample_paths, nodes=arch.nodes, tau=tau, topology=self.topology,
            paths=self.samples,
        )  # fmt: skip
        if len({alpha.shape for alpha in alphas.values()}) > 1:  # their own number of candidates
            return {
                cell: draw(alpha, betas.get(cell), rng=stream)
                for (cell, alpha), stream in zip(alphas.items(), rng)
            }
        beta = torch.stack(list(betas.values())) if betas else None
        # One call draws for all cell types, from the first stream alone; the others stay unused.
        op, weight = draw(torch.stack(list(alphas.values())), beta, rng=rng[0])
        return {cell: PathSample(op[:, i], weight[:, i]) for i, cell in enumerate(alphas)}

    def validation_weights(self, arch: ArchParameters) -> Weights:
        """Returns the most probable path."""
        dtype = arch.normal.dtype
        return {
            cell: Paths(choice, torch.ones_like(choice, dtype=dtype))
            for cell, choice in self.likeliest(arch).items()
        }

    def likeliest(self, arch: ArchParameters) -> dict[str, Tensor]:
        """Returns cell type to argmax p(z), int64 [E]: each edge's best candidate; -1: no edge."""
        best = {cell: alpha.detach().argmax(-1) for cell, alpha in arch.alphas().items()}
        for cell, beta in arch.betas().items():
            # The loop over nodes reads single numbers, which on the device would each be waited
            # for.
            kept = kept_edges(beta.detach().cpu(), arch.nodes, self.topology).to(beta.device)
            # -1 stands for an edge that the cell does not keep.
            best[cell] = torch.where(kept, best[cell], -1)
        return best

    def _scale(self, accumulation: str) -> float:
        """Returns the weight of a pass's loss, which is a mean over its paths."""
        # One pass with K paths has their mean for its loss, so a sum multiplies by K; of K passes
        # each has the loss of one path, so a mean divides by K.
        return (1.0 if accumulation == "mean" else float(self.samples)) / self.passes

    def arch_gradient(self, step: ArchStep) -> tuple[list[Tensor], Tensor]:
        # This is equation 11 of ROME: the mean over the samples, all of them on one batch.
        found = [first_order(step) for _ in range(self.passes)]
        gradients, losses = zip(*found)
        scale = self._scale(self.arch_accumulation)
        return [scale * sum(parts) for parts in zip(*gradients)], torch.stack(losses).mean()

    def params_gradient(self, step: WeightStep) -> tuple[Tensor, Tensor]:
        # This is equation 12 of ROME: the sum over the samples.
        scale = self._scale(self.params_accumulation)
        return accumulate(step, self.passes, scale, self.clip_samples == "each")

    eager_networks = reference.SINGLE_PATH_NETWORKS

    def eager_step(
        self,
        network: reference.SearchNetwork,
        arch: ArchParameters,
        optimizers: Sequence[torch.optim.Optimizer],
        train: Batch,
        valid: Batch,
        amp: Amp | None = None,
    ) -> None:
        """Makes the step on eager single paths in turn (`reference.single_path_step`)."""
        assert isinstance(network, reference.SinglePathNetwork)
        network.set_siblings(self.siblings)

        def sample() -> dict[str, HardWeights]:
            betas = arch.betas()
            return {
                cell: reference.gdas_sample(alpha, self.tau)
                if self.topology == "none"
                else reference.rome_sample(alpha, betas[cell], arch.nodes, self.tau, self.topology)
                for cell, alpha in arch.alphas().items()
            }

        params, alphas = optimizers
        reference.single_path_step(
            network, sample, params, alphas, train, valid, self.samples, amp=amp
        )


class SinglePathDARTS(SinglePath):
    """Searches by sampling alone: the baseline that collapses, for ROME to be compared with.

    Samples operations as GDAS does, on all edges, and derives as DARTS does, both from alpha: the
    coupling of operations and topology that ROME takes apart (its table 6, "no TD"). Without
    `none`, as ROME.
    """

    name = "single-path-darts"
    source = "ablation of ROME, Wang et al., ICCV 2023, arXiv 2011.11233"
    drops_none = True
    defaults = {"lr": 0.05}
