"""Measures what the candidates of choices cost, and computes the cost to be expected of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas.nn.choice import Choice
from fastnas.nn.cost import WARM_UPS, clock
from fastnas.nn.input_choice import KEPT, Input, InputChoice
from fastnas.nn.logits import Logits
from fastnas.nn.recompute import as_value
from fastnas.reference.sample_paths import kept_by_logits

Path = tuple[tuple[str, int], ...]
"""Choices by name, and what is taken of each: where in a network something is computed."""
REPEATS = 9
"""Passes whose median is a latency."""


class _Recorder:
    """Adds up by how much a reading rises in each candidate, those within it apart."""

    def __init__(self, reading: Callable[[], float]) -> None:
        self.reading = reading
        self.costs: dict[Path, float] = {}
        self.modules: dict[Path, nn.Module] = {}
        self._stack: list[tuple[str, int]] = []

    @contextmanager
    def within(self, *step: tuple[str, int]) -> Iterator[None]:
        """Counts what is computed inside for one more step of the path."""
        outer, path = tuple(self._stack), (*self._stack, *step)
        self._stack += step
        start = self.reading()
        try:
            yield
        finally:
            del self._stack[len(outer) :]
            cost = self.reading() - start
            self.costs[path] = self.costs.get(path, 0.0) + cost
            if step:
                self.costs[outer] = self.costs.get(outer, 0.0) - cost

    def run_all(self, name: str, choice: Logits) -> Callable[..., Tensor]:
        """Returns a forward for a choice that runs all it has, one after the other."""

        def candidates(*args: Any, w: Any = None, **kwargs: Any) -> Tensor:
            outputs = []
            for k, op in enumerate(cast(Choice, choice).candidates.values()):
                with self.within((name, k)):
                    self.modules[tuple(self._stack)] = op
                    # What waits to be computed with others would be counted for another place.
                    outputs.append(as_value(op(*args, **kwargs)))
            return cast(Tensor, outputs[0])

        def inputs(given: Sequence[Input]) -> Tensor:
            values = []
            for i, x in enumerate(given):
                with self.within((name, i)):
                    values.append(as_value(x if isinstance(x, Tensor) else x()))
            return cast(Tensor, values[0])

        return candidates if isinstance(choice, Choice) else inputs


@contextmanager
def _all_run(
    recorder: _Recorder, network: nn.Module, choices: Mapping[str, Logits]
) -> Iterator[None]:
    """Has the choices run all candidates, in evaluation mode, without gradients or traces."""
    modes = [(module, module.training) for module in network.modules()]
    own = {name: vars(choice).get("forward") for name, choice in choices.items()}
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    try:
        network.eval()
        for name, choice in choices.items():
            vars(choice)["forward"] = recorder.run_all(name, choice)
        with torch.no_grad(), torch.random.fork_rng(list(devices)):
            yield
    finally:
        for name, choice in choices.items():
            del vars(choice)["forward"]
            if own[name] is not None:
                vars(choice)["forward"] = own[name]
        for module, mode in modes:
            module.training = mode


def choice_costs(
    kind: str, network: nn.Module, choices: Mapping[str, Logits], run: Callable[[], object]
) -> dict[Path, float]:
    """Returns the cost of each candidate by its path; that of the empty path is always there.

    A path such as (("node", 1), ("edge", 0)) is the candidate 0 of the choice "edge" where the
    second input of "node" reads it. What a candidate holds in choices of its own has paths of its
    own. A parameter counts once, in the innermost of its places. Parameters that a function among
    the inputs of an `InputChoice` uses without a `Choice` are of the empty path.

    Args:
        kind: "macs", "params" or "latency" (in ms).
        choices: the choices with logits, by name.
        run: passes what is to be counted, such as one image, through the network.
    """
    if kind == "macs":
        from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

        with FlopCounterMode(display=False) as counter:
            recorder = _Recorder(lambda: counter.get_total_flops() / 2)
            with _all_run(recorder, network, choices), recorder.within():
                run()
        return recorder.costs
    if kind == "params":
        recorder = _Recorder(lambda: 0.0)
        with _all_run(recorder, network, choices), recorder.within():
            run()
        return _parameters(network, recorder.modules, choices)
    runs = []
    for _ in range(WARM_UPS + REPEATS):
        recorder = _Recorder(clock(next(network.parameters()).device))
        with _all_run(recorder, network, choices), recorder.within():
            run()
        runs.append(recorder.costs)
    # A difference of two readings may be below 0 where nothing is computed.
    return {path: max(0.0, median(r[path] for r in runs[WARM_UPS:])) for path in runs[-1]}


def _parameters(
    network: nn.Module, modules: Mapping[Path, nn.Module], choices: Mapping[str, Logits]
) -> dict[Path, float]:
    logits = {id(choice.logits) for choice in choices.values()}
    found: dict[Path, float] = {}
    seen = set(logits)
    # The innermost come first, so that what is left for the outer ones is theirs alone.
    for path in sorted(modules, key=len, reverse=True):
        found[path] = float(_new_parameters(modules[path], seen))
    held = {
        id(p)
        for choice in choices.values()
        if isinstance(choice, Choice)
        for p in choice.candidates.parameters()
    }
    # A choice that did not run is in no path, and its candidates are not derived for anything.
    seen |= held
    return {**found, (): float(_new_parameters(network, seen))}


def _new_parameters(module: nn.Module, seen: set[int]) -> int:
    new = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
    seen.update(new)
    return sum(new.values())


def choice_shares(choice: Logits) -> Tensor:
    """Returns the share with which each candidate, or input, of a choice is derived, float64.

    Of a `Choice` one candidate is: softmax(alpha), or of sigmoids sigma_k / sum sigma. Of an
    `InputChoice` two inputs are: the probabilities of `kept_by_logits`, of "softmax" as of "top2".
    """
    logits = choice.own_logits().double()
    if isinstance(choice, InputChoice):
        if choice.inputs == KEPT:
            return torch.ones_like(logits[:1]).expand(KEPT)
        topology = choice.mixing if choice.mixing == "pairs" else "top2"
        return kept_by_logits(logits, [choice.inputs], topology)
    if choice.mixing == "sigmoid":
        sigma = logits.sigmoid()
        return sigma / sigma.sum()
    return logits.softmax(-1)


def expected_cost(costs: Mapping[Path, float], choices: Mapping[str, Logits]) -> Tensor:
    """Returns E = sum over paths of their cost times the shares along them, float64 []."""
    shares = {name: choice_shares(choice) for name, choice in choices.items()}
    total = next(iter(shares.values())).new_zeros(())
    for path, cost in costs.items():
        term: Tensor | float = cost
        for name, i in path:
            term = term * shares[name][i]
        total = total + term
    return total
