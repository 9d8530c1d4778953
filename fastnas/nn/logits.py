"""Holds the logits of a choice: who owns them, what is drawn from them, which are largest."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastnas.checks import check_choice, check_number, check_type, short
from fastnas.ops import PathSample, sample_paths
from fastnas.reference.arguments import check_floating, check_shape
from fastnas.reference.sample_paths import largest

SCALE = 1e-3
"""Deviation of new logits, as in the DARTS code."""


class Logits(nn.Module):
    """Holds the logits of one choice, or none where the weights are given in each call.

    Args:
        who: what errors call it.
        count: how many logits there are.
        mixing, tau, logits: as in `Choice`.
    """

    mixings: ClassVar[tuple[str, ...]] = ()
    sampled: ClassVar[tuple[str, ...]] = ()
    """Those of the mixings that draw, and so have a temperature."""
    logits: nn.Parameter | None

    def __init__(
        self,
        who: str,
        count: int,
        mixing: str | None,
        tau: float | Tensor | None,
        logits: nn.Parameter | None,
    ) -> None:
        super().__init__()
        if mixing is not None:
            check_choice(f"{who}: mixing", mixing, self.mixings)
        if tau is not None and mixing not in self.sampled:
            raise ValueError(
                f"{who}: tau is {short(tau)}, but mixing is {mixing!r};"
                f" {' and '.join(self.sampled)} alone have a temperature"
            )
        self._who = who
        self.mixing = mixing
        self.tau = 1.0 if tau is None else tau
        self.register_parameter("logits", self._made(count, logits))

    @property
    def tau(self) -> float | Tensor:
        """Returns the temperature of what samples."""
        return self._tau

    @tau.setter
    def tau(self, value: float | Tensor) -> None:
        if not isinstance(value, Tensor):
            check_number(f"{self._who}: tau", value)
            if value <= 0:
                raise ValueError(f"{self._who}: tau is {short(value)}; a number > 0 is needed")
        self._tau = value

    def _made(self, count: int, logits: nn.Parameter | None) -> nn.Parameter | None:
        if self.mixing is None:
            if logits is not None:
                raise ValueError(f"{self._who}: logits are given, but mixing is None")
            return None
        if logits is None:
            # A sigmoid begins at 1/2, no nearer to 0 or 1 for one candidate than for another.
            scale = 0.0 if self.mixing == "sigmoid" else SCALE
            return nn.Parameter(scale * torch.randn(count))
        check_type(f"{self._who}: logits", logits, nn.Parameter)
        check_floating(f"{self._who}: logits", logits)
        check_shape(f"{self._who}: logits", logits, [count])
        return logits

    def own_logits(self) -> Tensor:
        """Returns the logits.

        Raises:
            ValueError: there are none.
        """
        if self.logits is None:
            raise ValueError(f"{self._who}: mixing is None, so it has no logits")
        return self.logits

    def largest_logits(self, count: int) -> list[int]:
        """Returns where the largest logits are, the largest first and the first of equals.

        Raises:
            ValueError: there are no logits, or one is not finite.
        """
        logits = self.own_logits().detach()
        if not bool(logits.isfinite().all()):
            raise ValueError(f"{self._who}: logits are {short(logits.tolist())}; finite ones only")
        found: list[int] = largest(logits, count).tolist()
        return found

    def drawn(self, alpha: Tensor, **given: Any) -> PathSample:
        """Draws one path by `sample_paths`, of which `given` are further arguments."""
        return sample_paths(alpha, tau=self.tau, **given)

    def drawable(self) -> Tensor:
        """Returns the logits in a dtype that is sampled from: float32 if they are narrower."""
        logits = self.own_logits()
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def split_parameters(
    network: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the network's weights and the logits of its choices, each Parameter once.

    They are for the two optimizers of a search, as in
    ``weights, logits = split_parameters(network)``.
    """
    check_type("network", network, nn.Module)
    holders = [module for module in network.modules() if isinstance(module, Logits)]
    logits = {id(module.logits): module.logits for module in holders if module.logits is not None}
    weights = [param for param in network.parameters() if id(param) not in logits]
    return weights, list(logits.values())
