"""Builds the networks of the MobileNet-like space: the supernet, and that of an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from fastnas.backends.transforms import is_transformed
from fastnas.checks import check_choice, check_flag, check_int, check_number, check_type, short
from fastnas.layers.inverted_residual import (
    ACTIVATIONS,
    InvertedResidual,
    mobile_head,
    mobile_stem,
)
from fastnas.nn.choice import CHOICE_MEMORY, Choice, checked_noise
from fastnas.nn.paths import CellWeights
from fastnas.nn.recompute import recomputed
from fastnas.reference import SkipNoise
from fastnas.reference.arguments import check_images
from fastnas.spaces.mobile import (
    MOBILE_SPACE,
    Block,
    Column,
    MobileLayer,
    MobileSpace,
    block_name,
    named_block,
)

MOBILE_ACTIVATIONS = tuple(ACTIVATIONS)
"""The activations that a derived network may have."""
CHEAP = 40
"""Input channels up to which "lean" runs the first 1x1 convolution of a block again.

It takes as many products for each number that it returns. On images of 112x112 pixels the layers
beyond hold a seventh of eager's bytes so, and to run them again, too, took a tenth of its step.
"""


class MobileNetSearchNetwork(nn.Module):
    """Computes the supernet of the MobileNet-like space: a column of choices.

    Layer l mixes y = sum_k w_lk o_lk(x), o_lk the inverted residuals of all kernels and expansions
    and, where it keeps size and channels, the identity. Batch norms have scale and shift, as in
    FairNAS. Of one layer after the other that is a :class:`Choice`, and so the methods are its
    `mixing`: "softmax" (DARTS; NoisyDARTS with ``noise={"skip": SkipNoise()}``), "sigmoid"
    (FairDARTS), "gdas" (GDAS), or None, where each call gives the weights or sampled paths.

    `memory` says what is kept for backward. Results, gradients, running statistics and random
    numbers are those of "eager"::

        "eager"      what each candidate keeps, four wide tensors, and its output
        "lean"       of each candidate with up to 40 input channels one wide tensor, what its
                     depthwise convolution returns, of others three: backward computes again the
                     norm and the activation after that and, of the former, the 1x1 convolution,
                     norm and activation before it
        "recompute"  what the last candidate of a layer keeps (that of the least expansion and the
                     largest kernel), and x; backward runs the others again
        "minimal"    x of each layer; backward runs all candidates again

    In all but "eager" the stem is kept as a candidate of "lean". Where forward runs again the
    rules of :class:`Choice` hold.

    Sources: Chu et al., arXiv 1907.01845 (FairNAS); Chu et al., arXiv 2005.03566 (NoisyDARTS).

    Args:
        classes: outputs.
        space: the column; ``MobileSpace().scaled(0.25)`` is narrow, ``MobileSpace(stem_stride=1)``
            for small images.
        mixing, tau: as in `Choice`.
        memory: as above; may be set later.
        noise: by candidate's name what is drawn on its output in training, in each layer that has
            that candidate.
        in_channels: of the images.

    Attributes:
        layers: the choices, whose candidates are named "k3_e6" and "skip".

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        classes: int,
        *,
        space: MobileSpace = MOBILE_SPACE,
        mixing: str | None = "softmax",
        memory: str = "recompute",
        noise: Mapping[str, SkipNoise] | None = None,
        tau: float | Tensor | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_int("classes", classes, 1)
        check_int("in_channels", in_channels, 1)
        check_type("space", space, MobileSpace)
        columns = [space.candidates(layer) for layer in space.layers]
        names = dict.fromkeys(block_name(block) for blocks in columns for block in blocks)
        noise = checked_noise(noise, names)
        self.space, self.in_channels = space, in_channels
        self.stem = mobile_stem(in_channels, space.stem, space.first, space.stem_stride, "relu6")
        self.layers = nn.ModuleList()
        for layer, blocks in zip(space.layers, columns):
            named = {block_name(block): _candidate(block, layer) for block in blocks}
            noisy = {name: kind for name, kind in noise.items() if name in named}
            self.layers.append(Choice(named, mixing=mixing, noise=noisy, tau=tau))
        self.head = mobile_head(space.last, space.head, "relu6")
        self.classifier = nn.Linear(space.head, classes)
        self.memory = memory

    @property
    def choices(self) -> list[Choice]:
        """Returns the layers."""
        return [layer for layer in self.layers if isinstance(layer, Choice)]

    @property
    def memory(self) -> str:
        """Returns what is kept for backward: "eager", "lean", "recompute" or "minimal"."""
        return self._memory

    @memory.setter
    def memory(self, value: str) -> None:
        check_choice("memory", value, CHOICE_MEMORY)
        self._memory = value
        for choice in self.choices:
            choice.memory = value
            for op in choice.candidates.values():
                if isinstance(op, _Candidate):
                    op.lean = value == "lean"

    def set_tau(self, tau: float | Tensor) -> None:
        """Sets the temperature of all layers, which "gdas" lowers as it goes.

        Raises:
            TypeError, ValueError: it is no number above 0, or nothing is sampled.
        """
        for choice in self.choices:
            if choice.mixing not in Choice.sampled:
                raise ValueError(f"tau is given, but mixing is {choice.mixing!r}, without one")
            choice.tau = tau

    def set_noise_amplitude(self, amplitude: float) -> None:
        """Sets what the noise of all layers is multiplied with, 1 at first.

        Raises:
            TypeError, ValueError: it is no number from 0 on.
        """
        check_number("amplitude", amplitude)
        if amplitude < 0:
            raise ValueError(f"amplitude is {short(amplitude)}; a number >= 0 is needed")
        for choice in self.choices:
            choice.noise_amplitude = amplitude

    def derive(self) -> Column:
        """Returns the architecture of the largest logits, the first candidate of equal ones.

        Raises:
            ValueError: `mixing` is None, or a logit is not finite.
        """
        return tuple(named_block(choice.best()[0]) for choice in self.choices)

    def forward(self, x: Tensor, w: Sequence[CellWeights] | None = None) -> Tensor:
        """Maps [N, in_channels, H, W] to logits [N, classes].

        Args:
            w: for each layer the weights of its candidates, or `Paths` of a sampled one; needed
                without a `mixing`, else in place of it.
        """
        check_images("x", x, self.in_channels)
        given = self._checked_weights(w)
        # The stem has the layers of an inverted residual, cut in the same places.
        parts = self.stem[:4], self.stem[4:7], self.stem[7]
        x = self.stem(x) if self.memory == "eager" else _in_parts(parts, x, "the stem")
        for layer, w_layer in zip(self.layers, given):
            # In a derived network (`derived_network`) the layers are blocks, which take no weights.
            x = layer(x) if w_layer is None else layer(x, w=w_layer)
        return self.classifier(self.head(x))

    def _checked_weights(self, w: object) -> Sequence[CellWeights | None]:
        count = len(self.layers)
        if w is None:
            if any(choice.mixing is None for choice in self.choices):
                raise TypeError("w is None and mixing is None; weights of each layer are needed")
            return list(repeat(None, count))
        if not isinstance(w, list | tuple) or len(w) != count or hasattr(w, "_fields"):
            raise TypeError(f"w is {short(w)}; a list of {count} is needed, one for each layer")
        return w


class MobileNetEvalNetwork(nn.Module):
    """Builds the network of an architecture of the MobileNet-like space, for images of any size.

    NoisyDARTS-A is ``squeeze=True, activation="swish"``, which are added after the search.

    Sources: as :class:`MobileNetSearchNetwork`.

    Args:
        architecture: a block for each layer, such as one of
            :data:`fastnas.spaces.MOBILE_ARCHITECTURES`.
        classes: outputs.
        space: the column.
        squeeze: whether each inverted residual has squeeze and excitation.
        activation: of the whole network, "relu6" or "swish".
        in_channels: of the images.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        architecture: Sequence[Block],
        classes: int,
        *,
        space: MobileSpace = MOBILE_SPACE,
        squeeze: bool = False,
        activation: str = "relu6",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_int("classes", classes, 1)
        check_int("in_channels", in_channels, 1)
        check_flag("squeeze", squeeze)
        check_choice("activation", activation, ACTIVATIONS)
        check_type("space", space, MobileSpace)
        self.architecture, self.in_channels = space.checked(architecture), in_channels
        stem = mobile_stem(in_channels, space.stem, space.first, space.stem_stride, activation)
        self.stem = stem
        self.layers = nn.ModuleList(
            nn.Identity()
            if isinstance(block, str)
            else InvertedResidual(*_sizes(block, layer), squeeze=squeeze, activation=activation)
            for block, layer in zip(self.architecture, space.layers)
        )
        self.head = mobile_head(space.last, space.head, activation)
        self.classifier = nn.Linear(space.head, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to logits [N, classes]."""
        check_images("x", x, self.in_channels)
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.head(x))


class _Candidate(InvertedResidual):
    """Computes an inverted residual; `lean` says whether backward runs parts of it again."""

    lean = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.lean:
            return super().forward(x)
        first, *rest = self.parts()
        if x.shape[1] <= CHEAP:
            y = _in_parts((first, *rest), x, "a candidate")
        else:
            y = _in_parts(rest, first(x), "a candidate")
        return x + y if self.is_residual else y


def _in_parts(parts: Sequence[nn.Module], x: Tensor, who: str) -> Tensor:
    """Runs modules in order, all but the last without keeping more than what each is given.

    Backward runs again what comes before the last convolution of a part: nothing after that is
    needed, and torch's checkpoint stops there.
    """
    *twice, last = parts
    keeps_all = not torch.is_grad_enabled() or is_transformed()
    for part in twice:
        x = part(x) if keeps_all else recomputed(_itself, part, who, (x,), {})
    y: Tensor = last(x)
    return y


def _itself(y: Tensor) -> Tensor:
    return y


def _sizes(block: tuple[int, int], layer: MobileLayer) -> tuple[int, int, int, int, int]:
    """Returns the first arguments of an inverted residual."""
    kernel, expansion = block
    return layer.C_in, layer.C_out, kernel, expansion, layer.stride


def _candidate(block: Block, layer: MobileLayer) -> nn.Module:
    return nn.Identity() if isinstance(block, str) else _Candidate(*_sizes(block, layer))
