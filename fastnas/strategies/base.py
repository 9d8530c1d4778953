"""Defines what a gradient method answers the search loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastnas import reference
from fastnas.checks import check_int, check_type
from fastnas.nn import ArchParameters
from fastnas.nn.paths import Weights
from fastnas.options import Optioned
from fastnas.processes import Share
from fastnas.reference import SkipNoise
from fastnas.reference.amp import Amp
from fastnas.spaces import AnyGenotype, Space
from fastnas.strategies.accumulation import accumulate
from fastnas.strategies.cost import shares_of_weights
from fastnas.strategies.derivation import check_finite, derive_top_edges
from fastnas.strategies.hypergradient import first_order
from fastnas.strategies.margins import Undecided, operation_margins, within_noise
from fastnas.strategies.steps import ArchStep, Batch, WeightStep

Accuracy = Callable[[Weights], float]
"""Measures the supernet on weights, on the images of the logits by the statistics of each batch."""


class Stage(NamedTuple):
    """Describes a stage of a search.

    Attributes:
        layers: cells of its network; in NAS-Bench-201 per stage of that network.
        epochs: how long it takes.
        continues: it goes on with the network, the logits and their optimizer of the stage before
            it, whose space and layers are its own; the weights get an optimizer anew.
        constant_rate: its learning rate, as a share of the search's first one; None: the cosine.
    """

    layers: int
    epochs: int
    continues: bool = False
    constant_rate: float | None = None


class Strategy(Optioned):
    """Answers the search loop as DARTS does; methods override some of its hooks.

    The loop asks: which weights or sampled paths for a forward pass (`forward_weights`), what
    gradient for the logits (`arch_gradient`, with `regulariser` in its loss) and for the weights
    (`params_gradient`), which genotype (`derive`).

    A method is one file of `fastnas.strategies` with a subclass: its `name`, its `source`, and its
    options as fields (`fastnas.options.option`).
    """

    what = "method"
    table: ClassVar[dict[str, type[Strategy]]] = {}
    source: ClassVar[str]
    """Paper and arXiv number."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Where the method's published setting departs from the config's defaults."""
    layout_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By the name of a layout: where it departs from them there, options of the method included."""
    drops_none: ClassVar[bool] = False
    """Whether the method searches without `none` where no derived cell can have it."""
    drops_derived_none: ClassVar[bool] = False
    """Whether it does where a derived cell may have `none` on an edge."""
    # Logits begin as 1e-3 N(0, 1) and Adam has betas (0.5, 0.999), both as in the public DARTS
    # code.
    alpha_scale: ClassVar[float] = 1e-3
    alpha_betas: ClassVar[tuple[float, float]] = (0.5, 0.999)
    arch_grad_clip: ClassVar[float | None] = None
    """Largest norm of the gradient of all logits; None: it is not clipped."""
    topology: ClassVar[str] = "none"
    """Which logits the edges have (`ArchParameters`)."""
    chooses_edges: ClassVar[bool] = False
    """Whether it derives by a rule of its own which edges a node keeps."""
    tied: ClassVar[bool] = False
    """Whether the edges of a cell type share their logits of operations."""
    eager_networks: ClassVar[Mapping[str, type[reference.SearchNetwork]]] = (
        reference.SEARCH_NETWORKS
    )
    """What `eager_step` runs, by the layout of the space."""

    def space(self, space: Space) -> Space:
        """Returns the space that the method searches in `space`.

        Raises:
            ValueError: the method chooses which edges a node keeps, and the space keeps them all.
        """
        check_type("space", space, Space)
        layout = space.cell_layout
        if (self.topology != "none" or self.chooses_edges) and layout.edges_per_node is None:
            raise ValueError(
                f"method {self.name} chooses which edges a node keeps; a cell of space"
                f" {space.name} keeps them all"
            )
        # In DARTS a derived cell never has `none`: there it only takes weight from the others. In
        # NAS-Bench-201 it is an operation like any other, and removing it removes cells.
        drops = self.drops_derived_none if layout.derives_none else self.drops_none
        return space.without("none") if drops and "none" in space.operations else space

    def stages(self, layers: int, epochs: int) -> Sequence[Stage]:
        """Returns the stages of a search whose settings say so many layers and epochs: here one.

        Each begins with weights, logits and optimizers of its own, in a space of its own
        (`next_space`), unless it `continues` the one before. Its epochs count from 0 for the
        learning rate and for all that is asked of the method by epoch. `space` is asked first.
        """
        return [Stage(layers, epochs)]

    def start_stage(self, stage: int) -> None:
        """Sets what depends on the stage, counted from 0, before its network is built."""

    def next_space(self, space: Space, arch: ArchParameters) -> Space:
        """Returns the space of the stage after this one, by the logits that it has found.

        The answer may depend on the arguments and the stage alone: a run that resumes asks again.
        """
        return space

    def network_space(self, space: Space) -> Space:
        """Returns what the network has on its edges: here the candidates that are searched."""
        return space

    def skip_noise(self) -> SkipNoise | None:
        """Returns the noise on the skip connections of the search network."""
        return None

    def noise_amplitude(self, epoch: int, epochs: int) -> float:
        """Returns r of the noise in an epoch, counted from 0."""
        check_epoch(epoch, epochs, beyond=True)
        return 1.0

    def skip_drop_probability(self) -> float:
        """Returns the probability of drop-path on the skip connections."""
        return 0.0

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Sets what depends on the epoch, 0 to epochs - 1."""
        check_epoch(epoch, epochs)

    def decide(self, epoch: int, arch: ArchParameters, accuracy: Accuracy) -> None:
        """Decides before the steps of an epoch what depends on the network; here nothing.

        Asked again when a run resumes within the epoch, after `load_state_dict`.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of the method, plain data; here nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state, after `start_stage` of its stage."""

    def figures(self) -> dict[str, float]:
        """Returns values of this epoch to write to the history and to TensorBoard."""
        return {}

    def mixing_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        """Returns cell type to w [E, K], differentiable in the logits: softmax (DARTS eq. 2)."""
        check_type("arch", arch, ArchParameters)
        return {cell: torch.softmax(alpha, dim=-1) for cell, alpha in arch.alphas().items()}

    def draw(self) -> Tensor | None:
        """Draws on the host for a half of a step: int64 [n], or None where nothing is random."""
        return None

    def begin(self, drawn: Tensor | None) -> None:
        """Begins a half of a step with what `draw` drew, on the device of the logits."""

    def forward_weights(self, arch: ArchParameters) -> Weights:
        """Returns what one forward pass of a step runs on."""
        return self.mixing_weights(arch)

    def validation_weights(self, arch: ArchParameters) -> Weights:
        """Returns what the network is validated on."""
        return self.mixing_weights(arch)

    def regulariser(self, arch: ArchParameters) -> Tensor | float:
        """Returns what is added to the loss of the architecture step."""
        return 0.0

    def shares(self, arch: ArchParameters, space: Space) -> dict[str, Tensor]:
        """Returns cell type to the share [E, K] with which each candidate is derived, for E[cost].

        It is differentiable in the logits; here of `mixing_weights` (`shares_of_weights`).
        """
        weights = self.mixing_weights(arch)
        return {cell: shares_of_weights(weights[cell], space, cell) for cell in space.cell_types}

    def arch_gradient(self, step: ArchStep) -> tuple[list[Tensor], Tensor]:
        """Returns the gradient of the logits, in the order of step.alphas, and the loss."""
        return first_order(step)

    def params_gradient(self, step: WeightStep) -> tuple[Tensor, Tensor]:
        """Fills grad of the params, clipped; returns the training loss and the logits."""
        return accumulate(step)

    def share_samples(self, share: Share) -> None:
        """Runs a process' share of what each half of a step samples, all on its whole batch.

        Raises:
            ValueError: the method has no samples, or they cannot be shared evenly.
        """
        raise ValueError(f"method {self.name} has no samples that processes could share")

    def not_capturable(self) -> str | None:
        """Tells why a step of the method cannot be a CUDA graph, or None."""
        if self.skip_drop_probability():
            return "skip_drop_path draws noise on the host in the middle of a step"
        return None

    def eager_step(
        self,
        network: reference.SearchNetwork,
        arch: ArchParameters,
        optimizers: Sequence[torch.optim.Optimizer],
        train: Batch,
        valid: Batch,
        amp: Amp | None = None,
    ) -> None:
        """Makes a first-order step as public eager code does, to be compared with.

        Args:
            optimizers: of the weights and of the logits.
            amp: runs it in bf16 or fp16.
        """
        params, alphas = optimizers
        reference.search_step(network, arch.alphas(), params, alphas, train, valid, amp=amp)

    def derive(self, arch: ArchParameters, space: Space) -> AnyGenotype:
        """Derives the architecture that the logits stand for.

        Raises:
            ValueError: a logit is not finite.
        """
        # Comparisons with NaN are all false, so a diverged search would derive the first candidates
        # without a word.
        check_logits(arch, space)
        with torch.no_grad():
            return self.derive_cells(arch, space)

    def findings(self, arch: ArchParameters, space: Space) -> dict[str, Any]:
        """Returns what the report of a search has besides, by name: plain data; here nothing."""
        return {}

    def undecided(self, arch: ArchParameters, space: Space) -> dict[str, Undecided]:
        """Counts, by cell type, the choices that the initial noise may have made."""
        return within_noise(self.margins(arch, space), self.alpha_scale, "edges")

    def margins(self, arch: ArchParameters, space: Space) -> dict[str, list[float]]:
        """Returns, by cell type, the margin of each choice in units of the logits.

        Here the choices are the operations of the edges.
        """
        drops = not space.cell_layout.derives_none
        return {
            cell: operation_margins(alpha, space, cell, drops)
            for cell, alpha in arch.alphas().items()
        }

    def derive_cells(self, arch: ArchParameters, space: Space) -> AnyGenotype:
        """Derives from logits that are finite: each node's strongest edges and operations."""
        return derive_top_edges(self.mixing_weights(arch), space)


def check_epoch(epoch: int, epochs: int, beyond: bool = False) -> None:
    """Refuses an epoch that does not count from 0 to below `epochs`, or `beyond` it."""
    check_int("epochs", epochs, 1)
    check_int("epoch", epoch, 0, None if beyond else epochs - 1)


def check_logits(arch: ArchParameters, space: Space) -> None:
    """Refuses what are no finite logits of `space`, of its edges and candidates.

    Raises:
        TypeError: they are no ArchParameters and no Space.
        ValueError: they are those of another space, or one is not finite.
    """
    check_type("arch", arch, ArchParameters)
    check_type("space", space, Space)
    given = {cell: list(alpha.shape) for cell, alpha in arch.alphas().items()}
    needed = {c: [len(space.edges), space.num_candidates(c)] for c in space.cell_types}
    if given != needed:
        raise ValueError(f"arch has logits {given}; space {space.name} needs {needed}")
    for name, logits in arch.named_parameters():
        check_finite(f"the logits {name}", logits)
