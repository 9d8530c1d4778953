"""Describes the MobileNet-like space: a column of layers, each an inverted residual or a skip.

Sources: Chu, Zhang and Xu, arXiv 1907.01845 (FairNAS), section 4.1 and the models of
xiaomi-automl/FairNAS; Chu et al., arXiv 2005.03566 (NoisyDARTS), whose ImageNet search adds the
skip; Cai et al., ICLR 2019 (ProxylessNAS), which the column comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastnas.checks import check_int, check_number, check_type, short

SKIP = "skip"
Block = tuple[int, int] | str
"""What a layer is: (kernel, expansion) of an inverted residual, or "skip"."""
Column = tuple[Block, ...]
"""An architecture: a block for each layer."""
_BLOCK = re.compile(r"k([0-9]{1,3})_e([0-9]{1,3})")
_SIZES = ("stem", "stem_stride", "first", "head")


class MobileLayer(NamedTuple):
    """Holds what is fixed of a layer: [N, C_in, H, W] -> [N, C_out, ceil(H / stride), ...]."""

    C_in: int
    C_out: int
    stride: int

    @property
    def may_skip(self) -> bool:
        """Tells whether the identity is a candidate, which is also where a block is residual."""
        return self.stride == 1 and self.C_in == self.C_out


@dataclass(frozen=True)
class MobileSpace:
    """Describes a column: stem, searchable layers in stages, head, and the candidates of a layer.

    The stem is a 3x3 convolution to `stem` channels and a depthwise-separable one to `first`; the
    head a 1x1 convolution to `head` channels, the mean over the image and a linear classifier. By
    default there are the 19 layers of FairNAS for images of 224x224 pixels, and 7 ** 13 * 6 ** 6
    architectures.

    Args:
        stages: (channels, stride, layers) of each; the first of its layers has the stride, 1 or 2.
        stem, first, head: channels, as above.
        stem_stride: of the first convolution, 2 or, for small images, 1.
        kernels, expansions: of the inverted residuals, odd numbers and numbers from 1 on. Where
            `memory="recompute"` the last candidate is what stays for backward, so that the
            largest expansion comes first.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    stages: tuple[tuple[int, int, int], ...] = (
        *((32, 2, 2), (40, 2, 4), (80, 2, 4)),
        *((96, 1, 4), (192, 2, 4), (320, 1, 1)),
    )
    stem: int = 32
    stem_stride: int = 2
    first: int = 16
    head: int = 1280
    kernels: tuple[int, ...] = (3, 5, 7)
    expansions: tuple[int, ...] = (6, 3)

    def __post_init__(self) -> None:
        for name in _SIZES:
            check_int(name, getattr(self, name), 1, 2 if name == "stem_stride" else None)
        stages = tuple(_checked_stage(i, s) for i, s in enumerate(_listed("stages", self.stages)))
        object.__setattr__(self, "stages", stages)
        for name in ("kernels", "expansions"):
            values = tuple(_listed(name, getattr(self, name)))
            for value in values:
                check_int(f"a number in {name}", value, 1, 999)
                if name == "kernels" and value % 2 == 0:
                    raise ValueError(f"a number in kernels is {value}; an odd one is needed")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} is {short(values)}; no number may come twice")
            object.__setattr__(self, name, values)

    @property
    def layers(self) -> tuple[MobileLayer, ...]:
        """Returns the searchable layers, from the stem to the head."""
        found, C_in = [], self.first
        for C_out, stride, count in self.stages:
            for i in range(count):
                found.append(MobileLayer(C_in, C_out, stride if i == 0 else 1))
                C_in = C_out
        return tuple(found)

    @property
    def last(self) -> int:
        """Returns the channels that the head reads."""
        return self.stages[-1][0]

    def candidates(self, layer: MobileLayer) -> Column:
        """Returns what a layer may be, in the order of its logits."""
        blocks = [(kernel, e) for e in self.expansions for kernel in self.kernels]
        return (*blocks, SKIP) if layer.may_skip else tuple(blocks)

    def checked(self, architecture: Sequence[Block]) -> Column:
        """Returns an architecture as a tuple.

        Raises:
            TypeError, ValueError: it has another number of blocks, or one that is no candidate.
        """
        blocks = [_as_block(block) for block in _listed("architecture", architecture)]
        layers = self.layers
        if len(blocks) != len(layers):
            raise ValueError(
                f"architecture has {len(blocks)} layers; the space has {len(layers)}, and a block"
                " is needed for each"
            )
        for i, (block, layer) in enumerate(zip(blocks, layers)):
            allowed = self.candidates(layer)
            if block not in allowed:
                names = ", ".join(map(block_name, allowed))
                is_pair = isinstance(block, tuple) and len(block) == 2
                given = block_name(block) if is_pair else short(block)
                raise ValueError(f"architecture[{i}] is {given}; allowed: {names}")
        return tuple(blocks)

    def scaled(self, width: float) -> MobileSpace:
        """Returns the space with all channels times `width`, in multiples of 8.

        They are rounded as in MobileNetV2: to the nearest multiple, at least 8, and up where that
        is less than nine tenths.
        """
        check_number("width", width)
        if width <= 0:
            raise ValueError(f"width is {width}; a number above 0 is needed")
        stem, first, head = (_rounded(C * width) for C in (self.stem, self.first, self.head))
        stages = tuple((_rounded(C * width), stride, count) for C, stride, count in self.stages)
        return replace(self, stages=stages, stem=stem, first=first, head=head)


def _rounded(channels: float) -> int:
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError(f"{name} is {short(value)}; a list or tuple that is not empty is needed")
    return list(value)


def _checked_stage(i: int, stage: Any) -> tuple[int, int, int]:
    if not isinstance(stage, list | tuple) or len(stage) != 3:
        raise TypeError(f"stages[{i}] is {short(stage)}; (channels, stride, layers) is needed")
    for name, value in zip(("channels", "stride", "layers"), stage):
        check_int(f"stages[{i}]: {name}", value, 1, 2 if name == "stride" else None)
    channels, stride, layers = stage
    return channels, stride, layers


def _as_block(block: Any) -> Any:
    return tuple(block) if isinstance(block, list) else block


def block_name(block: Block) -> str:
    """Returns the name of a block: "k5_e6" of (5, 6), "skip" of "skip".

    Raises:
        TypeError, ValueError: it is neither "skip" nor two numbers.
    """
    if block == SKIP:
        return SKIP
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise TypeError(f"block is {short(block)}; (kernel, expansion) or 'skip' is needed")
    for name, value in zip(("kernel", "expansion"), block):
        check_int(f"block: {name}", value, 1, 999)
    return f"k{block[0]}_e{block[1]}"


def named_block(name: str) -> Block:
    """Returns the block of a name, the inverse of `block_name`.

    Raises:
        TypeError, ValueError: it is no such name.
    """
    check_type("name", name, str)
    if name == SKIP:
        return SKIP
    found = _BLOCK.fullmatch(name)
    if not found:
        raise ValueError(f"name is {short(name)}; 'skip' or one as k3_e6 is needed")
    return int(found[1]), int(found[2])


def parse_column(text: str) -> Column:
    """Reads an architecture of the MobileNet-like space, ``k3_e6 k5_e3 skip ...``.

    Args:
        text: names of blocks, from the first layer to the last, with space between.

    Raises:
        TypeError, ValueError: another text. Whether the blocks fit is for `MobileSpace.checked`.
    """
    check_type("text", text, str)
    words = text.split()
    if not words:
        raise ValueError("text is empty; names of blocks such as k3_e6 are needed")
    return tuple(_read(words))


def _read(words: list[str]) -> Iterator[Block]:
    for i, word in enumerate(words):
        try:
            yield named_block(word)
        except ValueError:
            raise ValueError(
                f"text: layer {i} is {short(word)}; 'skip' or a name as k3_e6 is needed"
            ) from None


def format_column(architecture: Sequence[Block]) -> str:
    """Writes an architecture as `parse_column` reads it.

    Raises:
        TypeError, ValueError: it is no list or tuple of blocks.
    """
    try:
        return " ".join(map(block_name, _listed("architecture", architecture)))
    except (TypeError, ValueError) as error:
        raise type(error)(f"architecture: {error}") from None


MOBILE_SPACE = MobileSpace()
MOBILE_ARCHITECTURES: dict[str, Column] = {
    name: parse_column(text)
    for name, text in {
        "NoisyDARTS-A": "k3_e6 k3_e3  k5_e6 k3_e6 k3_e6 k3_e6  k5_e6 k7_e6 k3_e6 k3_e6"
        "  k3_e6 k3_e6 k3_e6 k3_e6  k3_e6 k7_e6 k7_e6 k7_e6  k7_e6",
        "FairNAS-A": "k7_e3 k3_e3  k7_e3 k3_e6 k7_e6 k3_e3  k3_e3 k7_e6 k7_e6 k5_e3"
        "  k3_e6 k5_e3 k5_e3 k3_e6  k3_e6 k7_e6 k3_e6 k7_e6  k5_e6",
        "FairNAS-B": "k5_e3 k3_e3  k5_e3 k3_e3 k3_e6 k5_e3  k7_e3 k3_e3 k3_e6 k5_e3"
        "  k3_e3 k3_e6 k7_e3 k3_e3  k7_e6 k5_e6 k7_e6 k3_e6  k5_e6",
    }.items()
}
"""Published architectures by name, without squeeze and excitation."""
