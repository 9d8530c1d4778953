"""Reads a foreign search network's modules by structure: candidates, and what prepares inputs.

The classes of the network do not matter, only the layers they are made of, as quark0/darts
``cnn/operations.py`` and ``model_search.py`` lay them out. Each reader returns what it found, or
the reason why the module is something else. What a module's own ``forward`` makes of its layers
cannot be read here; `accelerate` runs it and compares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

from torch import Tensor, nn

from fastnas.dropin.replacements import has_foreign_forward
from fastnas.nn.facts import hooks
from fastnas.nn.parts import (
    Candidate,
    Preprocess,
    layers_of,
    why_not_norm,
)
from fastnas.spaces.operations import EDGE_KINDS, EdgeKind, Operation, operations_of

Read = TypeVar("Read")

_HALF: tuple[type[nn.Module], ...] = (nn.ReLU, nn.Conv2d, nn.Conv2d, nn.BatchNorm2d)
_HALVES = {_HALF * kind.halves: kind for kind in EDGE_KINDS.values() if kind.halves}
"""The layers of a convolution to its kind."""
_REDUCE = (nn.ReLU, nn.Conv2d, nn.Conv2d, nn.BatchNorm2d)
_RELU_CONV_BN = (nn.ReLU, nn.Conv2d, nn.BatchNorm2d)
_POOLS: dict[type, str] = {nn.MaxPool2d: "max_pool_3x3", nn.AvgPool2d: "avg_pool_3x3"}


class Foreign(Exception):
    """Tells that the module is not what it was read as; the message says why."""


def need(condition: bool, reason: str) -> None:
    """Raises `Foreign` unless the condition holds."""
    if not condition:
        raise Foreign(reason)


def or_reason(read: Callable[[nn.Module], Read]) -> Callable[[nn.Module], Read | str]:
    @functools.wraps(read)
    def read_or_reason(module: nn.Module) -> Read | str:
        try:
            return read(module)
        except Foreign as foreign:
            return str(foreign)

    return read_or_reason


def _need_plain(module: nn.Module) -> None:
    for name, part in module.named_modules():
        who = type(part).__name__ + (f" ({name})" if name else "")
        # A hook would not be called, because the fused op calls no module.
        need(not any(hooks(part)), f"{who} has hooks")
        need(not has_foreign_forward(part), f"{who} has a forward of its own instance")


def _is_bare(module: nn.Module) -> bool:
    return not (module._modules or module._parameters or module._buffers)


def _leaves(module: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the layers in order of registration, however deep; none beside tensors of its own.

    A wrapper may name its layer's tensors a second time, as those of low-rank adapters do.
    """
    if not module._modules:
        return (module,)
    held = {id(t) for child in module.children() for t in (*child.parameters(), *child.buffers())}
    own = [*module._parameters.values(), *module._buffers.values()]
    if any(id(t) not in held for t in own if t is not None):
        return ()
    children = [_leaves(child) for child in module._modules.values() if child is not None]
    return tuple(leaf for leaves in children for leaf in leaves) if all(children) else ()


def _kinds(layers: Iterable[nn.Module]) -> tuple[type[nn.Module], ...]:
    return tuple(type(layer) for layer in layers)


def _need_fields(layer: nn.Module, what: str, **needed: object) -> None:
    for attribute, value in needed.items():
        given = getattr(layer, attribute)
        need(given == value, f"{what} has {attribute} {given}; {value} is needed")


def _need_conv(
    conv: nn.Conv2d,
    what: str,
    C_in: int,
    C_out: int,
    kernel: int = 1,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> None:
    _need_fields(
        conv,
        what,
        in_channels=C_in,
        out_channels=C_out,
        kernel_size=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(dilation, dilation),
        groups=groups,
        padding_mode="zeros",
    )
    weight = conv._parameters.get("weight")
    need(isinstance(weight, Tensor), f"{what} has no parameter `weight`")


def _need_no_bias(convs: Iterable[nn.Conv2d]) -> None:
    """Refuses what the kernels do not add; a sum that waits does it beside them."""
    for conv in convs:
        what = "depthwise" if conv.groups > 1 else "pointwise"
        need(conv.bias is None, f"{what} convolution has a bias")


def _need_norm(norm: nn.BatchNorm2d, channels: int) -> None:
    _need_fields(norm, "batch norm", num_features=channels, affine=False)
    reason = why_not_norm(norm, tracked=False)
    need(reason is None, str(reason))


def _need_whole(convs: Iterable[nn.Conv2d], norms: Iterable[nn.BatchNorm2d]) -> None:
    """Refuses what only sums that wait compute: biases, and batch norms without statistics."""
    _need_no_bias(convs)
    for reason in map(why_not_norm, norms):
        need(reason is None, str(reason))


def _need_relu(relu: nn.ReLU) -> None:
    # In place, the ReLU of one candidate changes what those after it read.
    need(not relu.inplace, "its first ReLU overwrites the input that other operations read")


def need_alike(norms: Iterable[nn.BatchNorm2d]) -> None:
    norms = list(norms)
    for attribute in ("num_features", "eps", "momentum", "track_running_stats"):
        # One call of `mixed_edges` has one eps, one momentum and one number of channels.
        values = sorted({getattr(norm, attribute) for norm in norms})
        given = ", ".join(str(value) for value in values)
        need(len(values) <= 1, f"batch norms differ in {attribute}: {given}")
    # A shared norm would be moved once in place of twice.
    need(len(set(norms)) == len(norms), "a batch norm is used more than once")


def _stride(layer: nn.Module) -> int:
    stride = layer.stride
    stride = stride[0] if isinstance(stride, tuple) else stride
    need(stride in (1, 2), f"stride is {stride}; 1 or 2 is needed")
    return cast(int, stride)


def _need_half(layers: tuple[nn.Module, ...], op: Operation, stride: int) -> None:
    """Refuses what is not ReLU, depthwise, pointwise, batch norm of this operation."""
    depthwise, pointwise = cast(tuple[nn.Conv2d, nn.Conv2d], layers[1:3])
    # k // 2 on each side, times the dilation, keeps the size at stride 1.
    C, padding = depthwise.in_channels, op.dilation * (op.size // 2)
    _need_conv(
        depthwise, "depthwise convolution", C, C, op.size, stride, padding, op.dilation, groups=C
    )
    _need_conv(pointwise, "pointwise convolution", C, C)
    _need_norm(cast(nn.BatchNorm2d, layers[3]), C)


def _conv_candidate(kind: EdgeKind, layers: tuple[nn.Module, ...]) -> Candidate:
    convs = tuple(layer for layer in layers if isinstance(layer, nn.Conv2d))
    size, stride = convs[0].kernel_size[0], _stride(convs[0])
    rows = operations_of(kind.name)
    sizes = tuple(sorted({op.size for op in rows}))
    need(size in sizes, f"{kind.name} has kernel {size}; one of {sizes} is needed")
    # This is the kernel of that size with its dilation, or else, to say what is wrong, one of that
    # size.
    op = min(
        (op for op in rows if op.size == size), key=lambda op: op.dilation != convs[0].dilation[0]
    )
    _need_relu(cast(nn.ReLU, layers[0]))
    for half in range(kind.halves):
        # The second half of a sep_conv has stride 1: the first has halved the image.
        _need_half(layers[4 * half : 4 * half + 4], op, 1 if half else stride)
    norms = tuple(layer for layer in layers if isinstance(layer, nn.BatchNorm2d))
    need_alike(norms)
    return Candidate(op.name, stride, convs, norms)


def _pool_candidate(pool: nn.Module, norm: nn.BatchNorm2d) -> Candidate:
    name, stride = _pool(pool)
    _need_norm(norm, norm.num_features)
    return Candidate(name, stride, (), (norm,))


def _pool(pool: nn.Module) -> tuple[str, int]:
    """Returns name and stride of a pool as DARTS has it."""

    def size(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value, value) if isinstance(value, int) else tuple(value)

    name, stride = _POOLS[type(pool)], _stride(pool)
    for attribute, needed in (("kernel_size", 3), ("stride", stride), ("padding", 1)):
        given = size(cast(int, getattr(pool, attribute)))
        need(given == size(needed), f"{name} has {attribute} {given}; {size(needed)} is needed")
    needs: dict[str, object]
    if isinstance(pool, nn.MaxPool2d):
        needs = {"dilation": 1, "return_indices": False, "ceil_mode": False}
    else:
        # Averages that count the padding, or divide by another number, are another operation.
        needs = {"count_include_pad": False, "divisor_override": None, "ceil_mode": False}
    _need_fields(pool, name, **needs)
    return name, stride


def _factorized_reduce(module: nn.Module) -> tuple[tuple[nn.Conv2d, ...], nn.BatchNorm2d] | None:
    """Reads y = BN(concat[conv_1(u), conv_2(shifted u)]), u = relu(x): convolutions, batch norm."""
    parts = module._modules
    if set(parts) != {"relu", "conv_1", "conv_2", "bn"}:
        return None
    layers = [cast(nn.Module, parts[name]) for name in ("relu", "conv_1", "conv_2", "bn")]
    need(
        _kinds(layers) == _REDUCE,
        f"{type(module).__name__} has relu, conv_1, conv_2, bn of other types than DARTS",
    )
    return _reduction(layers)


def _reduction(layers: Sequence[nn.Module]) -> tuple[tuple[nn.Conv2d, ...], nn.BatchNorm2d]:
    relu, conv_1, conv_2, norm = cast(tuple[nn.ReLU, nn.Conv2d, nn.Conv2d, nn.BatchNorm2d], layers)
    _need_relu(relu)
    need(norm.num_features % 2 == 0, f"{norm.num_features} channels; an even number is needed")
    for conv in (conv_1, conv_2):
        _need_conv(conv, "convolution", conv_1.in_channels, norm.num_features // 2, stride=2)
    _need_norm(norm, norm.num_features)
    return (conv_1, conv_2), norm


def _reduce_candidate(found: tuple[tuple[nn.Conv2d, ...], nn.BatchNorm2d]) -> Candidate:
    convs, norm = found
    _need_fields(convs[0], "convolution", in_channels=norm.num_features)
    return Candidate("skip_connect", 2, convs, (norm,))


def _is_shift(leaf: nn.Module) -> bool:
    padded = type(leaf) is nn.ConstantPad2d
    return padded and (leaf.padding, leaf.value) == ((0, 1, 0, 1), 0)


@or_reason
def candidate(module: nn.Module) -> Candidate | str:
    """Reads a candidate of the DARTS search network, or says why the module is not one.

    Identity and Zero have no layers to be told by: they are modules without parameters and
    children whose class has that name.
    """
    _need_plain(module)
    called = type(module).__name__
    # The name is a guess, which `accelerate` tries out; without `check` it is taken for true.
    if _is_bare(module) and called == "Identity":
        return Candidate("skip_connect", 1)
    if _is_bare(module) and called == "Zero" and hasattr(module, "stride"):
        return Candidate("none", _stride(module))
    reduce = _factorized_reduce(module)
    layers = layers_of(module)
    found = _in_order(layers) if reduce is None else _reduce_candidate(reduce)
    # Cells of dense convolutions are not read whole.
    known = found is not None and not found.name.startswith("nor_conv")
    need(known, f"{called} is not laid out as an operation of DARTS")
    found = cast(Candidate, found)
    _need_whole(found.convs, found.norms)
    return found


def _in_order(layers: tuple[nn.Module, ...]) -> Candidate | None:
    """Reads layers that run one after the other."""
    kinds = _kinds(layers)
    if kinds in _HALVES:
        return _conv_candidate(_HALVES[kinds], layers)
    if len(kinds) == 2 and kinds[0] in _POOLS and kinds[1] is nn.BatchNorm2d:
        return _pool_candidate(layers[0], cast(nn.BatchNorm2d, layers[1]))
    return _dense_candidate(layers) if kinds == _RELU_CONV_BN else None


def _dense_candidate(layers: tuple[nn.Module, ...]) -> Candidate:
    """Reads ReLU, a convolution of all channels to as many, and a batch norm."""
    relu, conv, norm = cast(tuple[nn.ReLU, nn.Conv2d, nn.BatchNorm2d], layers)
    C, size = norm.num_features, conv.kernel_size[0]
    _need_relu(relu)
    sizes = [op.size for op in operations_of("dense_conv")]
    need(size in sizes, f"dense convolution has kernel {size}; one of {sizes} is needed")
    _need_conv(conv, "dense convolution", C, C, size, padding=size // 2)
    _need_norm(norm, C)
    return Candidate(f"nor_conv_{size}x{size}", 1, (conv,), (norm,))


@or_reason
def nested_candidate(module: nn.Module) -> Candidate | str:
    """Reads a candidate whose layers lie in modules of their own, under any names.

    In what order they run, and what is done between them, is not to be seen: a trial has to tell.
    A pool without a batch norm is one as well: it may stand beside the pool.
    """
    found = candidate(module)
    if not isinstance(found, str):
        return found
    _need_plain(module)
    layers = tuple(leaf for leaf in _leaves(module) if not _is_shift(leaf))
    kinds = _kinds(layers)
    if kinds == _REDUCE and cast(nn.Conv2d, layers[1]).kernel_size == (1, 1):
        return _reduce_candidate(_reduction(layers))
    if len(kinds) == 1 and kinds[0] in _POOLS:
        return Candidate(*_pool(layers[0]))
    nested = _in_order(layers)
    need(nested is not None, found)
    return cast(Candidate, nested)


@or_reason
def pool_norm(module: nn.Module) -> Candidate | str:
    """Reads a batch norm that may follow a pool; which pool, the call tells."""
    _need_plain(module)
    need(type(module) is nn.BatchNorm2d, f"{type(module).__name__} is no batch norm")
    norm = cast(nn.BatchNorm2d, module)
    _need_norm(norm, norm.num_features)
    return Candidate("max_pool_3x3", 1, (), (norm,))


@or_reason
def preprocess(module: nn.Module) -> Preprocess | str:
    """Reads the preprocessing of a cell's input, or says why the module is something else."""
    _need_plain(module)
    reduce = _factorized_reduce(module)
    if reduce is not None:
        _need_whole(reduce[0], reduce[1:])
        return Preprocess("factorized_reduce", *reduce)
    layers = layers_of(module)
    if _kinds(layers) != _RELU_CONV_BN:
        # They may lie in modules of their own; a trial tells whether nothing else is done.
        layers = tuple(_leaves(module))
    called = type(module).__name__
    need(
        _kinds(layers) == _RELU_CONV_BN,
        f"{called} is neither ReLU, 1x1 convolution, batch norm nor a factorized reduction",
    )
    relu, conv, norm = cast(tuple[nn.ReLU, nn.Conv2d, nn.BatchNorm2d], layers)
    _need_relu(relu)
    _need_conv(conv, "convolution", conv.in_channels, norm.num_features)
    _need_whole((conv,), (norm,))
    _need_norm(norm, norm.num_features)
    return Preprocess("relu_conv_bn", (conv,), norm)
