"""Decides by the dominant eigenvalue whether a search stops early, as RobustDARTS does.

After Zela et al., Understanding and Robustifying Differentiable Architecture Search, ICLR 2020,
section 4.2, with the numbers of its public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from fastnas.checks import check_int
from fastnas.search.fields import ConfigError
from fastnas.strategies import STRATEGIES, Strategy
from fastnas.strategies.single_path import SinglePath

if TYPE_CHECKING:
    from fastnas.search.config import SearchConfig

STOPS = ("none", "eigenvalue")
"""What may stop a search."""
WINDOW = 5
"""Values of a local mean."""
LAG = 4
"""Values by which the mean that it is compared with lies before it."""
FACTOR = 1.3
FIRST_EPOCH = 10
"""The earliest to go back to, counted from 0."""
EVERY = 2
"""Epochs between two values in RobustDARTS."""


class EarlyStop(NamedTuple):
    """Tells where a search has stopped; epochs count from 0, as in the history.

    Attributes:
        decided: the epoch by whose value it stopped.
        rollback: the epoch whose logits are derived.
        ratio: of the two local means.
    """

    decided: int
    rollback: int
    ratio: float

    def text(self, epochs: int) -> str:
        """Says what happened in a search of so many epochs, which people count from 1."""
        return (
            f"stopped early after epoch {self.decided + 1} of {epochs}: the eigenvalue has grown"
            f" {self.ratio:.2f}-fold; back to the logits of epoch {self.rollback + 1}"
        )


def early_stop(epochs: Sequence[int], values: Sequence[float]) -> EarlyStop | None:
    """Returns the first stop in a series of eigenvalues, or None.

        m_i = mean(values[i - 4 : i + 1]),  it stops at i where m_i / m_(i-4) > 1.3

    m_i stands for epochs[i - 2], the centre of its window, and the search goes back to the centre
    of the other one, epochs[i - 6]: with a value every 2 epochs that is 8 epochs before the first
    centre, and 12 before the decision. An epoch before 10 is not gone back to. Where m_(i-4) is
    not positive, which the public code does not consider, it does not stop.

    Args:
        epochs: of the values, in equal steps. That code does not ask the rule after a search's last
            epoch, so neither that one nor its value belongs here.
        values: one for each.

    Raises:
        ValueError: there are more or fewer values than epochs.
    """
    if len(epochs) != len(values):
        raise ValueError(f"values has {len(values)} entries, epochs {len(epochs)}")
    for i in range(WINDOW - 1 + LAG, len(values)):
        now, before = _mean(values, i), _mean(values, i - LAG)
        rollback = epochs[i - LAG - WINDOW // 2]
        if rollback >= FIRST_EPOCH and before > 0 and now / before > FACTOR:
            return EarlyStop(epochs[i], rollback, now / before)
    return None


def first_decision(every: int) -> int:
    """Returns the first epoch, from 0, at which `early_stop` may stop: a value every so many."""
    check_int("every", every, 1)
    last = next(
        i for i in count(WINDOW - 1 + LAG) if every * (i - LAG - WINDOW // 2) >= FIRST_EPOCH
    )
    return every * last


def check_eigenvalue(config: SearchConfig, strategy: Strategy) -> None:
    """Refuses settings of the eigenvalue and of early stops that could have no effect.

    Raises:
        ConfigError: the method samples paths; something depends on an eigenvalue that is not
            measured; or the search has several stages, or too few epochs for a stop.
    """
    every = config.eigenvalue_every
    if every == 0:
        if config.early_stop != "none":
            raise ConfigError(
                f"early_stop is {config.early_stop!r}, but eigenvalue_every is 0; it needs the"
                f" eigenvalues (RobustDARTS: every {EVERY} epochs)"
            )
        if config.eigenvalue_images is not None:
            raise ConfigError(
                f"eigenvalue_images is {config.eigenvalue_images}, but eigenvalue_every is 0"
            )
        return
    if isinstance(strategy, SinglePath):
        mixtures = (name for name, kind in STRATEGIES.items() if not issubclass(kind, SinglePath))
        raise ConfigError(
            f"eigenvalue_every is {every}, but method {config.method} samples paths, whose loss has"
            f" no second derivative in the logits; allowed for {', '.join(sorted(mixtures))}"
        )
    if config.early_stop == "none":
        return
    epochs = config.resolved("epochs")
    try:
        stages = len(strategy.stages(config.resolved("layers"), epochs))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if stages > 1:
        raise ConfigError(
            f"early_stop is {config.early_stop!r}, but method {config.method} searches in {stages}"
            " stages, each with logits of its own; a search of one stage can stop early"
        )
    # The rule is not asked after the last epoch, so one more is needed.
    needed = first_decision(every) + 2
    if epochs < needed:
        raise ConfigError(
            f"early_stop is {config.early_stop!r}, but epochs is {epochs}; with"
            f" eigenvalue_every {every} a search of fewer than {needed} epochs never stops early"
        )


def _mean(values: Sequence[float], last: int) -> float:
    return sum(values[last - WINDOW + 1 : last + 1]) / WINDOW
