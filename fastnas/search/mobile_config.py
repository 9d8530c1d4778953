"""Says what a search of the MobileNet-like space is told, and which methods search it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastnas.checks import short
from fastnas.nn.choice import CHOICE_MEMORY
from fastnas.nn.mobilenet import MOBILE_ACTIVATIONS
from fastnas.options import option, options_of
from fastnas.search.config import (
    ACTIVATION,
    SCALED,
    SQUEEZE,
    STEM,
    ConfigError,
    GradientConfig,
    SearchConfig,
)
from fastnas.spaces import SPACES
from fastnas.spaces.mobile_genotype import MOBILENET, STRIDES, WIDTHS


class Chain(NamedTuple):
    """Says how a method searches choices that follow one another.

    Attributes:
        mixing: of each `Choice`.
        options: those of the method that mean something there.
    """

    mixing: str
    options: tuple[str, ...]


CHAINS = {
    "darts": Chain("softmax", ("order",)),
    "noisy-darts": Chain(
        "softmax",
        ("order", "noise_kind", "noise_mixture", "noise_mean", "noise_factor", "noise_decay"),
    ),
    "fair-darts": Chain("sigmoid", ("order", "zero_one_weight")),
    "gdas": Chain("gdas", ("samples", "tau_schedule", "tau_start", "tau_end")),
}
"""The methods that choose one of several candidates, by name. The others need a cell: edges to keep
of several, operations to drop stage by stage, or shares of operations."""


@dataclass(frozen=True)
class MobileConfig(GradientConfig):
    """Holds the settings of a search of the MobileNet-like space.

    Where they are published for no search of this space, they are the method's.
    """

    space: str = option(
        MOBILENET,
        f"{MOBILENET}: FairNAS' column, by {', '.join(sorted(CHAINS))}",
        choices=(MOBILENET,),
    )
    width: float = option(1.0, SCALED, WIDTHS)
    stem_stride: int = option(2, STEM, STRIDES)
    memory: str = option(
        "recompute", f"mobilenet: {', '.join(CHOICE_MEMORY)} (recompute)", choices=CHOICE_MEMORY
    )
    squeeze: bool = option(False, SQUEEZE)
    activation: str = option("relu6", ACTIVATION, choices=MOBILE_ACTIVATIONS)

    @property
    def chain(self) -> Chain:
        return CHAINS[self.method]

    def validate(self) -> None:
        super().validate()
        if self.method not in CHAINS:
            raise ConfigError(
                f"method is {short(self.method)}; space {MOBILENET} is searched by"
                f" {', '.join(sorted(CHAINS))}"
            )
        for name in self.options:
            if name not in self.chain.options:
                raise ConfigError(
                    f"{name} given, which method {self.method} does not have in space {MOBILENET};"
                    f" its options there: {', '.join(self.chain.options)}"
                )
        self.strategy()


def check_space(settings: Mapping[str, Any]) -> None:
    """Checks whether the settings of a search by gradient are those of its space.

    Raises:
        ConfigError: the space is none, or a setting belongs to the other kind of space.
    """
    space = settings.get("space")
    known = (*SPACES, MOBILENET)
    if space is not None and space not in known:
        raise ConfigError(f"no search space {short(space)}; there are {', '.join(known)}")
    kinds = (MobileConfig, SearchConfig) if space == MOBILENET else (SearchConfig, MobileConfig)
    own, others = map(options_of, kinds)
    foreign = [name for name in settings if name in others and name not in own]
    if foreign:
        told = ", ".join(name for name in own if name not in options_of(GradientConfig))
        raise ConfigError(
            f"{foreign[0]} is given, which space {space or SearchConfig.space} does not have;"
            f" what it has of its own: {told}"
        )
