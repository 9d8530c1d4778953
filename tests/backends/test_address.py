"""One helper turns a tensor into an address, and refuses what a kernel would misread."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas.backends.address import address, addresses, laid_out

CPU = torch.device("cpu")
ROOT = Path(fastnas.__file__).parent


def test_nothing_else_asks_for_addresses() -> None:
    """In the package and in the Triton kernels."""
    asked = re.compile(r"data_ptr|__cuda_array_interface__|__array_interface__")
    files = [*ROOT.rglob("*.py"), *(ROOT.parent / "kernels").rglob("*.py")]
    found = {path.name for path in files if asked.search(path.read_text())}
    assert found == {"address.py"}


def test_the_address_is_that_of_the_first_value() -> None:
    t = torch.randn(2, 3, 4)
    assert address(t, CPU) == t.data_ptr()
    assert address(t[1], CPU) == t.data_ptr() + 12 * 4
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert address(last, CPU, torch.channels_last) == last.data_ptr()
    assert addresses([t, None], CPU) == [t.data_ptr(), 0]


def test_a_tensor_without_values_has_none() -> None:
    for shape in ((0,), (2, 0, 3), (0, 4, 2, 2)):
        assert address(torch.empty(shape), CPU) == 0


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "strides": (lambda: torch.randn(6)[::2], r"strides \(2,\)"),
    "expanded": (lambda: torch.randn(1).expand(6), r"strides \(0,\)"),
    "channels last": (
        lambda: torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        r"strides \(48, 1, 12, 3\)",
    ),
    "negative": (lambda: torch._neg_view(torch.randn(6)), "flagged negative"),
    "conjugate": (lambda: torch.randn(6, dtype=torch.cfloat).conj(), "flagged conjugate"),
    "device": (lambda: torch.empty(6, device="meta"), "on meta"),
    "sparse": (lambda: torch.randn(6).to_sparse(), "layout torch.sparse_coo"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_kernel_would_misread(kind: str) -> None:
    make, described = REFUSED[kind]
    with pytest.raises(AssertionError, match=rf"a kernel on cpu would read .*{described}"):
        address(make(), CPU)


def test_rows_are_no_channels_last() -> None:
    with pytest.raises(AssertionError, match="channels_last are needed"):
        address(torch.randn(2, 3, 4, 4), CPU, torch.channels_last)


def test_laid_out_leaves_alone_what_is_laid_out() -> None:
    t = torch.randn(2, 3)
    assert laid_out(t) is t


def test_laid_out_resolves_flags_and_strides() -> None:
    t = torch.randn(2, 3, 4, 4)
    for odd in (torch._neg_view(-t), t.transpose(0, 1).contiguous().transpose(0, 1)):
        for layout in (torch.contiguous_format, torch.channels_last):
            plain = laid_out(odd, layout)
            assert address(plain, CPU, layout)
            assert torch.equal(plain, t)
