"""Relative noise on values whose squares fp32 does not hold: the standard deviation is eager's."""

from __future__ import annotations

import pytest
import torch
from cases import noise_of
from edge_cases import cell, edge, make
from targets import Target
from torch import Tensor

import fastnas
from fastnas.backends import KERNELS, SavedTensors
from fastnas.backends.calls import EdgesCall, Noise, NormSumCall, SumCall
from fastnas.spaces import EdgeTable

NOISE = noise_of("gaussian_additive")
LEVEL, RNG = NOISE.level(), torch.tensor([11, 7])


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    made = {
        "1e-30": 1e-30 * normal,
        "1e-25": 1e-25 * normal,
        "1e-19": 1e-19 * normal,
        "1e19": 1e19 * normal,
        "1e30": 1e30 * normal,
        "1e38": 1e37 * normal.clamp(-3, 3),
        "constant 0": 0 * normal,
        "constant 1e-16": 0 * normal + 1e-16,
        "constant 0.1": 0 * normal + 0.1,
        "constant 1e30": 0 * normal + 1e30,
        "about 1e6": 1e6 + normal,
        "one value of many": torch.where(normal == normal.max(), 1e-22, 0.0),
    }
    return made[kind].to(dtype)


KINDS = ("1e-30", "1e-25", "1e-19", "1e19", "1e30", "1e38", "constant 0", "constant 1e-16",
         "constant 0.1", "constant 1e30", "about 1e6", "one value of many")  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*encountered in")  # NumPy's, in interpreted Triton
@pytest.mark.backends("eager", "cpu", "cuda-host", "triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 41, 20), (3, 7)], ids=["blocks", "few"])
def test_standard_deviations(backend: Target, kind: str, shape: tuple[int, ...]) -> None:
    """Of both ops that have them; a part of zeros beside the rest does not matter."""
    sums, norm_sums = (KERNELS[op, backend.name] for op in ("mixed_sum", "mixed_norm_sum"))
    noise = Noise([0], NOISE.form, LEVEL, RNG)
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes[: 1 if backend.id == "triton-interpreter" else 2]:
        x = values(kind, shape, dtype)
        expected = x.double().std()
        w = torch.ones(1)
        _, (of_sum,) = sums.forward(SumCall([x], w, noise))
        call = NormSumCall([x], w, [False], 1e-5, None, None, noise)
        _, (of_norms, *_) = norm_sums.forward(call)
        # Where all is constant, what rounding of the mean leaves of a constant is small beside it.
        least = 2e-7 * float(x.double().abs().max()) if kind.startswith("constant") else 0.0
        for std in (of_sum, of_norms):
            torch.testing.assert_close(std[0], expected, rtol=1e-5, atol=least)


@pytest.mark.backends("cpu", "cuda-host")
@pytest.mark.parametrize(
    ("stride", "kind"),
    [(1, kind) for kind in KINDS]
    + [(2, kind) for kind in ("1e-30", "1e-25", "1e-19", "constant 0", "constant 1e-16")],
)
def test_standard_deviations_of_states(backend: Target, stride: int, kind: str) -> None:
    """Of a skip, and of the strided one, whose batch norm divides by little but its eps."""
    table = EdgeTable(1, 1, 1, (edge(0, 0, stride, ("skip",)),))
    given = make(table, (9, 6), C=6, N=3, dtype=torch.float32, noise=NOISE)
    x = [values(kind, tuple(given.x[0].shape), torch.float32)]
    found = []
    for name in (backend.name, "eager"):
        noise = Noise([], NOISE.form, LEVEL, given.rng)
        call = EdgesCall(x, given.w, given.params, table, None, 1e-5, noise, None, "lean", False)
        _, saved = KERNELS["mixed_edges", name].forward(call)
        found.append(SavedTensors(*saved).std)
    largest = float(x[0].abs().max()) if stride == 1 else 1.0
    least = 2e-7 * largest if kind.startswith("constant") else 0.0
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=least)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-16, 1.0, 1e16, 1e30])
def test_noise_scales_with_what_it_is_on(scale: float) -> None:
    x = torch.randn(2, 5, 41, 31)
    given = {"noise": NOISE, "noisy": [0], "level": LEVEL, "rng": RNG}
    y = fastnas.mixed_sum([x * scale], torch.ones(1), **given)
    expected = fastnas.mixed_sum([x], torch.ones(1), **given)
    torch.testing.assert_close(y.double() / scale, expected.double(), rtol=1e-5, atol=1e-6)


def test_a_cell_of_small_numbers_is_finite() -> None:
    given = make(cell(1, 2), (6, 6), C=4, dtype=torch.float32, noise=NOISE)
    x = [1e-25 * t for t in given.x]
    y = fastnas.mixed_edges(x, given.w, given.params, given.table, noise=NOISE, rng=given.rng)
    assert y.isfinite().all()
