"""Builds the DARTS search network in eager torch: mixed op, cell, network, and a step of search.

Semantics and state-dict names are those of the public code (quark0/darts model_search.py), so its
checkpoints load. Mixing weights are arguments; the logits live in `fastnas.nn.ArchParameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastnas.checks import check_choice, check_int, check_number, check_type, short, typed
from fastnas.layers.primitives import drop_path, preprocessing, search_candidate
from fastnas.reference.amp import Amp
from fastnas.reference.arguments import check_clip, check_images, check_mixing
from fastnas.reference.mixed_sum import weighted_sum
from fastnas.reference.skip_noise import SkipNoise, skip_noise
from fastnas.spaces import OPS, CellType, Space

Factory = Callable[[int, int], nn.Module]
"""(C, stride) to a module [N, C, H, W] -> [N, C, H / stride, W / stride]."""

Candidate = str | nn.Module
Weights = Mapping[str, Tensor]
"""Cell type ("normal", "reduce") to the mixing weights of its edges, [E, K]."""


class MixedOp(nn.Module):
    """obar(x) = sum_k w_k o_k(x), with noise on the output of the skip connections (DARTS eq. 2).

    Args:
        candidates: names of primitives (`fastnas.spaces.OPS`, or of `extra`), or modules, mixed at
            will; modules are used as they are.
        C: channels in and out.
        stride: 1 or 2.
        noise: drawn on the output of every "skip_connect" in training mode, never in eval mode.
        skip_drop_path: probability with which a sample's skip output is dropped in training,
            after the noise. 0 is the paper's formula; the NoisyDARTS code has a hidden 0.3.
        extra: factories of further candidates by name.
        skips: which candidates are skip connections; None: those named "skip_connect".
    """

    @typed
    def __init__(
        self,
        candidates: Sequence[Candidate],
        C: int,
        stride: int,
        *,
        noise: SkipNoise | None = None,
        skip_drop_path: float = 0.0,
        extra: Mapping[str, Factory] | None = None,
        skips: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_int("C", C, 1)
        check_int("stride", stride, 1, 2)
        if not candidates:
            raise ValueError("MixedOp: candidates is empty; at least one is needed")
        if not 0 <= skip_drop_path < 1:
            raise ValueError(f"skip_drop_path is {skip_drop_path}; 0 <= p < 1 is allowed")
        for i, candidate in enumerate(candidates):
            if isinstance(candidate, str):
                check_choice(f"candidates[{i}]", candidate, [*(extra or {}), *OPS])
        self._ops = nn.ModuleList(_build(c, C, stride, extra or {}) for c in candidates)
        self.channels, self.stride = C, stride
        self.names = tuple(
            c if isinstance(c, str) and c not in (extra or {}) else None for c in candidates
        )
        """Of the candidates that are primitives; None stands for others."""
        named = [k for k, c in enumerate(candidates) if c == "skip_connect"]
        self.skips = tuple(named if skips is None else skips)
        if any(not 0 <= k < len(candidates) for k in self.skips):
            raise ValueError(f"skips is {self.skips}; indices below {len(candidates)} are allowed")
        self.noise = noise
        self.noise_amplitude = 1.0
        self.skip_drop_path = skip_drop_path

    def noisy_skips(self) -> tuple[int, ...]:
        """Returns the candidates that noise is drawn on in training."""
        if self.noise is None or (self.stride > 1 and not self.noise.on_reductions):
            return ()
        return self.skips

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Maps x [N, C, H, W] and w [K] to [N, C, H / stride, W / stride]."""
        check_images("x", x)
        check_mixing("w", w, [len(self._ops)], x)
        outputs = [op(x) for op in self._ops]
        for k in self.skips if self.training else ():
            if self.noise is not None and k in self.noisy_skips():
                outputs[k] = skip_noise(outputs[k], self.noise, self.noise_amplitude)
            if self.skip_drop_path:
                outputs[k] = drop_path(outputs[k], self.skip_drop_path)
        return weighted_sum(outputs, w)


def _build(candidate: Candidate, C: int, stride: int, extra: Mapping[str, Factory]) -> nn.Module:
    if isinstance(candidate, nn.Module):
        return candidate
    return (
        extra[candidate](C, stride)
        if candidate in extra
        else search_candidate(candidate, C, stride)
    )


class Dag(nn.Module):
    """x_j = sum_{i<j} obar_ij(x_i) for every node j that is no input: the edges of a cell."""

    mixed_op: type[MixedOp] = MixedOp
    preprocessed: tuple[tuple[str, tuple[int, int, bool]], ...] = ()
    """Names modules that inputs pass first; channels in and out, and whether it halves the size."""
    outputs = 0
    """How many nodes, the last ones, the output shows; 0 stands for all."""

    def build_edges(self, space: Space, cell_type: CellType, C: int, **options: object) -> None:
        """Sets cell_type, inputs, nodes, ends and `_ops`, for a subclass in its order of modules.

        Args:
            space: candidates and edges.
            cell_type: "normal" or "reduce".
            C: channels of every node.
            options: keyword arguments of `MixedOp`.
        """
        self.cell_type = cell_type
        self.inputs = space.inputs
        self.nodes = space.nodes
        self.ends = space.edges
        self._ops = nn.ModuleList(
            self.mixed_op(names, C, space.stride(cell_type, edge), **options)  # type: ignore[arg-type]
            for edge, names in zip(space.edges, space.candidates(cell_type))
        )

    def edges_into(self, node: int) -> range:
        """Lists the edges into node 0 .. nodes - 1 after the inputs; one from each state."""
        # Node j after the inputs has inputs + j edges, so the nodes before it have their sum.
        first = sum(range(self.inputs, self.inputs + node))
        return range(first, first + self.inputs + node)

    def check_weights(self, name: str, w: object, x: Tensor) -> None:
        """Refuses weights that are not of as many edges and candidates as here."""
        candidates = len(cast(MixedOp, self._ops[0])._ops)
        check_mixing(name, w, [len(self._ops), candidates], x)

    def input_states(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Returns what the nodes read of the cell's inputs."""
        raise NotImplementedError

    def output(self, states: Sequence[Tensor]) -> Tensor:
        """Returns what the cell makes of its states, inputs first."""
        raise NotImplementedError

    def run(self, inputs: Sequence[Tensor], w: Tensor) -> Tensor:
        """Computes the cell's output on mixing weights w [E, K]."""
        states = self.input_states(inputs)
        for node in range(self.nodes):
            edges = self.edges_into(node)
            states.append(sum(self._ops[e](x, w[e]) for e, x in zip(edges, states)))
        return self.output(states)


class Cell(Dag):
    """x_j = sum_{i<j} obar_ij(x_i); the output concatenates the intermediate nodes (DARTS eq. 1).

    Args:
        space: candidates and edges.
        cell_type: "normal" or "reduce"; a reduction cell has stride 2 on edges leaving its inputs.
        C_before_last, C_last: channels of the outputs of the two cells before.
        C: channels of every node.
        reduced_before: whether the cell before was a reduction, which halves s1 but not s0.
        options: keyword arguments of `MixedOp`.
    """

    @typed
    def __init__(
        self,
        space: Space,
        cell_type: CellType,
        C_before_last: int,
        C_last: int,
        C: int,
        reduced_before: bool,
        **options: object,
    ) -> None:
        super().__init__()
        channels = {"C_before_last": C_before_last, "C_last": C_last, "C": C}
        for name, value in channels.items():
            check_int(name, value, 1)
        self.preprocessed = (
            ("preprocess0", (C_before_last, C, reduced_before)),
            ("preprocess1", (C_last, C, False)),
        )
        """What `preprocessing` built each from."""
        self.preprocess0, self.preprocess1 = (
            preprocessing(*sizes) for _, sizes in self.preprocessed
        )
        self.build_edges(space, cell_type, C, **options)

    def input_states(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        s0, s1 = inputs
        return [self.preprocess0(s0), self.preprocess1(s1)]

    def output(self, states: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(states[2:]), dim=1)

    def forward(self, s0: Tensor, s1: Tensor, w: Tensor) -> Tensor:
        """Maps s0, s1 [N, C', H', W'] of two cells before and w [E, K] to [N, nodes C, H, W]."""
        check_images("s0", s0)
        check_images("s1", s1)
        self.check_weights("w", w, s1)
        return self.run([s0, s1], w)


class SearchNetwork(nn.Module):
    """Runs stem, cells, average pooling and classifier; reduces at 1/3 and 2/3 of the depth.

    Args:
        space: a search space (`fastnas.spaces.get_space`).
        C: channels of the first cells, doubled by every reduction cell.
        num_classes: outputs.
        layers: cells, at least 1.
        in_channels: channels of the images.
        stem_multiplier: the stem has stem_multiplier C channels.
        noise, skip_drop_path, extra: see `MixedOp`.
    """

    layout: ClassVar[str] = "darts"
    """Of the spaces that it takes."""
    cell: type[Dag] = Cell

    @typed
    def __init__(
        self,
        space: Space,
        C: int,
        num_classes: int,
        layers: int,
        *,
        in_channels: int = 3,
        stem_multiplier: int = 3,
        noise: SkipNoise | None = None,
        skip_drop_path: float = 0.0,
        extra: Mapping[str, Factory] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"C": C, "num_classes": num_classes, "layers": layers}
        sizes |= {"in_channels": in_channels, "stem_multiplier": stem_multiplier}
        for name, value in sizes.items():
            check_int(f"SearchNetwork: {name}", value, 1)
        if space.layout != self.layout:
            raise ValueError(
                f"{type(self).__name__}: space {space.name} has layout {space.layout}; "
                f"{self.layout} is needed"
            )
        self.space = space
        channels = stem_multiplier * C
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        options = {"noise": noise, "skip_drop_path": skip_drop_path, "extra": extra}
        last = self._build_cells(channels, C, layers, options)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)

    def _build_cells(self, channels: int, C: int, layers: int, options: dict[str, Any]) -> int:
        """Sets `cells`, after a stem of so many channels; returns the channels of the last one."""
        before_last, last, current, reduced = channels, channels, C, False
        cells = []
        for layer in range(layers):
            # In a network of one cell or two, 0 is among them: the first cell is a reduction.
            reduction = layer in {layers // 3, 2 * layers // 3}
            current *= 2 if reduction else 1
            kind = "reduce" if reduction else "normal"
            cells.append(
                # After a reduction s0 is twice as large as s1, so the next cell halves s0.
                self.cell(self.space, kind, before_last, last, current, reduced, **options)
            )
            before_last, last, reduced = last, self.space.nodes * current, reduction
        self.cells = nn.ModuleList(cells)
        return last

    def features(self, x: Tensor, weights: Weights) -> Tensor:
        """Runs the stem's output through all cells."""
        # The first cell reads the stem twice, as both cells before it.
        s0 = s1 = x
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, weights[cast(Cell, cell).cell_type])
        return s1

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """Maps images [N, in_channels, H, W] and the weights of all cell types to logits."""
        self.check_inputs(x, weights)
        found = self.features(self.stem(x), weights)
        return self.classifier(self.global_pooling(found).flatten(1))

    def check_inputs(self, x: Tensor, weights: Mapping[str, Any]) -> None:
        """Refuses what `forward` does not take."""
        check_images("x", x, cast(nn.Conv2d, self.stem[0]).in_channels)
        check_type("weights", weights, Mapping)
        needed = {dag.cell_type: dag for dag in self.dags()}
        missing = sorted(set(needed) - set(weights))
        if missing:
            given = sorted(map(str, weights))
            raise ValueError(f"weights has {short(given)}; {', '.join(missing)} is missing")
        for cell_type, dag in needed.items():
            dag.check_weights(f"weights[{cell_type!r}]", weights[cell_type], x)

    def dags(self) -> Iterator[Dag]:
        """Yields the cells that are searched."""
        return (module for module in self.cells if isinstance(module, Dag))

    def mixed_ops(self) -> Iterator[MixedOp]:
        """Yields all mixed ops, cell by cell and edge by edge."""
        return (module for module in self.modules() if isinstance(module, MixedOp))

    def set_noise_amplitude(self, amplitude: float) -> None:
        """Sets r of the noise (`SkipNoise`) on every edge, 1 where it does not decay; 0 or more."""
        check_number("amplitude", amplitude)
        if amplitude < 0:
            raise ValueError(f"amplitude is {amplitude}; 0 or more is allowed")
        for op in self.mixed_ops():
            op.noise_amplitude = amplitude


@typed
def search_step(
    network: SearchNetwork,
    alphas: Mapping[str, Tensor],
    params_optimizer: torch.optim.Optimizer,
    alphas_optimizer: torch.optim.Optimizer,
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    grad_clip: float = 5.0,
    amp: Amp | None = None,
    beside: Callable[[Mapping[str, Tensor]], Weights] = dict,
) -> Tensor:
    """Makes one first-order DARTS step as the public code writes it; returns the training loss.

    Each half computes all gradients, those of the params in the architecture step and those of
    the logits in the weight step included: the baseline that the benchmarks compare with. `amp`
    runs it in bf16 or fp16.

    Args:
        beside: makes the network's weights of softmax(alpha), which another method adds to.
    """

    check_clip(grad_clip)
    amp = Amp() if amp is None else amp

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        weights = {cell: torch.softmax(alpha, dim=-1) for cell, alpha in alphas.items()}
        with amp.autocast():
            return nn.functional.cross_entropy(network(batch[0], beside(weights)), batch[1])

    alphas_optimizer.zero_grad()
    amp.backward(loss_of(valid))
    amp.step(alphas_optimizer)

    params_optimizer.zero_grad()
    loss = loss_of(train)
    amp.backward(loss)
    amp.step(params_optimizer, list(network.parameters()), grad_clip)
    return loss.detach()
