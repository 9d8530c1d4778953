"""Runs cells and mixed ops, as `recognise` read them, on the fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastnas.checks import check_type
from fastnas.nn.paths import CellWeights, Paths, add_siblings
from fastnas.nn.plan import Plan
from fastnas.nn.recognise import CellParts, MixedOpParts, Preprocess
from fastnas.ops import OPS, mixed_edges, relu_conv_bn
from fastnas.ops.device_choice import sampled_norms, stays_on_device
from fastnas.ops.dispatch import choose_backend
from fastnas.reference import SkipNoise
from fastnas.transfer import to_device


@dataclass(frozen=True)
class NoiseDraw:
    """What one forward pass draws with: the level on the device, and a Philox stream per node."""

    level: Tensor
    rng: Tensor

    def __post_init__(self) -> None:
        for name, dtype in (("level", torch.float64), ("rng", torch.int64)):
            t = getattr(self, name)
            check_type(name, t, Tensor)
            if t.dtype != dtype or t.shape[-1:] != (2,):
                raise ValueError(f"{name} is {t.dtype} {list(t.shape)}; {dtype} [..., 2] is needed")

    def packed(self) -> Tensor:
        """Level float64 [2] and streams int64 [n, 2] as int64 [2 + 2 n]: one copy moves both."""
        return torch.cat([self.level.view(torch.int64), self.rng.flatten()])

    @classmethod
    def unpacked(cls, packed: Tensor) -> NoiseDraw:
        """Views of what `packed` made."""
        return cls(packed[:2].view(torch.float64), packed[2:].view(-1, 2))

    def to(self, device: torch.device | None) -> NoiseDraw:
        """From the host, at once and without waiting for the device."""
        return NoiseDraw.unpacked(to_device(self.packed(), device))


def why_eager(x: Tensor) -> str | None:
    """Why no kernel may see x, whatever the module, or None."""
    if x.is_meta:
        return "a tensor on the meta device has no values"
    return "autocast is on" if torch.is_autocast_enabled(x.device.type) else None


def can_run(
    parts: CellParts | MixedOpParts, x: Tensor, training: bool, backend: str | None = None
) -> str | None:
    """Why the fused ops cannot serve a call on x, the second state of a cell, or None."""
    if x.dim() != 4:
        return f"x has shape {list(x.shape)}; [N, C, H, W] is needed"
    if x.dtype not in OPS["mixed_edges"].dtypes["eager"]:
        return f"mixed_edges has no {x.dtype}"
    reason = why_eager(x)
    if reason is not None:
        return reason
    if not training and torch.is_grad_enabled():
        return "there is no gradient outside of training"
    if any(weight.dtype != x.dtype for weight in weights_of(parts.plan.convs[:1])):
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
    w: CellWeights,
    *,
    training: bool,
    noise: SkipNoise | None = None,
    draw: NoiseDraw | None = None,
    memory: str = "lean",
    backend: str | None = None,
) -> Tensor:
    """sum_k w_k o_k(x) over the recognised candidates; w [K], or `Paths` of one edge."""
    rng = None if draw is None else draw.rng[..., None, :]
    level = None if draw is None else draw.level
    own = w.as_edge() if isinstance(w, Paths) else w[None]
    return _run(parts.plan, [x], own, training, noise, level, rng, memory, backend)


def run_cell(
    parts: CellParts,
    s0: Tensor,
    s1: Tensor,
    w: CellWeights,
    *,
    training: bool,
    noise: SkipNoise | None = None,
    draw: NoiseDraw | None = None,
    memory: str = "lean",
    backend: str | None = None,
) -> Tensor:
    """The concatenated nodes of a cell; w [E, K] or `Paths`, draw.rng [(paths,) nodes, 2]."""
    paths = (w.number or 1) if isinstance(w, Paths) else 1
    states = [
        _preprocess(pre, s, training, backend, paths)
        for pre, s in ((parts.preprocess0, s0), (parts.preprocess1, s1))
    ]
    rng = None if draw is None else draw.rng
    level = None if draw is None else draw.level
    if not (isinstance(w, Paths) and w.siblings):
        return _run(parts.plan, states, w, training, noise, level, rng, memory, backend)
    # The whole gradient of a node is seen from outside only where it is a call's own output.
    first = 0
    for node, plan in enumerate(parts.node_plans):
        edges = slice(first, first + len(plan.table.edges))
        own = None if rng is None else rng[..., node : node + 1, :]
        states.append(
            _run(plan, states, w.node(edges), training, noise, level, own, memory, backend)
        )
        first = edges.stop
    return torch.cat(states[2:], dim=1)


def _preprocess(
    pre: Preprocess, x: Tensor, training: bool, backend: str | None, paths: int
) -> Tensor:
    norm = pre.norm
    y = relu_conv_bn(
        x,
        weights_of(pre.convs),
        running=running_of([norm])[0],
        momentum=cast(float, norm.momentum),
        training=training,
        eps=norm.eps,
        paths=paths,
        backend=backend,
    )
    if training:
        count_batch([norm], paths)
    return y


def _run(
    plan: Plan,
    states: list[Tensor],
    w: CellWeights,
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
    choice, weight = (w.choice, w.weight) if isinstance(w, Paths) else (None, w)
    y = mixed_edges(
        states,
        weight,
        weights_of(plan.convs),
        plan.table,
        choice=choice,
        running=running_of(norms) if norms else None,
        momentum=cast(float, norms[0].momentum) if norms else 0.0,
        training=training,
        eps=norms[0].eps if norms else 1e-5,
        noise=noise,
        level=level,
        rng=rng,
        memory=memory,
        backend=backend,
    )
    if not isinstance(w, Paths):
        if training:
            count_batch(norms)
        return y
    if training:
        _count_sampled(plan, w)
    if not w.siblings:
        return y
    rows = list(zip(*(t.reshape(-1, t.shape[-1]) for t in (w.weight, w.choice))))
    groups = [add_siblings(g, *row) for g, row in zip(y.chunk(len(rows)), rows)]
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def _count_sampled(plan: Plan, w: Paths) -> None:
    """Of each path the norms that it runs."""
    if stays_on_device():
        counts = sampled_norms(plan.table, w.choice).view(-1, len(plan.norms)).sum(0)
        counters = [norm._buffers["num_batches_tracked"] for norm in plan.norms]
        kept = [(c, n) for c, n in zip(counters, counts.unbind()) if c is not None]
        if kept:
            torch._foreach_add_(*(list(some) for some in zip(*kept)))
        return
    for row, _ in w.rows():
        count_batch([plan.norms[i] for i in plan.table.path(row).norms])


def weights_of(convs: Sequence[nn.Conv2d]) -> list[Tensor]:
    """The weights of recognised convolutions, which have them as parameters."""
    return [cast(Tensor, conv._parameters["weight"]) for conv in convs]


def running_of(norms: Sequence[nn.BatchNorm2d]) -> list[tuple[Tensor, Tensor]]:
    """(mean, variance) of each of some recognised batch norms, which have both."""
    # Looked up in the dicts, four times as fast as attributes, of which a cell has 300.
    buffers = [norm._buffers for norm in norms]
    return [
        (cast(Tensor, own["running_mean"]), cast(Tensor, own["running_var"])) for own in buffers
    ]


def count_batch(norms: Sequence[nn.BatchNorm2d], times: int = 1) -> None:
    """So many more of num_batches_tracked."""
    counters = [norm._buffers["num_batches_tracked"] for norm in norms]
    kept = [c for c in counters if c is not None]
    if kept:
        torch._foreach_add_(kept, times)
