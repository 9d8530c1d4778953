"""A seeded source of what a fuzzed call is made of; it remembers every choice by its name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from cases import laid_out
from torch import Tensor

from fastnas.reference import SkipNoise

T = TypeVar("T")

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "misaligned", "expanded",
           "negative")  # fmt: skip
FINITE = ("normal", "scaled", "far", "integers", "zeros", "constant", "subnormal")
FILLS = (*FINITE, "special")


class Draws:
    """Choices that `seed` determines; `log` tells them to whoever replays the call."""

    def __init__(self, seed: int) -> None:
        self.log: dict[str, object] = {}
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def pick(self, name: str, options: Sequence[T]) -> T:
        self.log[name] = chosen = self._random.choice(options)
        return chosen

    def chance(self, name: str, probability: float) -> bool:
        self.log[name] = happens = self._random.random() < probability
        return happens

    def subset(self, name: str, options: Sequence[T]) -> list[T]:
        """All of them in half of the cases, any of them otherwise."""
        every = self._random.random() < 0.5
        chosen = [option for option in options if every or self._random.random() < 0.5]
        self.log[name] = "all" if every else chosen
        return chosen

    def several(self, name: str, options: Sequence[T], most: int) -> list[T]:
        """Up to `most` different ones, in any order."""
        self.log[name] = chosen = self._random.sample(options, self._random.randrange(most + 1))
        return chosen

    def choices(self, name: str, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """int64 numbers from low to high - 1."""
        chosen = torch.randint(low, high, tuple(shape), generator=self._generator)
        self.log[name] = chosen.tolist()
        return chosen

    def size(self, name: str, most: int) -> int:
        """0 in one case of twenty; small sizes more often than large ones."""
        if self.chance(f"{name} is 0", 0.05):
            return 0
        return self.pick(name, [*range(1, most + 1), *range(1, min(most, 5) + 1)])

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        fills: Sequence[str] = FILLS,
    ) -> Tensor:
        """Values and a layout: most tensors hold normal numbers, half lie in one piece."""
        fill = self.pick(f"{name} values", fills) if self.chance(f"{name} odd", 0.3) else "normal"
        values = self._values(name, fill, shape, dtype).to(dtype)
        return self.laid_out(name, values)

    def laid_out(self, name: str, t: Tensor) -> Tensor:
        layout = "contiguous"
        if self.chance(f"{name} lies oddly", 0.5):
            layout = self.pick(f"{name} layout", LAYOUTS)
        return laid_out(t, layout)

    def _values(self, name: str, fill: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """In float64."""
        normal = torch.randn(tuple(shape), generator=self._generator, dtype=torch.float64)
        if fill == "scaled":
            return normal * 10.0 ** self._exponent(name, dtype)
        if fill == "far":
            return normal + self.pick(f"{name} about", [-100.0, 100.0])
        if fill == "integers":  # ties, and sums that cancel exactly
            return normal.round()
        if fill == "zeros":
            return torch.zeros_like(normal)
        if fill == "constant":  # larger ones have a variance of nothing but rounding
            return torch.ones_like(normal) * 2.0 ** self.pick(f"{name} power", range(-7, 8))
        if fill == "subnormal":
            narrow = torch.float32 if dtype == torch.float64 else dtype
            return normal * torch.finfo(narrow).smallest_normal / 4
        if fill == "special":
            return self._with_specials(name, normal)
        return normal

    def _exponent(self, name: str, dtype: torch.dtype) -> float:
        """Of values from 1e-30 to 1e30; float16 has room for 1e-7 to 1e4."""
        low, high = (-7.0, 4.0) if dtype == torch.float16 else (-30.0, 30.0)
        self.log[f"{name} exponent"] = exponent = self._random.uniform(low, high)
        return exponent

    def _with_specials(self, name: str, values: Tensor) -> Tensor:
        special = self.pick(f"{name} special", [torch.nan, torch.inf, -torch.inf])
        flat = values.flatten()
        if len(flat):
            flat[self._random.randrange(len(flat))] = special
        return flat.view(values.shape)

    def noise(self) -> SkipNoise:
        kind = self.pick("noise", ["gaussian", "uniform", "bernoulli"])
        mixture = self.pick("mixture", ["additive", "multiplicative"])
        mean, factor = (
            self.pick("noise mean", [None, 0.5]),
            self.pick("noise factor", [0.0, 0.2, 3.0]),
        )
        if kind == "bernoulli":  # it is multiplicative, unbiased, and its factor a probability
            mixture, mean, factor = "multiplicative", None, factor / 4
        return SkipNoise(kind, mixture, mean, factor)

    def level(self, noise: SkipNoise) -> Tensor:
        return self.laid_out("level", noise.level(self.pick("amplitude", [0.0, 0.3, 1.0])))

    def rng(self, *shape: int) -> Tensor:
        words = torch.randint(-(2**62), 2**62, (*shape, 2), generator=self._generator)
        return self.laid_out("rng", words)
