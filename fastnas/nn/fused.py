"""Runs cells and mixed ops, as `recognise` read them, on the fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastnas.nn.recognise import CellParts, MixedOpParts, Preprocess
from fastnas.ops import OPS, choose_backend, mixed_edges, relu_conv_bn
from fastnas.reference import Edge, EdgeTable, EdgeTerm, SkipNoise


@dataclass(frozen=True)
class NoiseDraw:
    """What one forward pass draws with: the level on the device, and a Philox stream per node."""

    level: Tensor
    rng: Tensor


@dataclass(frozen=True)
class Plan:
    """The table of the edges, and the layers of its terms in order."""

    table: EdgeTable
    convs: tuple[nn.Conv2d, ...]
    norms: tuple[nn.BatchNorm2d, ...]

    @staticmethod
    def of(edges: Sequence[MixedOpParts], sources: Sequence[int], nodes: int, inputs: int) -> Plan:
        """Edges node by node, the edge e from state sources[e]."""
        targets = [0] if nodes == 1 and len(edges) == 1 else _targets(nodes, inputs)
        rows: list[Edge] = []
        convs: list[nn.Conv2d] = []
        norms: list[nn.BatchNorm2d] = []
        for edge, source, target in zip(edges, sources, targets):
            terms = []
            for k, candidate in enumerate(edge.candidates):
                if candidate is None or candidate.name == "none":
                    continue
                terms.append(edge_term(candidate.name, k, edge.stride))
                convs += candidate.convs
                norms += candidate.norms
            rows.append(Edge(source, target, edge.stride, tuple(terms)))
        table = EdgeTable(inputs, nodes, len(edges[0].candidates), tuple(rows))
        return Plan(table, tuple(convs), tuple(norms))


def _targets(nodes: int, inputs: int) -> list[int]:
    return [node for node in range(nodes) for _ in range(inputs + node)]


@lru_cache(maxsize=256)
def edge_term(name: str, weight: int, stride: int) -> EdgeTerm:
    """The term of a primitive: "sep_conv_5x5" is a sep_conv of size 5."""
    op, _, size = name.rpartition("_")
    if name == "skip_connect":
        return EdgeTerm("skip" if stride == 1 else "reduce_skip", weight)
    if op.endswith("pool"):
        return EdgeTerm(op, weight)
    return EdgeTerm(op, weight, int(size[0]), 2 if op == "dil_conv" else 1)


def plan_of(parts: CellParts | MixedOpParts) -> Plan:
    """Made once: the layers do not change, what they hold is read at every call."""
    plan = vars(parts).get("plan")
    if plan is None:
        if isinstance(parts, MixedOpParts):
            plan = Plan.of([parts], [0], 1, 1)
        else:
            sources = [i for node in range(parts.nodes) for i in range(node + 2)]
            plan = Plan.of(parts.edges, sources, parts.nodes, 2)
        vars(parts)["plan"] = plan
    return plan


def can_run(
    parts: CellParts | MixedOpParts, x: Tensor, training: bool, backend: str | None = None
) -> str | None:
    """Why the fused ops cannot serve a call on x, the second state of a cell, or None."""
    if x.dim() != 4:
        return f"x has shape {list(x.shape)}; [N, C, H, W] is needed"
    if x.dtype not in OPS["mixed_edges"].dtypes["eager"]:
        return f"mixed_edges has no {x.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if not training and torch.is_grad_enabled():
        return "there is no gradient outside of training"
    if any(conv.weight.dtype != x.dtype for conv in plan_of(parts).convs[:1]):
        return f"x is {x.dtype}, the parameters are not"
    stride = parts.edges[0].stride if isinstance(parts, CellParts) else parts.stride
    values = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    if training and values <= 1:
        return f"{values} value(s) per channel"
    if torch.compiler.is_compiling():
        return None
    if backend != "eager" and choose_backend("mixed_edges", x, backend) == "eager":
        return f"mixed_edges computes eagerly on {x.device.type}"
    return None


def run_edge(
    parts: MixedOpParts,
    x: Tensor,
    w: Tensor,
    *,
    training: bool,
    noise: SkipNoise | None = None,
    draw: NoiseDraw | None = None,
    memory: str = "lean",
    backend: str | None = None,
) -> Tensor:
    """sum_k w_k o_k(x) over the recognised candidates; w [K]."""
    rng = None if draw is None else draw.rng.reshape(1, 2)
    level = None if draw is None else draw.level
    return _run(plan_of(parts), [x], w[None], training, noise, level, rng, memory, backend)


def run_cell(
    parts: CellParts,
    s0: Tensor,
    s1: Tensor,
    w: Tensor,
    *,
    training: bool,
    noise: SkipNoise | None = None,
    draw: NoiseDraw | None = None,
    memory: str = "lean",
    backend: str | None = None,
) -> Tensor:
    """The concatenated nodes of a cell; w [E, K], draw.rng [nodes, 2]."""
    states = [
        _preprocess(pre, s, training, backend)
        for pre, s in ((parts.preprocess0, s0), (parts.preprocess1, s1))
    ]
    rng = None if draw is None else draw.rng
    level = None if draw is None else draw.level
    return _run(plan_of(parts), states, w, training, noise, level, rng, memory, backend)


def _preprocess(pre: Preprocess, x: Tensor, training: bool, backend: str | None) -> Tensor:
    norm = pre.norm
    y = relu_conv_bn(
        x,
        [conv.weight for conv in pre.convs],
        running=_running(norm),
        momentum=norm.momentum or 0.0,
        training=training,
        eps=norm.eps,
        backend=backend,
    )
    if training:
        _count([norm])
    return y


def _run(
    plan: Plan,
    states: list[Tensor],
    w: Tensor,
    training: bool,
    noise: SkipNoise | None,
    level: Tensor | None,
    rng: Tensor | None,
    memory: str,
    backend: str | None,
) -> Tensor:
    norms = plan.norms
    if noise is None or not training or not plan.table.skips:
        noise = level = rng = None
    y = mixed_edges(
        states,
        w,
        [conv.weight for conv in plan.convs],
        plan.table,
        running=[_running(norm) for norm in norms] if norms else None,
        momentum=(norms[0].momentum or 0.0) if norms else 0.0,
        training=training,
        eps=norms[0].eps if norms else 1e-5,
        noise=noise,
        level=level,
        rng=rng,
        memory=memory,
        backend=backend,
    )
    if training:
        _count(norms)
    return y


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    buffers = norm._buffers  # four times as fast as attributes, of which a cell has 300
    mean, var = buffers["running_mean"], buffers["running_var"]
    assert mean is not None and var is not None
    return mean, var


def _count(norms: Sequence[nn.BatchNorm2d]) -> None:
    counters = [norm._buffers["num_batches_tracked"] for norm in norms]
    torch._foreach_add_([c for c in counters if c is not None], 1)
