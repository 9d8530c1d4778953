"""Searches on single paths in eager torch, as public GDAS code does: one sync for every edge.

Sampling and the edge: D-X-Y/AutoDL-Projects, xautodl/models/cell_searchs. The two edges of a node
are ROME's (ICCV 2023, eq. 4-8), for which there is no public code: that part is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastnas.checks import check_int, check_type, typed
from fastnas.reference.amp import Amp
from fastnas.reference.arguments import check_clip, check_paths, check_shape
from fastnas.reference.sample_edges import gumbel_softmax
from fastnas.reference.sample_paths import logits_per_node, node_pairs
from fastnas.reference.search_network import Cell, Dag, MixedOp, SearchNetwork


class HardWeights(NamedTuple):
    """Holds h [E, K], whose rows are one-hot up to rounding, and int64 choice [E]; -1: no edge."""

    h: Tensor
    choice: Tensor


@typed
def gdas_sample(alpha: Tensor, tau: float) -> HardWeights:
    """Samples one candidate on every edge: h = onehot(argmax P) - sg(P) + P."""
    if alpha.dim() != 2 or not tau > 0:
        raise ValueError(f"alpha has shape {list(alpha.shape)}, tau is {tau}; [E, K] and a"
                         " temperature above 0 are needed")  # fmt: skip
    hard, index, _ = gumbel_softmax(alpha, tau)
    return HardWeights(hard, index.squeeze(-1))


@typed
def rome_sample(
    alpha: Tensor, beta: Tensor, nodes: Sequence[int], tau: float, topology: str
) -> HardWeights:
    """Samples as `gdas_sample`, on two edges a node: "top2" of relaxed beta, or one of "pairs"."""
    check_paths(alpha, beta, nodes, logits_per_node(nodes, topology), tau)
    h, index = gdas_sample(alpha, tau)
    gates: list[Tensor] = []
    for row, n in zip(beta.split(logits_per_node(nodes, topology)), nodes):
        probs = gumbel_softmax(row, tau)[2]
        # straight is 1 in value, and has the gradient of the relaxed probabilities.
        straight = 1 + (probs - probs.detach())
        if topology == "pairs":
            pair = int(probs.argmax())
            kept = node_pairs(n)[:, pair].tolist()
            gate = dict.fromkeys(kept, straight[pair])
        else:
            kept = probs.topk(2).indices.tolist()
            gate = {e: straight[e] if n > 2 else torch.ones_like(straight[e]) for e in kept}
        # A gate of 0 takes an edge out of the path, its weight and its gradient.
        gates += [gate.get(e, torch.zeros_like(straight[0])) for e in range(n)]
    gated = torch.stack(gates)
    return HardWeights(h * gated[:, None], torch.where(gated > 0, index, -1))


class SinglePathDag(Dag):
    """x_j = sum_e h_e[k] o_k(x_e), k = choice_e; `siblings` adds sum_{o != k} h_e[o], a 0."""

    siblings = False

    def check_weights(self, name: str, w: object, x: Tensor) -> None:
        check_type(name, w, HardWeights)
        assert isinstance(w, HardWeights)
        super().check_weights(f"{name}.h", w.h, x)
        check_shape(f"{name}.choice", w.choice, [len(self._ops)])

    def run(self, inputs: Sequence[Tensor], w: HardWeights) -> Tensor:  # type: ignore[override]
        h, choice = w
        states = self.input_states(inputs)
        for node in range(self.nodes):
            clist = []
            for e, x in zip(self.edges_into(node), states):
                # The host waits for the device at every edge of every cell, which the fused paths
                # do not.
                k = int(choice[e].item())
                if k < 0:
                    continue
                op = self._ops[e]
                assert isinstance(op, MixedOp)
                y = h[e, k] * op._ops[k](x)
                if self.siblings:
                    # Each of them is 0 in value: only the gradient of h reaches candidates that
                    # were not sampled.
                    y = y + sum(h[e, o] for o in range(h.shape[1]) if o != k)
                clist.append(y)
            states.append(sum(clist[1:], clist[0]))
        return self.output(states)


class SinglePathCell(SinglePathDag, Cell):
    """Runs a cell of DARTS' layout on `HardWeights`."""


class SinglePathNetwork(SearchNetwork):
    """Runs the search network on `HardWeights` of all cell types."""

    cell: type[Dag] = SinglePathCell

    def set_siblings(self, siblings: bool) -> None:
        """Sets `siblings` of all cells."""
        for cell in self.dags():
            cell.siblings = siblings  # type: ignore[assignment]

    def forward(self, x: Tensor, weights: Mapping[str, HardWeights]) -> Tensor:  # type: ignore[override]
        return super().forward(x, weights)  # type: ignore[arg-type]


@typed
def single_path_step(
    network: SinglePathNetwork,
    sample: Callable[[], Mapping[str, HardWeights]],
    params_optimizer: torch.optim.Optimizer,
    arch_optimizer: torch.optim.Optimizer,
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    samples: int = 1,
    grad_clip: float = 5.0,
    amp: Amp | None = None,
) -> Tensor:
    """Makes a step of GDAS' loop: weights first, then logits, all gradients in both halves.

    With several samples (ROME eq. 11 and 12) their gradients are added for the weights and
    averaged for the logits. Returns the training loss of the last. `amp` as in `search_step`.
    """

    check_int("samples", samples, 1)
    check_clip(grad_clip)
    amp = Amp() if amp is None else amp

    def accumulate(batch: tuple[Tensor, Tensor], scale: float) -> Tensor:
        for _ in range(samples):
            with amp.autocast():
                loss = nn.functional.cross_entropy(network(batch[0], sample()), batch[1])
            amp.backward(scale * loss)
        return loss.detach()

    params_optimizer.zero_grad()
    loss = accumulate(train, 1.0)
    amp.step(params_optimizer, list(network.parameters()), grad_clip)

    arch_optimizer.zero_grad()
    accumulate(valid, 1.0 / samples)
    amp.step(arch_optimizer)
    return loss
