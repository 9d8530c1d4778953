"""Runs a candidate without its final batch norm: `mixed_norm_sum` applies that inside the sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas.layers.primitives import DilConv, ReLUConvBN, SepConv
from fastnas.nn.facts import behaviour, is_plain
from fastnas.nn.parts import Tensors, layers_of, why_not_norm
from fastnas.nn.run import count
from fastnas.ops import mixed_norm_sum

Norms = Mapping[int, nn.BatchNorm2d]
"""Index of a term to the batch norm that it still is to pass."""

# A module whose forward is one of these does nothing but run its layers in order.
_IN_ORDER = {kind.forward for kind in (nn.Sequential, DilConv, ReLUConvBN, SepConv)}
# These are torch's own, as long as nobody exchanges them.
_PASSED_OVER = behaviour(nn.Sequential), behaviour(nn.BatchNorm2d)


def passed_over(op: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the modules that `run_to_norm` and the sum do not call: others each run their own."""
    holder = () if type(op) is nn.Sequential else (cast(nn.Module, op.op),)
    return (op, *holder, layers_of(op)[-1])


def final_norm(op: nn.Module) -> nn.BatchNorm2d | None:
    """Returns the batch norm that an operation ends in, if it can be computed apart from the rest.

    Supposes that `op` runs its layers in order (`runs_in_order` knows, `accelerate` tries out).
    """
    layers = layers_of(op)
    norm = layers[-1] if layers else None
    if type(norm) is not nn.BatchNorm2d or why_not_norm(norm) is not None:
        return None
    skipped = passed_over(op)
    known = all(behaviour(type(part)) in _PASSED_OVER for part in skipped[1:])
    return norm if known and all(map(is_plain, skipped)) else None


def runs_in_order(op: nn.Module) -> bool:
    """Tells whether an operation's class is known to do nothing but run its layers in order."""
    return type(op).forward in _IN_ORDER


def run_to_norm(op: nn.Module, x: Tensor, pools: dict[Any, Tensor] | None = None) -> Tensor:
    """Returns what the final norm of `op` is given.

    Args:
        pools: outputs of pools and of a ReLU on the same x, by their settings: a pool alone before
            its norm, and the ReLU before a dense convolution, is looked up there, and what is
            computed is added.
    """
    layers = layers_of(op)[:-1]
    if len(layers) == 1:
        return run_shared(layers[0], x, pools)
    # Edges of NAS-Bench-201 leave one state by the same ReLU, which is then computed once.
    if type(op) is ReLUConvBN:
        x, layers = run_shared(layers[0], x, pools), layers[1:]
    for layer in layers:
        x = layer(x)
    return x


def run_shared(op: nn.Module, x: Tensor, pools: dict[Any, Tensor] | None = None) -> Tensor:
    """Returns op(x), looked up in `pools` where it is a plain pool or ReLU."""
    if pools is None or not _is_shareable(op, x):
        return op(x)
    settings = (str(getattr(op, name)) for name in cast(list[str], op.__constants__))
    # Another operation may have overwritten x in between.
    key = (type(op), x._version, *settings)
    if key not in pools:
        pools[key] = op(x)
    return pools[key]


def _is_shareable(layer: nn.Module, x: Tensor) -> bool:
    """Tells whether a layer has no state and leaves x alone, and x has a version."""
    # dynamo cannot read a version, and an inference tensor has none.
    if torch.compiler.is_compiling() or x.is_inference():
        return False
    if type(layer) is nn.ReLU:
        return is_plain(layer) and not layer.inplace
    return type(layer) in (nn.MaxPool2d, nn.AvgPool2d) and is_plain(layer)


def pass_norms(z: Sequence[Tensor], norms: Norms) -> list[Tensor]:
    """Returns the terms after the norms that they still are to pass."""
    return [norms[k](z_k) if k in norms else z_k for k, z_k in enumerate(z)]


def foldable(z: Sequence[Tensor], norms: Norms, training: bool) -> Norms:
    """Returns the norms that one `mixed_norm_sum` can do: of one mode, of the first's settings.

    None unless the terms are alike, [N, C, H, W] with more than one value per channel.
    """
    first = z[0]
    alike = {(z_k.shape, z_k.dtype, z_k.device) for z_k in z}
    # numel <= C: one value per channel, of which torch's own norm refuses to take statistics.
    if len(alike) > 1 or first.dim() != 4 or first.numel() <= first.shape[1]:
        return {}
    # One that is used twice moves twice, each time from where the last has left it.
    uses = Counter(
        id(norm.running_mean) for norm in norms.values() if norm.running_mean is not None
    )
    found = {
        k: norm
        for k, norm in norms.items()
        if norm.training == training and uses[id(norm.running_mean)] <= 1
    }
    like = next(((norm.eps, norm.momentum) for norm in found.values()), None)
    return {k: norm for k, norm in found.items() if (norm.eps, norm.momentum) == like}


def norm_sum(
    z: Sequence[Tensor], w: Tensor, norms: Norms, folded: Norms, training: bool, **options: Any
) -> Tensor:
    """y = sum_k w_k v_k, v_k the term after its norm; `options` are those of `mixed_norm_sum`.

    Args:
        norms: of them, those that are not `folded` run by their modules.
        folded: at least one; what `foldable` gave.
    """
    # Norms of another mode, eps or momentum than the first run before the sum.
    z = pass_norms(z, {k: norm for k, norm in norms.items() if k not in folded})
    first = next(iter(folded.values()))
    tensors = Tensors.of((), list(folded.values()))
    running = dict(zip(folded, tensors.running))
    if training:
        # The modules of these norms are not called, so nobody else counts their batches.
        count(tensors.counters)
    return mixed_norm_sum(
        z,
        w,
        normed=[k in folded for k in range(len(z))],
        eps=first.eps,
        running=[running.get(k) for k in range(len(z))],
        momentum=cast(float, first.momentum),
        training=training,
        **options,
    )
