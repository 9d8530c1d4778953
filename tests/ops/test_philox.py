"""Philox4x32-10: the C++ formula and the specification, against published vectors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from philox_vectors import published

from fastnas.reference.skip_noise import philox_draw, philox_words

FORMULAS = Path(__file__).parents[2] / "csrc" / "formulas"
PROBE = """
#include "philox.h"
extern "C" void words(uint64_t key, uint64_t quad, uint64_t offset, uint32_t* out) {
  const fastnas::Words w = fastnas::philox(key, quad, offset);
  for (int i = 0; i < 4; ++i) out[i] = w.v[i];
}
"""


@pytest.fixture(scope="module")
def formula(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, int], list[int]]:
    """csrc/formulas/philox.h, called from Python."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("philox")
    source, library = folder / "probe.cpp", folder / "probe.so"
    source.write_text(PROBE)
    command = [gxx, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{FORMULAS}", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    words = ctypes.CDLL(str(library)).words
    words.argtypes = [ctypes.c_uint64] * 3 + [ctypes.POINTER(ctypes.c_uint32)]
    words.restype = None

    def call(key: int, quad: int, offset: int) -> list[int]:
        out = (ctypes.c_uint32 * 4)()
        words(key, quad, offset, out)
        return list(out)

    return call


def test_formula_header(formula: Callable[[int, int, int], list[int]]) -> None:
    for key, quad, offset, words in published():
        assert formula(key, quad, offset) == words


def test_specification_at_the_published_origin() -> None:
    key, quad, offset, words = published()[0]
    assert (key, quad, offset) == (0, 0, 0)
    assert philox_words(0, 0, 1).tolist() == [words]


def test_specification_is_the_formula_for_any_counter(
    formula: Callable[[int, int, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quads beyond 2^32 too, of which no tensor that fits here has any."""
    quads = torch.randint(2**62, (40,))
    quads[:4] = torch.tensor([0, 1, 2**32 - 1, 2**32])
    monkeypatch.setattr(torch, "arange", lambda *_, **__: quads)
    for _ in range(20):
        key, offset = (int(v) for v in torch.randint(-(2**63), 2**63 - 1, (2,)))
        words = philox_words(key, offset, len(quads)).tolist()
        unsigned = key % 2**64, offset % 2**64
        assert words == [formula(unsigned[0], quad, unsigned[1]) for quad in quads.tolist()]


def test_draws_are_made_of_words_as_documented() -> None:
    rng = torch.tensor([11, 22])
    u = ((philox_words(11, 22 + 3, 2) >> 9).double() + 0.5) / 2**23
    assert u.min() > 0
    assert u.max() < 1
    x = torch.empty(7, dtype=torch.float64)
    uniform = philox_draw("uniform_additive", rng, 3, x)
    torch.testing.assert_close(uniform, (2 * u - 1).flatten()[:7], rtol=0, atol=0)
    pairs = u.reshape(-1, 2)
    radius, angle = (-2 * pairs[:, 0].log()).sqrt(), 2 * torch.pi * pairs[:, 1]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()[:7]
    torch.testing.assert_close(philox_draw("gaussian_additive", rng, 3, x), normal)
