"""The hot parts of the CUDA kernels keep to their budgets, at the shapes of the default network."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import pytest
from host_cuda import HostCudaBackend

from fastnas.benchmarks.model.budgets import BUDGETS, STAGES, Figure, figures
from fastnas.benchmarks.model.sass import Kernel
from fastnas.benchmarks.model.step import HostModel, mixed_op

# What a part misses while its kernels are being rewritten: emptied with them.
MISSED = {
    "load of a tile", "staging", "product", "kernel",
    "merge of Gram matrices",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(
    cuda_host: HostCudaBackend, kernels: Mapping[str, Kernel], machine: ctypes.CDLL
) -> list[Figure]:
    model = HostModel(cuda_host, machine, kernels)
    return [
        figure
        for shape in STAGES
        for figure in figures(shape, (launch for launch, _ in model.count(mixed_op(shape))))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("part", [budget.part for budget in BUDGETS])
def test_a_part_keeps_to_its_budget(found: list[Figure], part: str) -> None:
    own = [figure for figure in found if figure.part == part]
    # A part whose functions have other names now would have no figures to miss.
    assert {figure.shape for figure in own} == set(STAGES)
    missed = [
        f"{each.kernel} at {each.shape}: {each.bound.name} {each.value:.3g}, {each.bound}"
        for each in own
        if not each.holds
    ]
    if missed and part in MISSED:
        pytest.xfail("\n".join(missed))
    assert not missed, "\n".join(missed)
