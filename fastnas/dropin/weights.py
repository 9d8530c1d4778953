"""Holds the weights of candidates in a sum, as they are given and as one tensor of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = Tensor | float


class Element(NamedTuple):
    """Names an element of a tensor of mixing weights; all those of a sum are looked up at once."""

    of: Tensor
    place: int
    """Counted row by row."""

    def value(self) -> Tensor:
        return self.of.reshape(-1)[self.place]


Weight = Scalar | Element | None
"""What weighs a candidate; None stands for 1."""


def scalar(weight: Weight) -> Scalar | None:
    """Returns the weight as what can be computed with."""
    return weight.value() if isinstance(weight, Element) else weight


def scaled(weights: Sequence[Weight], scale: Scalar) -> list[Weight]:
    """Returns weights times a scalar."""
    # One product for all elements of a tensor, unless that is of another dtype, and the product of
    # an element alone would be of a third one.
    products: dict[int, Tensor] = {}
    found: list[Weight] = []
    for w in weights:
        if not isinstance(w, Element):
            found.append(scale if w is None else w * scale)
        elif isinstance(scale, Tensor) and scale.dtype != w.of.dtype:
            found.append(w.value() * scale)
        else:
            if id(w.of) not in products:
                products[id(w.of)] = w.of * scale
            found.append(Element(products[id(w.of)], w.place))
    return found


def stacked(rows: Sequence[Sequence[Weight]], like: Tensor) -> Tensor:
    """Returns mixing weights [edges, candidates], filled up with zeros."""
    given = (w.of if isinstance(w, Element) else w for row in rows for w in row)
    dtypes = {w.dtype for w in given if isinstance(w, Tensor)}
    dtype = reduce(torch.promote_types, dtypes, like.dtype)
    one = like.new_ones((), dtype=dtype if dtype.is_floating_point else like.dtype)
    K, zero = max(map(len, rows)), 0.0
    # Where each of them lies in what is put together: whole tensors of weights, then scalars.
    vectors: dict[int, Tensor] = {}
    starts: dict[int, int] = {}
    scalars: list[Tensor] = []
    length = 0
    for row in rows:
        for w in row:
            if isinstance(w, Element) and id(w.of) not in vectors:
                vectors[id(w.of)], starts[id(w.of)] = w.of.to(one).reshape(-1), length
                length += w.of.numel()
    places = []
    for row in rows:
        for w in (*row, *[zero] * (K - len(row))):
            if isinstance(w, Element):
                places.append(starts[id(w.of)] + w.place)
                continue
            places.append(length + len(scalars))
            scalars.append(w.to(one) if isinstance(w, Tensor) else one if w is None else w * one)
    parts = [*vectors.values(), *([torch.stack(scalars)] if scalars else [])]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    if places != list(range(len(flat))):
        flat = flat[_index(tuple(places), flat.device)]
    return flat.view(len(rows), K)


@lru_cache(maxsize=256)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, since a copy to a GPU waits for all that runs there.
    with torch.inference_mode(False):
        return torch.tensor(places, device=device)
