"""Holds Choice: any candidate modules in one place of any network, mixed or sampled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastnas.backends.transforms import is_transformed
from fastnas.checks import check_choice, check_type, short
from fastnas.layers import primitives
from fastnas.nn.facts import is_plain
from fastnas.nn.final_norms import final_norm, run_to_norm, runs_in_order
from fastnas.nn.logits import Logits
from fastnas.nn.mixed_op import select
from fastnas.nn.paths import CellWeights, Paths, add_siblings, check_paths
from fastnas.nn.recompute import as_value, is_fused, recomputed
from fastnas.nn.terms import AtOnce, Total
from fastnas.ops import draw_noise, mixed_sum
from fastnas.reference import SkipNoise
from fastnas.reference.arguments import check_floating, check_shape

CHOICE_MEMORY = ("eager", "lean", "recompute", "minimal")
CANDIDATE = "Choice: candidate"
_IDENTITIES = (nn.Identity, primitives.Identity)
"""They return x itself, which is there in any case."""


class Choice(Logits):
    """Computes y = sum_k w_k o_k(x) over any candidates o_k, or w_k o_k(x) of a sampled one.

    Candidates are any modules that take the same arguments and return one tensor each, all of one
    shape and dtype: blocks, layers of a graph network, transformer blocks. Candidates of DARTS run
    fused once `fastnas.accelerate` has seen the network; the others go by `memory`.

    `mixing` says where w comes from, with logits alpha [K] of the module's own (`logits`)::

        None        w [K], or a sampled candidate (`Paths`), is given in each call
        "softmax"   w = softmax(alpha)                                       (DARTS)
        "sigmoid"   w_k = sigmoid(alpha_k)                                   (FairDARTS)
        "gdas"      w = 1 + At_k - sg(At_k) at k = argmax (alpha + g),
                    At = softmax((log softmax(alpha) + g) / tau), g ~ Gumbel (GDAS)

    Of "gdas" the sampled candidate alone runs; the parameters of the others get no gradient (None).
    In evaluation mode that is the most probable candidate, of weight 1.

    `memory` says what is kept for backward; results and gradients are those of eager's to rounding,
    running statistics move once, random numbers are the same::

        "eager"      what each candidate keeps, and its output
        "lean"       the same, but for candidates that end in a batch norm without scale and shift:
                     that is part of the sum (`mixed_norm_sum`), which reads its input alone
        "recompute"  what the last candidate keeps, and the arguments; backward frees that, and
                     runs the others a second time, one after the other
        "minimal"    the arguments: backward runs every candidate a second time

    At its peak, in backward, either of the last two holds what the largest candidate keeps. Of many
    choices in a network "recompute" holds one candidate each after forward, "minimal" none.

    What runs twice calls its forward hooks twice; it may not depend on what it changes besides
    buffers, nor on generators other than torch's. x and its parameters may not be changed in place
    before backward, which raises then. What eager refuses to differentiate, as it overwrites what
    it saved, is not noticed. Under `torch.func` nothing runs twice.

    Sources: Liu et al., ICLR 2019 (DARTS), eq. 2; Chu et al., ECCV 2020 (FairDARTS); Dong and Yang,
    CVPR 2019 (GDAS); Chu et al., arXiv 2005.03566 (NoisyDARTS); Chen et al., arXiv 1604.06174
    (recomputation).

    Args:
        candidates: modules by name, or in a sequence (then they are called "0", "1", ...).
        mixing: as above.
        memory: as above.
        noise: by candidate's name what is added to, or multiplied with, its output in training, on
            all elements, drawn anew in each call; `noise_amplitude` scales it.
        tau: temperature of "gdas", 1 by default; may be set later.
        logits: [K], such as a Parameter that several of these share; by default a Parameter of its
            own, 1e-3 N(0, 1), of "sigmoid" 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; in a call
            also where two candidates return different shapes or dtypes.
        RuntimeError: in backward, where what it runs again was changed since.
    """

    mixings = ("softmax", "sigmoid", "gdas")
    sampled = ("gdas",)

    def __init__(
        self,
        candidates: Sequence[nn.Module] | Mapping[str, nn.Module],
        *,
        mixing: str | None = None,
        memory: str = "lean",
        noise: Mapping[str, SkipNoise] | None = None,
        tau: float | Tensor | None = None,
        logits: nn.Parameter | None = None,
    ) -> None:
        named = _named(candidates)
        super().__init__("Choice", len(named), mixing, tau, logits)
        self.candidates = nn.ModuleDict(named)
        self.memory = memory
        self.noise = checked_noise(noise, list(named), "Choice: ")
        self.noise_amplitude = 1.0

    @property
    def memory(self) -> str:
        """Returns what is kept for backward: "eager", "lean", "recompute" or "minimal"."""
        return self._memory

    @memory.setter
    def memory(self, value: str) -> None:
        check_choice("Choice: memory", value, CHOICE_MEMORY)
        self._memory = value

    @property
    def names(self) -> list[str]:
        """Returns the names of the candidates."""
        return list(self.candidates)

    def extra_repr(self) -> str:
        tau = f", tau={self.tau}" if self.mixing in self.sampled else ""
        noisy = f", noise on {', '.join(self.noise)}" if self.noise else ""
        return f"mixing={self.mixing!r}, memory={self.memory!r}{tau}{noisy}"

    def weights(self) -> CellWeights:
        """Returns what a call would mix by: w [K], or the candidate drawn by "gdas" (`Paths`)."""
        alpha = self.own_logits()
        if self.mixing == "softmax":
            return alpha.softmax(-1)
        if self.mixing == "sigmoid":
            return alpha.sigmoid()
        if self.training:
            sample = self.drawn(self.drawable()[None], nodes=(1,))
            return Paths(sample.op[0, 0], sample.weight[0, 0])
        return Paths(alpha.detach().argmax(), alpha.new_ones(()))

    def best(self) -> tuple[str, nn.Module]:
        """Returns name and module of the candidate with the largest logit, the first of equals.

        Raises:
            ValueError: there are no logits, or one is not finite.
        """
        name = self.names[self.largest_logits(1)[0]]
        return name, self.candidates[name]

    def forward(self, *args: Any, w: CellWeights | None = None, **kwargs: Any) -> Tensor:
        """Mixes the candidates' outputs on the other arguments, which are passed on as they are.

        Args:
            w: weights [K], or `Paths` of one edge and one path. Without a `mixing` it may also
                come last among the positional arguments, as in `choice(x, w)`; with one it takes
                the place of the logits in this call.
        """
        if w is None and self.mixing is None:
            if not args:
                raise TypeError("Choice: no w is given and mixing is None; call it as (x, w)")
            *rest, w = args
            args = tuple(rest)
            if not (args or kwargs):  # the one argument was no weights, but what they weigh
                raise TypeError(
                    "Choice: mixing is None, so that weights are needed: choice(x, w=w), or a"
                    ' choice with logits of its own, Choice(candidates, mixing="softmax")'
                )
        w = self.weights() if w is None else w
        if not isinstance(w, Paths):
            self._check_weights(w, args, kwargs)
            return self._mix(self.names, w, args, kwargs)
        k = self._checked_choice(w, args, kwargs)
        y = self._mix([self.names[k]], w.weight[None], args, kwargs)
        return add_siblings(y, w.weight[None], [k]) if w.siblings else y

    def _check_weights(self, w: object, args: Any, kwargs: Any) -> None:
        if not isinstance(w, Tensor):
            needed = "a Tensor or Paths is needed (call it as choice(x, w), or w=)"
            raise TypeError(f"Choice: w is {short(w)}; {needed}")
        check_floating("Choice: w", w)
        check_shape("Choice: w", w, [len(self.candidates)])
        _check_device(w, args, kwargs)

    def _checked_choice(self, w: Paths, args: Any, kwargs: Any) -> int:
        for name in ("choice", "weight"):
            check_type(f"Choice: w.{name}", getattr(w, name), Tensor)
        check_paths("Choice: w", w.as_edge(), 1)
        if w.choice.dim():
            raise ValueError(
                f"Choice: w.choice has shape {list(w.choice.shape)}; one path, [], is needed"
            )
        _check_device(w.weight, args, kwargs)
        k, last = int(w.choice), len(self.candidates) - 1
        if not 0 <= k <= last:
            raise ValueError(f"Choice: w.choice is {k}; 0 to {last} is allowed")
        return k

    def _mix(
        self, names: Sequence[str], w: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Adds the candidates of these names, each times its own of the weights."""
        total, at_once = Total(CANDIDATE), AtOnce()
        drawn, weights = self._drawn(names, w.device), w.unbind()
        twice = self._run_twice(names)
        # All of them run in order, as the random numbers of one follow those of another.
        for i, name in enumerate(names):
            op = self.candidates[name]
            may_fold = self.memory == "lean" and name not in drawn
            norm = _final_norm(op, args, kwargs) if may_fold else None
            z = None if norm is None else run_to_norm(op, *args)
            if norm is not None and z is args[0]:
                # A candidate that comes later may overwrite its argument.
                term = _weighed(norm(z), name, weights[i])
                total.check(name, term)
                total.put(term)
            elif norm is not None:
                total.check(name, z)
                at_once.add(i, as_value(z), norm)
            else:
                replays = name in twice
                term = self._term(name, weights[i], drawn.get(name), args, kwargs, replays)
                total.check(name, term)
                total.put(term)
        if at_once.z:
            total.put(at_once.sum(select(w, at_once.index), self.training))
        return total.sum()

    def _run_twice(self, names: Sequence[str]) -> list[str]:
        """Returns the names of the candidates that backward runs again."""
        is_dialled = self.memory in ("recompute", "minimal")
        if not is_dialled or not torch.is_grad_enabled() or is_transformed():
            return []
        found = [name for name in names if _keeps(self.candidates[name])]
        # Backward comes to the last one first, and has freed it when it runs another.
        return found if self.memory == "minimal" else found[:-1]

    def _term(
        self,
        name: str,
        w: Tensor,
        drawn: _Drawn | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        twice: bool,
    ) -> Tensor:
        """Returns w_k o_k(x), noise included."""
        op = self.candidates[name]
        if not twice:
            return _weighed(op(*args, **kwargs), name, w, *(drawn or ()))
        who = f"{CANDIDATE} {name!r}"
        return recomputed(_weighed, op, who, args, kwargs, name, w, *(drawn or ()))

    def _drawn(self, names: Sequence[str], device: torch.device) -> dict[str, _Drawn]:
        """Draws the streams of those that carry noise: all at once, in whatever order they run."""
        noisy = [name for name in names if name in self.noise] if self.training else []
        streams = draw_noise(len(noisy), device) if noisy else ()
        return {
            name: _Drawn(noise, noise.level(self.noise_amplitude, device), rng)
            for name, noise, rng in zip(noisy, map(self.noise.__getitem__, noisy), streams)
        }


class _Drawn(NamedTuple):
    """Holds what the noise of one candidate is drawn from."""

    noise: SkipNoise
    level: Tensor
    rng: Tensor


def _keeps(op: nn.Module) -> bool:
    """Tells whether a candidate keeps something for backward that a second run would spare."""
    # The output of what is fused waits for the others.
    return not (is_fused(op) or (type(op) in _IDENTITIES and is_plain(op)))


def _weighed(o: Any, name: str, w: Tensor, *drawn: Any) -> Tensor:
    """Returns w o, or w v(o) where noise is drawn."""
    if not isinstance(o, Tensor):
        kind = type(o).__name__
        raise TypeError(f"{CANDIDATE} {name!r} returns a {kind}; one Tensor is needed")
    if not drawn:
        return w * o
    noise, level, rng = drawn
    return mixed_sum([as_value(o)], w[None], noise=noise, noisy=[0], level=level, rng=rng)


def _check_device(w: Tensor, args: Any, kwargs: Any) -> None:
    devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    if devices and w.device not in devices:
        there = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"Choice: w is on {w.device}, its other arguments on {there}")


def _final_norm(op: nn.Module, args: tuple[Any, ...], kwargs: Any) -> nn.BatchNorm2d | None:
    """Returns the batch norm of a candidate that the sum can do, in a call with one argument."""
    one = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
    return final_norm(op) if one and runs_in_order(op) else None


def _named(candidates: Any) -> dict[str, nn.Module]:
    """Checks the candidates, and returns them by name."""
    if isinstance(candidates, Mapping | nn.ModuleDict):
        named = dict(candidates.items())
    elif isinstance(candidates, list | tuple | nn.ModuleList):
        named = {str(k): op for k, op in enumerate(candidates)}
    else:
        raise TypeError(
            f"Choice: candidates is a {type(candidates).__name__}; modules in a list, a tuple or a"
            " dict are needed"
        )
    if not named:
        raise ValueError("Choice: candidates is empty; at least one module is needed")
    for name, op in named.items():
        check_type(f"Choice: candidates[{short(name)}]", op, nn.Module)
        # A name becomes part of the names of parameters, and an attribute of a ModuleDict.
        wrong = not isinstance(name, str) or not name or "." in name
        if wrong or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"Choice: candidates has the name {short(name)}; a text without dots is needed, and"
                " none that is an attribute of every ModuleDict"
            )
    return named


def checked_noise(noise: Any, names: Iterable[str], who: str = "") -> dict[str, SkipNoise]:
    """Returns the noise by candidate's name; refuses names of no candidate and what is no noise.

    Args:
        who: what errors begin with.
    """
    if noise is None:
        return {}
    check_type(f"{who}noise", noise, Mapping)
    for name, kind in noise.items():
        check_choice(f"{who}a name in noise", name, names)
        check_type(f"{who}noise[{name!r}]", kind, SkipNoise)
    return dict(noise)
