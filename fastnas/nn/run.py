"""Runs cells and mixed ops on the fused ops, by the parts that were read of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastnas.checks import check_type
from fastnas.nn.parts import CellParts, EdgeLayers, MixedOpParts, Preprocess, Tensors
from fastnas.nn.paths import CellWeights, Paths, add_siblings
from fastnas.ops import OPS, mixed_edges, relu_conv_bn
from fastnas.ops.autocast import autocast_dtype
from fastnas.ops.device_choice import sampled_norms, stays_on_device
from fastnas.ops.dispatch import choose_backend
from fastnas.reference import SkipNoise
from fastnas.transfer import to_device


@dataclass(frozen=True)
class NoiseDraw:
    """Holds what a forward pass draws with: the level on the device, a Philox stream per node."""

    level: Tensor
    rng: Tensor

    def __post_init__(self) -> None:
        for name, dtype in (("level", torch.float64), ("rng", torch.int64)):
            t = getattr(self, name)
            check_type(name, t, Tensor)
            if t.dtype != dtype or t.shape[-1:] != (2,):
                raise ValueError(f"{name} is {t.dtype} {list(t.shape)}; {dtype} [..., 2] is needed")

    def packed(self) -> Tensor:
        """Packs level float64 [2], streams int64 [n, 2] to int64 [2 + 2 n]: one copy moves both."""
        return torch.cat([self.level.view(torch.int64), self.rng.flatten()])

    @classmethod
    def unpacked(cls, packed: Tensor) -> NoiseDraw:
        """Returns views of what `packed` made."""
        return cls(packed[:2].view(torch.float64), packed[2:].view(-1, 2))

    def to(self, device: torch.device | None) -> NoiseDraw:
        """Copies from the host, at once and without waiting for the device."""
        return NoiseDraw.unpacked(to_device(self.packed(), device))


def why_eager(x: Tensor) -> str | None:
    """Says why no kernel may see x, whatever the module, or None."""
    return "a tensor on the meta device has no values" if x.is_meta else None


def can_run(
    parts: CellParts | MixedOpParts, x: Tensor, training: bool, backend: str | None = None
) -> str | None:
    """Says why the fused ops cannot serve a call on x, the second state of a cell, or None."""
    # Edge 0 leaves an input, at the stride of the cell.
    stride = parts.edges[0].stride if isinstance(parts, CellParts) else parts.stride
    # Tensors are looked up in each call: `functional_call` and `.half()` exchange them behind the
    # parts.
    params = parts.layers.tensors().params
    training = training and parts.layers.training
    return why_not_state("mixed_edges", x, params, stride, training, backend)


def why_not_state(
    op: str,
    x: Tensor,
    params: Sequence[Tensor | None],
    stride: int,
    training: bool,
    backend: str | None,
) -> str | None:
    """Says why a fused op cannot serve a call on the state x, at this stride of its nodes."""
    if x.dim() != 4:
        return f"x has shape {list(x.shape)}; [N, C, H, W] is needed"
    if x.dtype not in OPS[op].dtypes["eager"]:
        return f"{op} has no {x.dtype}"
    reason = why_eager(x)
    if reason is not None:
        return reason
    dtype = autocast_dtype(x) if params else x.dtype
    if params and params[0] is not None and autocast_dtype(params[0]) != dtype:
        return f"x is {x.dtype}, the parameters are not"
    values = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    if training and values <= 1:
        return f"{values} value(s) per channel"
    # The backend is chosen when the compiled code runs; tracing cannot follow the choice.
    if torch.compiler.is_compiling():
        return None
    if backend == "eager" or choose_backend(op, x, backend, dtype=dtype) != "eager":
        return None
    return f"{op} computes {dtype} eagerly on {x.device.type}"


class How(NamedTuple):
    """Says how a call is run, whatever its parts are."""

    training: bool
    noise: SkipNoise | None = None
    memory: str = "lean"
    backend: str | None = None


def run_edge(
    parts: MixedOpParts, x: Tensor, w: CellWeights, how: How, draw: NoiseDraw | None = None
) -> Tensor:
    """y = sum_k w_k o_k(x) over the recognised candidates; w [K], or `Paths` of one edge."""
    if draw is not None:
        # rng goes from [2] to [1, 2], from [paths, 2] to [paths, 1, 2]: the edge is a table of one
        # node.
        draw = NoiseDraw(draw.level, draw.rng[..., None, :])
    own = w.as_edge() if isinstance(w, Paths) else w[None]
    y = run_layers(parts.layers, [x], own, how, draw)
    # Under autocast a term that is no convolution keeps the dtype of x, and so the sum is no
    # narrower.
    plain = any(c is not None and not c.convs for c in parts.candidates)
    return y.to(torch.promote_types(y.dtype, x.dtype)) if plain else y


def run_cell(
    parts: CellParts,
    s0: Tensor,
    s1: Tensor,
    w: CellWeights,
    how: How,
    draw: NoiseDraw | None = None,
) -> Tensor:
    """Computes the concatenated nodes of a cell all of whose candidates are recognised.

    Args:
        w: [E, K], or `Paths`.
        draw: its streams are [(paths,) nodes, 2].
    """
    paths = (w.number or 1) if isinstance(w, Paths) else 1
    return run_states(parts, preprocessed(parts, [s0, s1], how, paths), w, how, draw)


def run_states(
    parts: CellParts,
    states: list[Tensor],
    w: CellWeights,
    how: How,
    draw: NoiseDraw | None = None,
) -> Tensor:
    """Does what `run_cell` does, from the preprocessed inputs."""
    if not (isinstance(w, Paths) and w.siblings):
        return run_layers(parts.layers, states, w, how, draw)
    # GDAS' `siblings` gradient needs dL/d(node) in full. One fused call hides it (nodes feed each
    # other inside), so here every node gets a call of its own.
    first = 0
    for node, layers in enumerate(parts.node_layers):
        edges = slice(first, first + len(layers.table.edges))
        # `node_layers` number the states as the cell does, so each call takes all of them so far.
        states.append(run_layers(layers, states, w.node(edges), how, node_draw(draw, node)))
        first = edges.stop
    return torch.cat(states[-parts.layers.table.outputs :], dim=1)


def node_draw(draw: NoiseDraw | None, node: int) -> NoiseDraw | None:
    """Returns the stream of one node, [(paths,) 1, 2]."""
    return None if draw is None else NoiseDraw(draw.level, draw.rng[..., node : node + 1, :])


def preprocessed(
    parts: CellParts, inputs: Sequence[Tensor], how: How, paths: int = 1
) -> list[Tensor]:
    """Computes the inputs of a cell as its nodes read them."""
    if not parts.preprocesses:
        return list(inputs)
    return [preprocessed_state(pre, s, how, paths) for pre, s in zip(parts.preprocesses, inputs)]


def preprocessed_state(pre: Preprocess, x: Tensor, how: How, paths: int = 1) -> Tensor:
    """Computes one input of a cell as its nodes read it."""
    tensors, training = pre.tensors(), how.training and pre.training
    y = relu_conv_bn(
        x,
        tensors.params,
        running=tensors.running[0],
        momentum=pre.momentum,
        training=training,
        eps=pre.eps,
        paths=paths,
        backend=how.backend,
    )
    if training:
        count(tensors.counters, paths)
    return y


def run_layers(
    layers: EdgeLayers,
    states: list[Tensor],
    w: CellWeights,
    how: How,
    draw: NoiseDraw | None = None,
) -> Tensor:
    """Computes the nodes of a table in one call of `mixed_edges`; w and draw as in `run_cell`."""
    training = how.training and layers.training
    # Without a skip nothing is drawn, and a draw that was given is left alone.
    noise = how.noise if training and layers.table.skips else None
    tensors = layers.tensors()
    choice, weight = (w.choice, w.weight) if isinstance(w, Paths) else (None, w)
    y = mixed_edges(
        states,
        weight,
        tensors.params,
        layers.table,
        choice=choice,
        running=tensors.running if layers.norms else None,
        momentum=layers.momentum,
        training=training,
        eps=layers.eps,
        noise=noise,
        level=None if draw is None or noise is None else draw.level,
        rng=None if draw is None or noise is None else draw.rng,
        memory=how.memory,
        backend=how.backend,
    )
    if not isinstance(w, Paths):
        if training:
            count(tensors.counters)
        return y
    if training:
        _count_sampled(layers, w)
    if not w.siblings:
        return y
    # There is one node here: y is [paths N, C, H, W], and each path adds its own siblings.
    rows = list(zip(*(t.reshape(-1, t.shape[-1]) for t in (w.weight, w.choice))))
    groups = [add_siblings(g, *row) for g, row in zip(y.chunk(len(rows)), rows)]
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def _count_sampled(layers: EdgeLayers, w: Paths) -> None:
    """Counts the batches of those norms that each path runs."""
    if stays_on_device():
        # counts int64 [norms] tells in how many paths a norm ran, which the device alone knows.
        counts = sampled_norms(layers.table, w.choice).view(-1, len(layers.norms)).sum(0)
        counters = [norm._buffers["num_batches_tracked"] for norm in layers.norms]
        kept = [(c, n) for c, n in zip(counters, counts.unbind()) if c is not None]
        if kept:
            torch._foreach_add_(*(list(some) for some in zip(*kept)))
        return
    for row, _ in w.rows():
        count(Tensors.of((), [layers.norms[i] for i in layers.table.path(row).norms]).counters)


def count(counters: list[Tensor], times: int = 1) -> None:
    """Adds so many batches to each `num_batches_tracked`."""
    if counters:
        # On a GPU this is one kernel for all norms, in place of one for each.
        torch._foreach_add_(counters, times)
