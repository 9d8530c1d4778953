"""Runs a forward once on tensors without values, and reads what it did with its candidates."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnas.dropin.deferred import DeferredSum
from fastnas.dropin.modes import Modes, autocast_now
from fastnas.dropin.pending import Manner
from fastnas.dropin.sums import Sum
from fastnas.dropin.tape import Argument, Entry, NoPlan, Own, Tape, Vector
from fastnas.dropin.waiting import Channels, Moved, Waiting, layout_of
from fastnas.nn.parts import Candidate

if TYPE_CHECKING:
    from fastnas.dropin.candidates import Settings


class Applied(NamedTuple):
    """Names a function of torch, and its arguments after the first."""

    function: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class Origin(NamedTuple):
    """Names an argument of the forward, [N, C, H, W], or some of its channels, or what is made."""

    argument: int
    channels: Channels | None
    applied: Applied | None = None


class PlannedCall(NamedTuple):
    """Says which candidate reads what: part of an argument, or a sum by its number."""

    module: nn.Module
    settings: Settings
    candidate: Candidate
    source: Origin | int
    manner: Manner


class PlannedSum(NamedTuple):
    """Lists the terms of a sum: the weight of each, None for 1, and the number of its call."""

    terms: tuple[tuple[Entry | float | None, int], ...]
    size: torch.Size
    is_new: bool

    @property
    def weights(self) -> set[int]:
        """Returns the numbers of the vectors that hold its weights."""
        return {w.vector for w, _ in self.terms if isinstance(w, Entry)}


class Program(NamedTuple):
    """Says what a forward does with its arguments.

    Args:
        calls: in their order.
        sums: each after those that its candidates read.
        blocks: what it returns, one after the other along the channels: numbers of sums, or parts
            of arguments.
        layout, moves, like: as `Waiting` takes them.
        vectors: its weights.
        origins: the parts of arguments that are read.
    """

    calls: tuple[PlannedCall, ...]
    sums: tuple[PlannedSum, ...]
    blocks: tuple[Origin | int, ...]
    layout: torch.memory_format
    moves: tuple[Moved, ...]
    like: Tensor | None
    vectors: tuple[Vector, ...]
    origins: tuple[Origin, ...]
    read: frozenset[Origin | int]
    """Those that candidates read."""
    readers: tuple[int | None, ...]
    """How many candidates read each sum, None where it is returned as well."""
    checked: tuple[PlannedCall, ...]
    """Calls that stand for all others when the fused ops are asked whether they can serve them."""

    @classmethod
    def of(
        cls,
        calls: Sequence[PlannedCall],
        sums: Sequence[PlannedSum],
        blocks: Sequence[Origin | int],
        y: Waiting,
        vectors: Sequence[Vector],
    ) -> Program:
        """Returns the program whose output y is, without values."""
        read = (*(call.source for call in calls), *blocks)
        origins = [one for one in dict.fromkeys(read) if isinstance(one, Origin)]
        checked = {
            (call.source, bool(call.candidate.convs), call.candidate.is_dense): call
            for call in calls
            if isinstance(call.source, Origin)
        }
        count = Counter(call.source for call in calls)
        return cls(
            tuple(calls), tuple(sums), tuple(blocks), y.format, y._moves, y._like, tuple(vectors),
            tuple(origins), frozenset(count),
            tuple(None if i in blocks else count[i] for i in range(len(sums))),
            tuple(checked.values()),
        )  # fmt: skip


class Rehearsed:
    """Takes the place of `pending.Call` for a candidate that is called without values."""

    depth: int

    def __init__(
        self, number: int, candidate: Candidate, source: Tensor | Sum, dtype: torch.dtype
    ) -> None:
        self.number, self.candidate, self.source, self.dtype = number, candidate, source, dtype
        self.device = source.device
        self.depth = 0 if isinstance(source, Tensor) else source.depth


_FUNCTIONS = ("max_pool2d", "avg_pool2d")
"""Names of functions that may be applied to channels which no candidate reads."""
_OF_IMAGES = frozenset(
    ("__getitem__", "data", "cat", "concat", "concatenate", "add", "mul", "sub", "div", "view",
     "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", *_FUNCTIONS)
)  # fmt: skip
"""Names of functions that change nothing of an image; its shape is asked without one."""


class Image(DeferredSum):
    """Stands for an image without values that is an argument, or for some of its channels."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        # Anything else may change what the image is: hooks, attributes, values in place.
        if name not in _OF_IMAGES:
            raise NoPlan(f"{name} of an image")
        y = DeferredSum.__torch_function__(func, types, args, kwargs)
        rehearsal = rehearsal_now()
        if rehearsal is not None and name in _FUNCTIONS:
            rehearsal.note(Applied(func, args[1:], tuple((kwargs or {}).items())), args[0], y)
        return y


class _Stage(threading.local):
    rehearsal: Rehearsal | None = None


_STAGE = _Stage()
"""Holds the rehearsal that runs, whose candidates are not to be called."""


def rehearsal_now() -> Rehearsal | None:
    """Returns the rehearsal that runs, or None."""
    return _STAGE.rehearsal


def _generators() -> list[tuple[torch.Generator, Tensor]]:
    """Lists torch's own generators, with the state of each."""
    on_gpu = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [(g, g.get_state()) for g in (torch.default_generator, *on_gpu)]


class Rehearsal:
    """Runs the own forward of a module on arguments without values.

    Args:
        args, kwargs: its arguments; tensors [N, C, H, W] are images, others mixing weights.
        own: modules whose tensors may be mixing weights, too.
    """

    def __init__(
        self, args: Sequence[Any], kwargs: dict[str, Any], own: Sequence[nn.Module]
    ) -> None:
        given = [*args, *kwargs.values()]
        images = [v for v in given if isinstance(v, Tensor) and v.dim() == 4]
        self.own, self.device = own, images[0].device
        self.autocast = autocast_now(self.device)
        self.tape, self.refused = Tape(), ""
        self.calls: list[PlannedCall] = []
        self.images: dict[int, tuple[Image, Tensor, Sum]] = {}
        self._given: dict[int, Tensor] = {}
        self._containers: list[tuple[Any, Any]] = []
        """Those that modules hold, and what was in them."""
        held = [self._without_values(i, value) for i, value in enumerate(given)]
        self.args, self.kwargs = held[: len(args)], dict(zip(kwargs, held[len(args) :]))
        self.made: list[tuple[Tensor, Origin]] = []
        """What functions of torch made of parts of images."""
        self._numbers: dict[Sum, int] = {}
        self._sums: list[PlannedSum] = []

    def _without_values(self, i: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._given:  # a forward may ask whether two arguments are the same
            return self._given[id(value)]
        self._given[id(value)] = self._argument(i, value)
        return self._given[id(value)]

    def _argument(self, i: int, value: Tensor) -> Tensor:
        if not value.dtype.is_floating_point:
            self.refused = f"argument {i} is {value.dtype}"
            return value
        if value.dim() != 4:
            return self.tape.add(Argument(i), value)
        layout = layout_of(value)
        y = torch.empty(value.shape, dtype=value.dtype, device="meta")
        y = y.contiguous(memory_format=layout)
        image = Image.of(y, layout)
        self.images[i] = image, y, image._blocks[0]
        return image

    def run(self, module: nn.Module) -> Program:
        """Returns what the forward of the module did.

        Raises:
            NoPlan: what it does cannot be said in these terms, or depends on values.
        """
        if self.refused:
            raise NoPlan(self.refused)
        before = _generators()
        _STAGE.rehearsal = self
        try:
            with torch.enable_grad():
                y = type(module).forward(self._double(module), *self.args, **self.kwargs)
                program = self._read(y)
        except NoPlan:
            raise
        except Exception as error:  # of a tensor without values; eager says what is an error
            raise NoPlan(f"{type(error).__name__}: {error}") from error
        finally:
            _STAGE.rehearsal = None
            drawn = [g for g, state in before if not torch.equal(g.get_state(), state)]
            for generator, state in before:
                generator.set_state(state)
        if drawn:
            raise NoPlan("it draws random numbers")
        return program

    def _double(self, module: nn.Module) -> nn.Module:
        """Returns a module like this one and its parts, whose tensors have no values.

        Its own ones may be weights; nothing reads those of candidates, which are not run: their
        doubles have the forwards of the originals. Nothing is done to the module itself, which
        another thread may be running.
        """
        doubles: dict[nn.Module, nn.Module] = {
            part: object.__new__(type(part)) for part in module.modules()
        }

        for part, double in doubles.items():
            held = {name: self._doubled(value, doubles) for name, value in vars(part).items()}
            for name in ("_parameters", "_buffers"):
                held[name] = self._without(vars(part)[name], part in self.own)
            vars(double).update(held)
        return doubles[module]

    def _doubled(self, value: Any, doubles: Mapping[nn.Module, nn.Module]) -> Any:
        """Returns what a double holds: containers of its own, with doubles in them."""
        if isinstance(value, nn.Module):
            return doubles.get(value, value)
        kind = type(value)
        if kind not in (list, tuple, dict, set):
            return value
        if kind is dict:
            made = {key: self._doubled(item, doubles) for key, item in value.items()}
        else:
            made = kind([self._doubled(item, doubles) for item in value])
        if kind is not tuple:
            self._containers.append((made, made.copy()))
        return made

    def _without(self, tensors: dict[str, Tensor | None], own: bool) -> dict[str, Tensor | None]:
        """Returns tensors of a module without their values."""
        made: dict[str, Tensor | None] = {}
        for name, t in tensors.items():
            if t is None or not own:
                made[name] = None if t is None else torch.empty_like(t, device="meta")
            elif t.dtype.is_floating_point:
                made[name] = self.tape.add(Own(tensors, name), t)
            else:
                raise NoPlan(f"{name} is {t.dtype}")
        return made

    # ---- while the forward runs

    def call(self, planned: PlannedCall, given: Any) -> DeferredSum:
        """Returns the output of a candidate, without values, and keeps what it reads."""
        candidate = planned.candidate
        if not isinstance(given, DeferredSum):
            raise NoPlan(f"{candidate.name} reads what is no argument")
        x = given.source()
        channels = candidate.convs[0].in_channels if candidate.convs else x.shape[1]
        if x.dim() != 4 or channels != x.shape[1]:
            raise NoPlan(f"{candidate.name} reads {list(x.shape)}")
        rows, cols = (-(-size // candidate.stride) for size in x.shape[2:])
        if x.shape[0] * rows * cols <= 1:
            raise NoPlan("one value per channel")
        dtype = x.dtype if self.autocast is None or not candidate.convs else self.autocast
        made = Rehearsed(len(self.calls), candidate, x, dtype)
        source = self._number(x) if isinstance(x, Sum) else self._origin(given)
        self.calls.append(planned._replace(source=source))
        size = torch.Size((*x.shape[:2], rows, cols))
        is_skip = candidate.name == "skip_connect" and candidate.stride == 1
        block = Sum([(None, made)], (), size, Modes.now())  # type: ignore[list-item]
        return DeferredSum([block], given.format, base=(given, None) if is_skip else None)

    def note(self, applied: Applied, given: Any, y: Tensor) -> None:
        """Keeps which function was applied to part of an image."""
        rest = (*applied.args, *(value for _, value in applied.kwargs))
        if isinstance(given, Image) and not any(isinstance(v, Tensor | list) for v in rest):
            self.made.append((y, self._origin(given)._replace(applied=applied)))

    # ---- afterwards

    def _origin(self, given: Waiting) -> Origin:
        """Returns which argument, or part of one, this is."""
        channels: Channels | None = None
        while given._part_of is not None:
            given, part = given._part_of
            if part is not None:
                first = channels or Channels(0, part.stop - part.start)
                channels = Channels(part.start + first.start, part.start + first.stop)
        for i, (image, y, block) in self.images.items():
            if given is image and given._blocks == (block,) and y._version == 0:
                return Origin(i, channels)
        raise NoPlan("a candidate reads what is no argument")

    def _block(self, block: Sum) -> Origin | int:
        if block.terms:
            return self._number(block)
        for i, (image, _, own) in self.images.items():
            if block is own:
                return Origin(i, None)
            for channels, (_, _, part) in image._slices.items():
                if block is part:
                    return Origin(i, channels)
        for y, origin in self.made:
            if block.is_computed and block.dense[0] is y:
                return origin
        raise NoPlan("it returns what is no argument")

    def _number(self, node: Sum) -> int:
        """Returns the number of a sum, which is planned with all that it reads."""
        if node in self._numbers:
            return self._numbers[node]
        if node.dense or not node.modes.grad or node.modes.hooks != Modes.now().hooks:
            raise NoPlan("a sum has other terms, or was made in another mode")
        terms = tuple(
            (self._weight(w), call.number)  # type: ignore[attr-defined]
            for w, call in node.terms
        )
        self._sums.append(PlannedSum(terms, node.size, node.is_new))
        self._numbers[node] = len(self._sums) - 1
        return self._numbers[node]

    def _weight(self, w: Any) -> Entry | float | None:
        if isinstance(w, Tensor):
            return self.tape.entry(w)
        return w if w is None else float(w)

    def _read(self, y: Any) -> Program:
        if not isinstance(y, DeferredSum) or y._part_of is not None or not y._stays():
            raise NoPlan(f"it returns a {type(y).__name__} that is no sum")
        if any(y is image for image, _, _ in self.images.values()):
            raise NoPlan("it returns its argument itself")
        blocks = tuple(self._block(block) for block in y._blocks)
        used = {number for one in self._sums for _, number in one.terms}
        if len(used) < len(self.calls):
            raise NoPlan("the output of a candidate is not used")
        for image, x, block in self.images.values():
            if x._version or image._blocks != (block,):
                raise NoPlan("it changes an argument")
        if any(now != then for now, then in self._containers):
            raise NoPlan("it changes what a module holds")
        self.tape.check()
        return Program.of(self.calls, self._sums, blocks, y, self.tape.vectors)
