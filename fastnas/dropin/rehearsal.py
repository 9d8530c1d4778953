"""Runs a forward once on tensors without values, and reads what it did with its candidates."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnas.dropin.deferred import DeferredSum
from fastnas.dropin.modes import Modes
from fastnas.dropin.pending import Manner
from fastnas.dropin.sums import Sum
from fastnas.dropin.waiting import Channels, Moved, Waiting, layout_of
from fastnas.nn.parts import Candidate

if TYPE_CHECKING:
    from fastnas.dropin.candidates import Settings


class NoPlan(Exception):
    """Says why what a forward did cannot be done without it."""


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


class Entry(NamedTuple):
    """Names an element of an argument that holds mixing weights, counted row by row."""

    argument: int
    place: int


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
        """Returns which arguments hold its weights."""
        return {w.argument for w, _ in self.terms if isinstance(w, Entry)}


class Program(NamedTuple):
    """Says what a forward does with its arguments.

    Args:
        calls: in their order.
        sums: each after those that its candidates read.
        blocks: what it returns, one after the other along the channels: numbers of sums, or parts
            of arguments.
        layout, moves, like: as `Waiting` takes them.
        origins: the parts of arguments that are read.
    """

    calls: tuple[PlannedCall, ...]
    sums: tuple[PlannedSum, ...]
    blocks: tuple[Origin | int, ...]
    layout: torch.memory_format
    moves: tuple[Moved, ...]
    like: Tensor | None

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
    ) -> Program:
        """Returns the program whose output y is, without values."""
        read = (*(call.source for call in calls), *blocks)
        origins = [one for one in dict.fromkeys(read) if isinstance(one, Origin)]
        checked = {
            (call.source, bool(call.candidate.convs), call.candidate.is_dense): call
            for call in calls
            if isinstance(call.source, Origin)
        }
        parts = tuple(calls), tuple(sums), tuple(blocks)
        shape = y.format, y._moves, y._like
        inputs = frozenset(call.source for call in calls)
        count = Counter(call.source for call in calls)
        readers = tuple(None if i in blocks else count[i] for i in range(len(sums)))
        return cls(*parts, *shape, tuple(origins), inputs, readers, tuple(checked.values()))


class Rehearsed:
    """Takes the place of `pending.Call` for a candidate that is called without values."""

    depth: int

    def __init__(
        self, number: int, candidate: Candidate, source: Tensor | Sum, dtype: torch.dtype
    ) -> None:
        self.number, self.candidate, self.source, self.dtype = number, candidate, source, dtype
        self.device = source.device
        self.depth = 0 if isinstance(source, Tensor) else source.depth


class Weights(Tensor):
    """Holds mixing weights without values, of which is only known which are 0."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rehearsal = rehearsal_now()
        compares = getattr(func, "__name__", "").strip("_") in ("ne", "eq") and len(args) == 2
        if rehearsal is not None and compares and isinstance(args[1], int | float):
            with torch._C.DisableTorchFunctionSubclass():
                zeros = rehearsal.zeros_of(args[0], args[1])
            if zeros is not None:
                return zeros if func.__name__.strip("_") == "eq" else ~zeros
        return super().__torch_function__(func, types, args, kwargs or {})


_FUNCTIONS = ("max_pool2d", "avg_pool2d")
"""Names of functions that may be applied to channels which no candidate reads."""


class Image(DeferredSum):
    """Stands for an image without values that is an argument, or for some of its channels."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        y = DeferredSum.__torch_function__(func, types, args, kwargs)
        rehearsal = rehearsal_now()
        if rehearsal is not None and getattr(func, "__name__", "") in _FUNCTIONS:
            rehearsal.note(Applied(func, args[1:], tuple((kwargs or {}).items())), args[0], y)
        return y


class _Stage(threading.local):
    rehearsal: Rehearsal | None = None


_STAGE = _Stage()
"""Holds the rehearsal that runs, whose candidates are not to be called."""


def rehearsal_now() -> Rehearsal | None:
    """Returns the rehearsal that runs, or None."""
    return _STAGE.rehearsal


class Rehearsal:
    """Runs the own forward of a module on arguments without values.

    Args:
        args, kwargs: its arguments; tensors [N, C, H, W] are images, others mixing weights.
        device: where they are.
        autocast: the dtype of autocast there, or None.
    """

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.device, self.autocast, self.looked_at_zeros = device, autocast, False
        self.refused = ""
        self.calls: list[PlannedCall] = []
        self.zeros: dict[int, Tensor] = {}
        self.images: dict[int, tuple[Image, Tensor, Sum]] = {}
        self.weights: dict[int, Tensor] = {}
        self.arguments: dict[int, int] = {}
        """By their storages: weights, which of them are 0, and which arguments they are."""
        given = [*args, *kwargs.values()]
        held = [self._without_values(i, value) for i, value in enumerate(given)]
        self.args, self.kwargs = held[: len(args)], dict(zip(kwargs, held[len(args) :]))
        self.made: list[tuple[Tensor, Origin]] = []
        """What functions of torch made of parts of images."""
        self._numbers: dict[Sum, int] = {}
        self._sums: list[PlannedSum] = []

    def _without_values(self, i: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.dtype.is_floating_point:
            self.refused = f"argument {i} is {value.dtype}"
            return value
        if value.dim() != 4:
            meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
            w = meta.as_subclass(Weights).requires_grad_()
            key = w.untyped_storage()._cdata
            self.weights[key], self.arguments[key] = w, i
            self.zeros[key] = (value.detach() == 0).contiguous()
            return w
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
        before = torch.get_rng_state()
        _STAGE.rehearsal = self
        try:
            with torch.enable_grad():
                y = type(module).forward(module, *self.args, **self.kwargs)
                program = self._read(y)
        except NoPlan:
            raise
        except Exception as error:  # of a tensor without values; eager says what is an error
            raise NoPlan(f"{type(error).__name__}: {error}") from error
        finally:
            _STAGE.rehearsal = None
            drawn = not torch.equal(before, torch.get_rng_state())
            if drawn:
                torch.set_rng_state(before)
        if drawn:
            raise NoPlan("it draws random numbers")
        return program

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

    def zeros_of(self, w: Tensor, other: float) -> Tensor | None:
        """Returns which of some weights are 0, if that is what they are compared with."""
        zeros = self.zeros.get(w.untyped_storage()._cdata)
        if zeros is None or other != 0:
            return None
        self.looked_at_zeros = True
        return zeros.as_strided(w.size(), w.stride(), w.storage_offset())

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
        if not isinstance(w, Tensor):
            return w if w is None else float(w)
        with torch._C.DisableTorchFunctionSubclass():
            key = w.untyped_storage()._cdata
            known = self.weights.get(key)
            # A view that has lost its gradient, or another dtype, is not the argument's element.
            if known is None or not w.requires_grad or w.dtype != known.dtype or w._version:
                raise NoPlan("a weight is no element of an argument")
            if w is not known and (w._base is None or w._base.untyped_storage()._cdata != key):
                raise NoPlan("a weight is no view of an argument")
            return Entry(self.arguments[key], int(w.storage_offset()))

    def _read(self, y: Any) -> Program:
        if not isinstance(y, DeferredSum) or y._part_of is not None or not y._stays():
            raise NoPlan(f"it returns a {type(y).__name__} that is no sum")
        blocks = tuple(self._block(block) for block in y._blocks)
        used = {number for one in self._sums for _, number in one.terms}
        if len(used) < len(self.calls):
            raise NoPlan("the output of a candidate is not used")
        for image, x, block in self.images.values():
            if x._version or image._blocks != (block,):
                raise NoPlan("it changes an argument")
        return Program.of(self.calls, self._sums, blocks, y)
