"""Makes the expected cost of a `ChoiceSearch` a term of the loss of its logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastnas.checks import check_number, short
from fastnas.nn.choice_cost import Path, choice_costs, expected_cost
from fastnas.nn.logits import Logits
from fastnas.processes import here
from fastnas.strategies.cost import CostTarget, hinge

if TYPE_CHECKING:
    from fastnas.search.choice_search import ChoiceSearch


class ChoiceCost:
    """Computes weight max(0, E[cost] / target - 1); `fastnas.strategies.cost` says why.

    Args:
        text: such as "macs:300e6", "params:3e6" or "latency:12ms".
        weight: of the term, above 0.
        network: with the choices.
        choices: those with logits, by name.
        run: passes through the network what the target is of, such as one image.
    """

    def __init__(
        self,
        text: str,
        weight: float,
        network: nn.Module,
        choices: Mapping[str, Logits],
        run: Callable[[], object],
    ) -> None:
        check_number("cost_weight", weight)
        if not 0 < weight < math.inf:
            raise ValueError(f"cost_weight is {short(weight)}; a finite number > 0 is needed")
        self.target, self.weight, self.choices = CostTarget.of(text), float(weight), dict(choices)
        # Of several processes the first one's clock holds for all.
        self.costs: dict[Path, float] = here().first_says(
            choice_costs(self.target.kind, network, choices, run)
        )

    def expected(self) -> Tensor:
        """Returns E[cost], [] in the unit of the target."""
        return expected_cost(self.costs, self.choices)

    def __call__(self) -> Tensor:
        """Returns the term of the loss."""
        return hinge(self.expected(), self.target.value, self.weight)

    def figures(self) -> dict[str, float]:
        """Returns what the history holds of it."""
        return {f"expected_{self.target.kind}": float(self.expected().detach())}

    def identity(self) -> list[Any]:
        """Returns what a search that goes on must have as well."""
        return [*self.target, self.weight]

    def state_dict(self) -> dict[str, Any]:
        """Returns the costs: a latency measured anew would be another one."""
        return {"costs": [[list(map(list, path)), cost] for path, cost in self.costs.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = {tuple((name, i) for name, i in path): cost for path, cost in state["costs"]}
        if found.keys() != self.costs.keys():
            raise ValueError("its costs are of other candidates")
        if not all(type(c) is float and 0 <= c < math.inf for c in found.values()):
            raise ValueError("its costs are no finite numbers of 0 or more")
        self.costs = found


def one_sample(batches: Iterable[Any]) -> Any:
    """Returns the first sample of the first batch; torch's generators stay where they are.

    Raises:
        ValueError: the tensors of a batch are not of equally many samples.
    """
    with torch.random.fork_rng([]), _kept(batches):
        batch = next(iter(batches), None)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "cost is of one sample, and the first batch of train has tensors of"
            f" {', '.join(map(str, sorted(sizes))) or 'no'} rows; give one as cost_batch"
        )
    return tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) else leaf, batch)


@contextmanager
def _kept(batches: Any) -> Iterator[None]:
    """Puts back what iterating over loaders moves: their generators, or a state of their own."""
    holders = batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    is_stateful = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
    state = copy.deepcopy(batches.state_dict()) if is_stateful else None
    yield
    for generator, before in generators:
        generator.set_state(before)
    if is_stateful:
        batches.load_state_dict(state)


def cost_of_choices(
    search: ChoiceSearch, text: str | None, weight: float | None, batch: Any
) -> ChoiceCost | None:
    """Returns the cost in a search, None where no text is given.

    Args:
        weight: 1 by default.
        batch: what the costs are counted with; by default the first sample of `search.train`.
    """
    if text is None:
        for name, given in (("cost_weight", weight), ("cost_batch", batch)):
            if given is not None:
                raise ValueError(f"{name} is given, but there is no cost")
        return None
    CostTarget.of(text)  # before a batch is read
    sample = search.moved(one_sample(search.train) if batch is None else batch)

    def run() -> None:
        with search.precision.autocast():
            search.loss(search.network, sample)

    given = 1.0 if weight is None else weight
    return ChoiceCost(text, given, search.network, search.choices, run)
