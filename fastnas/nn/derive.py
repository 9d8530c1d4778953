"""Puts what was chosen in the places of the choices of a network."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from fastnas.checks import check_flag, check_type
from fastnas.nn.choice import Choice
from fastnas.nn.input_choice import Input, InputChoice


class KeptInputs(nn.Module):
    """Adds the inputs that an `InputChoice` has kept; the others are not called.

    Args:
        kept: their indices.
    """

    def __init__(self, kept: Sequence[int]) -> None:
        super().__init__()
        self.kept = tuple(kept)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.kept))

    def forward(self, inputs: Sequence[Input]) -> Tensor:
        """Returns x_i + x_j of the kept inputs, each a tensor or a function that returns one."""
        first, *rest = (inputs[i] for i in self.kept)
        y = first if isinstance(first, Tensor) else first()
        for x in rest:
            y = y + (x if isinstance(x, Tensor) else x())
        return y


def derived_network(network: nn.Module, keep_weights: bool = True) -> nn.Module:
    """Returns a copy of a network with what its choices have chosen in their places.

    A `Choice` with logits becomes its best candidate (`Choice.best`), of weight 1 and without
    noise, and an `InputChoice` the sum of its two best inputs. A choice whose weights are given in
    each call stays. Candidates may hold choices, too.

    Args:
        keep_weights: whether parameters and statistics are those of the network; else every layer
            has begun anew, by its `reset_parameters`.

    Raises:
        TypeError: `network` is no module.
        ValueError: a logit is not finite; or a layer that holds parameters of its own has no
            `reset_parameters`.
    """
    check_type("network", network, nn.Module)
    check_flag("keep_weights", keep_weights)
    holder = nn.ModuleDict({"network": copy.deepcopy(network)})
    _replace_below(holder)
    made = holder["network"]
    if not keep_weights:
        _begin_anew(made)
    return made


def _replace_below(module: nn.Module) -> None:
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        chosen = _chosen(child)
        if chosen is not child:
            # Not setattr: names in a ModuleDict may be those of its methods.
            module._modules[name] = chosen
        _replace_below(chosen)


def _chosen(module: nn.Module) -> nn.Module:
    while isinstance(module, Choice | InputChoice) and module.mixing is not None:
        if isinstance(module, InputChoice):
            return KeptInputs(module.best())
        module = module.best()[1]
    return module


def _begin_anew(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if not (module._parameters or module._buffers):
            continue
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif module._parameters:
            raise ValueError(
                f"{name or type(network).__name__} is a {type(module).__name__}, which holds"
                " parameters and has no reset_parameters(); keep_weights=True is needed"
            )
