"""The Triton spelling of Philox against published vectors, below the op."""

from __future__ import annotations

import pytest
import torch
from philox_vectors import published

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastnas.kernels.noise import _quad  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def quad_kernel(counter_ptr, out_ptr):
    key, offset = tl.load(counter_ptr), tl.load(counter_ptr + 2)
    e0, e1, e2, e3 = _quad(key, offset, tl.load(counter_ptr + 1), False)
    tl.store(out_ptr, e0)
    tl.store(out_ptr + 1, e1)
    tl.store(out_ptr + 2, e2)
    tl.store(out_ptr + 3, e3)


@pytest.mark.parametrize("vector", published(), ids=lambda vector: f"{vector[0]:x}")
@pytest.mark.filterwarnings("ignore:overflow encountered in:RuntimeWarning")
def test_published_vectors(vector: tuple[int, int, int, list[int]]) -> None:
    *counter, words = vector
    signed = [value - 2**64 if value >= 2**63 else value for value in counter]
    out = torch.empty(4, device=DEVICE)
    quad_kernel[(1,)](torch.tensor(signed, device=DEVICE), out)
    mantissas = ((out.double() + 1) * 2**23 - 1) / 2  # uniform draws hold word >> 9
    assert mantissas.tolist() == [word >> 9 for word in words]
