"""Counts all launches of a search step, or of a mixed op, call by call of an op."""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastnas import nn, use_backend
from fastnas.backends.native import Native
from fastnas.benchmarks.model.counting import LaunchCount, count_launch
from fastnas.benchmarks.model.launches import Launch, observed
from fastnas.benchmarks.model.machine import Program
from fastnas.benchmarks.model.sass import Kernel
from fastnas.benchmarks.search.providers import SIZES
from fastnas.benchmarks.search.setup import build
from fastnas.spaces import get_space

PREPARES = ("upload_kernel", "pick_kernel")
"""Kernels that write the tables which the others read: they run, and are counted as well."""


class HostModel:
    """Counts the launches of what runs on the host build of the CUDA backend.

    Attributes:
        backend: that build, chosen by its name.
        kernels: the machine code that nvcc made of the same sources, by name.
    """

    def __init__(
        self, backend: Native, machine: ctypes.CDLL, kernels: Mapping[str, Kernel]
    ) -> None:
        self.backend, self.machine, self.kernels = backend, machine, kernels
        self._programs: dict[str, Program] = {}

    def count(self, work: Callable[[], object]) -> list[tuple[LaunchCount, int]]:
        """Counts the launches of `work`, and how often each is made.

        Blocks are not run, but for the few that are counted, so what ops return is arbitrary. Calls
        of an op that differ in addresses alone are counted once.
        """
        calls: Counter[Hashable] = Counter()
        launches: defaultdict[Hashable, list[LaunchCount]] = defaultdict(list)
        call: Hashable = None

        def begins(kernel: str, fields: Hashable) -> None:
            nonlocal call
            call = kernel, fields
            calls[call] += 1

        def see(launch: Launch) -> bool:
            if calls[call] == 1:
                launches[call].append(self._counted(launch))
            return not launch.kernel.startswith(PREPARES)

        library = Path(str(self.backend.module.__file__))
        telling, chosen = self._telling(begins), use_backend(self.backend.name)
        with plausible_memory(), observed(library, see), telling, chosen:
            work()
        return [(launch, calls[key]) for key, found in launches.items() for launch in found]

    def _counted(self, launch: Launch) -> LaunchCount:
        if launch.kernel not in self._programs:
            self._programs[launch.kernel] = Program(self.machine, self.kernels[launch.kernel])
        return count_launch(self._programs[launch.kernel], launch.shape)

    @contextmanager
    def _telling(self, begins: Callable[[str, Hashable], None]) -> Iterator[None]:
        """Calls `begins` before each call of an op, with what it is given."""
        make, run = self.backend.params, self.backend.run
        given: Hashable = None

        def see_params(struct: str, **fields: Any) -> Any:
            nonlocal given
            given = _shape_of(fields)
            return make(struct, **fields)

        def see_run(kernel: str, params: Any, like: torch.Tensor) -> None:
            begins(kernel, given)
            run(kernel, params, like)

        self.backend.params, self.backend.run = see_params, see_run  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.backend.params, self.backend.run


def _shape_of(value: Any) -> Hashable:
    """Returns what decides the launches of a call: of addresses only which are null."""
    if isinstance(value, Mapping):
        return tuple((name, _shape_of(field)) for name, field in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_shape_of, value))
    if isinstance(value, int) and value > 1 << 32:
        return "address"
    return value if isinstance(value, Hashable) else id(value)


@contextmanager
def plausible_memory() -> Iterator[None]:
    """Fills fresh memory with numbers about 1, where kernels that do not run would leave anything.

    A variance of zero, or a NaN, would send a kernel down a way that it takes for no real input.
    """
    numbers = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    replaced: dict[str, Callable[..., torch.Tensor]] = {
        "empty": torch.empty,
        "empty_like": torch.empty_like,
    }

    def filling(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*arguments: Any, **options: Any) -> torch.Tensor:
            tensor = make(*arguments, **options)
            _fill(tensor, numbers)
            return tensor

        return made

    try:
        for name, make in replaced.items():
            setattr(torch, name, filling(make))
        yield
    finally:
        for name, make in replaced.items():
            setattr(torch, name, make)


def _fill(tensor: torch.Tensor, numbers: torch.Tensor) -> None:
    floats = tensor.dtype.is_floating_point
    if tensor.device.type != "cpu" or not (floats or tensor.dtype == torch.uint8):
        return
    source = numbers.to(tensor.dtype) if floats else numbers.view(torch.uint8)
    flat = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,))
    whole = flat.numel() // source.numel() * source.numel()
    flat[:whole].view(-1, source.numel()).copy_(source.expand(whole // source.numel(), -1))
    flat[whole:].copy_(source[: flat.numel() - whole])


def search_step(batch: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], object]:
    """Builds a step of the default network: half for the logits, half for the weights."""
    return build("fastnas", replace(SIZES["default"], batch=batch), device, dtype).step


def mixed_op(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Callable[[], object]:
    """Builds one mixed op's forward and backward, with all gradients."""
    torch.manual_seed(0)
    space = get_space("S0")
    op = nn.MixedOp(space.normal[0], shape[1], 1).to(device, dtype)
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    w = torch.full((len(space.normal[0]),), 1 / 8, device=device, requires_grad=True)

    def run() -> None:
        y = op(x, w)
        torch.autograd.grad(y, [x, w, *op.parameters()], torch.ones_like(y))

    return run
