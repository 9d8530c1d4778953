"""Holds what a sum that waits stands for, and computes it when its values are needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastnas.backends.layout import state_format
from fastnas.dropin.modes import Modes, is_function_forward, version
from fastnas.dropin.pending import Call
from fastnas.dropin.sums import Sum, joined

CLONE = "give it `output.clone()`"
DEEPEST = 32
"""How many sums may wait behind each other: more than a cell has nodes, and no deep recursion."""
Self = TypeVar("Self", bound="Waiting")  # typing has it from Python 3.11 on


class Channels(NamedTuple):
    """Names the channels start to stop, without it, of [N, C, H, W]."""

    start: int
    stop: int

    def of(self, y: Tensor) -> Tensor:
        return y[:, self.start : self.stop]


class Moved(NamedTuple):
    """Names a function of torch that gives a tensor another shape or order, and its arguments."""

    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, y: Tensor) -> Tensor:
        moved: Tensor = getattr(y, self.name)(*self.args, **dict(self.kwargs))
        return moved


def format_of(y: Tensor) -> torch.memory_format:
    """Returns the memory format that the modules of torch keep for what they make of a tensor."""
    # A slice of channels is contiguous in no format, but keeps its strides' order.
    last = y.dim() == 4 and y.stride(1) == 1 and not y.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def layout_of(y: Tensor) -> torch.memory_format:
    """Returns the same of one that may wait, as others see it."""
    return y.format if isinstance(y, Waiting) else format_of(y)


class Standing(Tensor):
    """Stands for a tensor whose values are computed when they are needed."""

    _size: torch.Size
    _dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Returns the values."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Autograd has been passed by now, so that a result would have lost its gradient.
        raise RuntimeError(f"fastnas: {func} was called past the output of a candidate; {CLONE}")

    # ---- what is known of it without its values

    shape = property(lambda self: self._size)
    ndim = property(lambda self: len(self._size))
    dtype = property(lambda self: self._dtype)

    def size(self, dim: int | None = None) -> Any:
        return self._size if dim is None else self._size[dim]

    def dim(self) -> int:
        return len(self._size)


class Waiting(Standing):
    """Stands for sums of candidates, computed once, when something needs the values.

    Others see them lie in memory as those of the module's own forward do: random numbers that are
    drawn like them fall on the same elements.

    Args:
        blocks: sums [N, C_b, H, W], one after the other along the channels.
        layout: the memory format in which others see it.
        moves: what was done to the order of the elements since.
        like: a tensor of the meta device that lies in memory as others see it, after the moves.
        base: what it is a part of, and which; None where it is all of it.
    """

    _blocks: tuple[Sum, ...]
    _moves: tuple[Moved, ...]
    _size: torch.Size
    _format: torch.memory_format
    _dtype: torch.dtype
    _like: Tensor | None
    _part_of: tuple[Waiting, Channels | None] | None
    _part_of_blocks: tuple[Sum, ...] | None
    """What the base stood for at first."""
    _seen: Tensor | None
    """The values as others see them."""
    _seen_version: int
    _slices: dict[Channels, tuple[Tensor, int, Sum]]
    """Parts of it, with the values and their version that each was taken from."""
    _in_sum: bool
    """Whether it has become part of another sum, which does not pass through its tensor."""
    _is_base: bool
    """Whether something is a part of it."""
    _is_identity: bool
    """Whether it is the input of an identity, a tensor."""
    _is_shared: bool
    """Whether somebody else has the memory that others see, and sees changes in it."""

    @staticmethod
    def __new__(
        cls: type[Self],
        blocks: Sequence[Sum],
        layout: torch.memory_format,
        moves: tuple[Moved, ...] = (),
        like: Tensor | None = None,
        base: tuple[Waiting, Channels | None] | None = None,
    ) -> Self:
        size, dtype = blocks[0].size, blocks[0].dtype
        if len(blocks) > 1:
            N, _, *image = size
            size = torch.Size((N, sum(block.size[1] for block in blocks), *image))
            dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
        if like is not None:
            size = like.shape
        # A tensor without values: whatever is done with it comes to `__torch_function__` first.
        self = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=blocks[0].device)
        self._blocks, self._moves, self._like, self._part_of = tuple(blocks), moves, like, base
        self._size, self._format, self._dtype = size, layout, dtype
        self._seen, self._slices = None, {}
        self._in_sum = self._is_base = self._is_identity = self._is_shared = False
        self._part_of_blocks = None if base is None else base[0]._blocks
        if base is not None:
            base[0]._is_base = True
        return self

    @classmethod
    def of(cls: type[Self], y: Tensor, layout: torch.memory_format) -> Self:
        """Returns one whose values these are; others see them in the layout."""
        return cls([Sum.of(y)], layout)

    def is_input(self, x: Tensor) -> None:
        """Makes it what an identity returns: its input itself."""
        self._seen, self._seen_version = x, version(x)
        self._is_identity = self._is_shared = True

    # ---- its values

    def computed(self) -> Tensor:
        """Returns the values, in the layout in which the fused ops left them."""
        self._follow()
        if self._is_joined():
            for block in self._blocks:
                block.check()
            with self._modes.restored():
                self._blocks = (Sum.of(self._joined(), self._modes),)
            self._moves = ()
        return self._blocks[0].computed()

    def _joined(self) -> Tensor:
        if not self._moves:
            return joined(self._blocks)
        parts = [block.computed() for block in self._blocks]
        y = torch.cat([part.contiguous(memory_format=self._format) for part in parts], dim=1)
        for move in self._moves:
            y = move(y)
        return y

    def _is_joined(self) -> bool:
        return len(self._blocks) > 1 or bool(self._moves)

    @property
    def _modes(self) -> Modes:
        """Returns those under which it was made."""
        return self._blocks[0].modes

    def _follow(self) -> None:
        """Takes over what others have done, in place, to the values that they see."""
        if self._seen is not None and version(self._seen) != self._seen_version:
            self._show(self._seen)
        if self._part_of is None:
            return
        base, channels = self._whole(), self._part_of[1]
        if channels is not None:
            part = base._sliced(channels)
            if part is not self._blocks[0]:
                self._blocks = (part,)
        else:
            base._follow()
            if base._blocks is not self._part_of_blocks:  # it is another sum by now, or known
                self._blocks, self._moves = base._blocks, base._moves

    def _whole(self: Self) -> Self:
        """Returns what it is a part of."""
        assert self._part_of is not None
        base = self._part_of[0]
        # It may have become a tensor since (`Changing._become_tensor`).
        return cast(Self, vars(base).get("_waits", base))

    def _mark_used(self, in_sum: bool) -> None:
        """Marks that something was made of it that does not pass through its tensor."""
        self._in_sum |= in_sum
        if self._part_of is None:
            return
        base, channels = self._whole(), self._part_of[1]
        if channels is not None:  # it is of the values in the layout of the fused ops
            base._blocks[0].was_read = True
        base._mark_used(in_sum and channels is None)

    def _show(self, y: Tensor) -> None:
        """Lets whoever uses it from here on use the tensor that others see."""
        self._blocks, self._moves = (Sum.of(y, self._modes),), ()
        self._seen, self._seen_version = y, version(y)

    def tensor(self) -> Tensor:
        """Returns the values, in the layout of the module's own forward.

        Raises:
            RuntimeError: it was given to an `autograd.Function`, which finds no gradient to it.
        """
        if self._modes.grad and is_function_forward():
            raise RuntimeError(
                "fastnas: the output of a candidate was given to an autograd.Function, which finds"
                f" no gradient to it; {CLONE}"
            )
        if self._part_of is not None:
            base, channels = self._whole(), self._part_of[1]
            return base.tensor() if channels is None else channels.of(base.tensor())
        if self._seen is None:
            y = self.computed()
            with self._modes.restored():
                as_eager = self._like is not None
                self._seen = y if as_eager else y.contiguous(memory_format=self._format)
            self._seen_version = version(self._seen)
        return self._seen

    def _has_values(self) -> bool:
        """Tells whether others have seen the values."""
        return self._seen is not None if self._part_of is None else self._whole()._has_values()

    def single(self) -> Call | None:
        """Returns the call whose very output this is, if it is not computed yet."""
        return None if self._is_joined() else self._blocks[0].single()

    @property
    def format(self) -> torch.memory_format:
        """Returns the memory format in which others see it."""
        return self._format

    def source(self) -> Tensor | Sum:
        """Returns what a candidate reads: a sum that waits, or else the values, close together."""
        self._follow()
        self._mark_used(False)
        block = self._blocks[0]
        waits = self._stays() and not self._is_joined() and not block.is_computed
        if waits and block.returned_by is None and block.depth < DEEPEST:
            block.is_node = True
            return block
        y, self._blocks[0].was_read = self.computed(), True
        layout = state_format(y)
        if self._part_of is None or y.is_contiguous(memory_format=layout):
            return y
        # The slice of a base is copied once for all candidates that read it.
        with self._modes.restored():
            packed = y.contiguous(memory_format=layout)
        self._blocks[0].hold(packed)
        return packed

    def as_block(self) -> Sum:
        """Returns it as one sum, of which something else is made."""
        self._follow()
        if self._is_joined():
            self.computed()
        return self._blocks[0]

    def can_be_summed(self) -> bool:
        """Tells whether it waits, as one sum."""
        self._follow()
        return self._stays() and not self._is_joined()

    def end_of_cell(self, call: object) -> None:
        """Marks what a call of a module returns, if it is made of nodes that read each other.

        They are computed by one `mixed_edges` then, and what reads them from here on by another.
        """
        if any(block.sources() for block in self._blocks):
            for block in self._blocks:
                block.returned_by = call

    def _stays(self) -> bool:
        """Tells whether an operation may wait: it then happens under what the calls did."""
        return self._blocks[0].modes.hold()

    def _sliced(self, channels: Channels) -> Sum:
        """Returns some of its channels, the same sum for all who ask for them."""
        y = self.computed()
        known = self._slices.get(channels)
        if known is None or known[0] is not y or known[1] != version(y):
            with self._modes.restored():
                known = y, version(y), Sum.of(channels.of(y))
            self._slices[channels] = known
        return known[2]

    # ---- what is known of it without its values

    device = property(lambda self: self._blocks[0].device)
    is_meta = property(lambda self: self._blocks[0].device.type == "meta")

    def is_inference(self) -> bool:
        return self._modes.inference


_NO_SUM = (Tensor, int, float, str, type(None), torch.dtype, torch.Size)


def real(value: Any) -> Any:
    """Returns the value with tensors in place of deferred sums, in containers as well."""
    if isinstance(value, Standing):
        return value.tensor()
    # What functions of torch are given is nearly always one of these; the walk through any
    # container takes 10 us, and leaves cycles to the garbage collector.
    if isinstance(value, _NO_SUM):
        return value
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([real(item) for item in value])
    if kind is dict:
        return {key: real(item) for key, item in value.items()}
    # A tuple in place of a size would be taken for values, by `Tensor.new`.
    return tree_map(
        lambda v: v.tensor() if isinstance(v, Standing) else v,
        value,
        is_leaf=lambda v: isinstance(v, torch.Size),
    )
