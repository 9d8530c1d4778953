"""mixed_sum without noise, on every backend and dtype: values, gradients, shapes, layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
    FORMS,
    LAYOUTS,
    bits,
    by_eager,
    check,
    check_repeats,
    laid_out,
    make,
    noise_of,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import KERNELS, Target

import fastnas

OP = "mixed_sum"
# Interpreted Triton computes in numpy, which warns of what inf and NaN do.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SHAPES = [
    (), (1,), (3,), (4095,), (4096,), (4097,), (10007,),
    (5, 7), (2, 3, 5), (2, 3, 5, 7), (2, 3, 2, 4, 5),
    (0,), (0, 3, 4, 4), (2, 0, 4, 4), (1, 1, 1, 1),
]  # fmt: skip
WIDTHS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("terms", [*range(1, 17), 128])
def test_every_number_of_terms(backend: Target, terms: int) -> None:
    for dtype in backend.some_dtypes(OP, terms):
        check(make((3, 1, 7, 5 + terms), terms, dtype, backend.device), backend.name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_and_rank(backend: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(make(shape, 3, dtype, backend.device), backend.name)


def test_empty_batch_gives_empty_dx_and_zero_dw(backend: Target, dtype: torch.dtype) -> None:
    got = run(make((0, 3, 4, 4), 2, dtype, backend.device), backend.name)
    assert got.y.shape == (0, 3, 4, 4)
    assert got.dw is not None
    assert got.dw.tolist() == [0, 0]


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(backend: Target, layout: str, dy_layout: str) -> None:
    for dtype in backend.some_dtypes(OP, LAYOUTS.index(layout) + LAYOUTS.index(dy_layout)):
        inputs = make((2, 3, 5, 7), 3, dtype, backend.device, layouts=[layout], dy_layout=dy_layout)
        check(inputs, backend.name)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (2, 3, 2, 4, 5), (2, 1, 4, 4), (3, 4, 1, 1)], ids=str
)
def test_mixed_layouts(backend: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = make(shape, 6, dtype, backend.device, layouts=LAYOUTS, dy_layout="channels_last")
    check(inputs, backend.name)


def test_all_channels_last_stays_channels_last(backend: Target) -> None:
    layout = "channels_last"
    inputs = make(
        (2, 3, 5, 7), 2, torch.float32, backend.device, layouts=[layout], dy_layout=layout
    )
    got = run(inputs, backend.name)
    for name, t in got.named().items():
        if name != "dw":
            assert t is not None
            assert t.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("shift", range(1, 5))
def test_storage_offsets(backend: Target, dtype: torch.dtype, shift: int) -> None:
    inputs = make((4103,), 3, dtype, backend.device)

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_full((shift,), torch.nan), t])[shift:]

    check(replace(inputs, x=[inputs.x[0], *map(moved, inputs.x[1:])]), backend.name)
    check(replace(inputs, dy=moved(inputs.dy)), backend.name)


@pytest.mark.parametrize("w_dtype", WIDTHS, ids=str)
def test_w_of_another_dtype(backend: Target, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    got = check(make((5, 31), 4, dtype, backend.device, w_dtype=w_dtype), backend.name)
    assert got.dw is not None
    assert got.dw.dtype == w_dtype


def test_w_is_a_strided_view(backend: Target) -> None:
    inputs = make((5, 31), 4, torch.float32, backend.device)
    check(replace(inputs, w=inputs.w.repeat_interleave(3)[::3]), backend.name)
    check(replace(inputs, w=inputs.w[:1].expand(4)), backend.name)


@pytest.mark.parametrize("w", [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1], [-1, 2, 0.5]], ids=str)
def test_plain_weights_are_exact(backend: Target, dtype: torch.dtype, w: list[float]) -> None:
    inputs = make((5, 31), 3, dtype, backend.device)
    inputs = replace(inputs, w=torch.tensor(w, dtype=dtype, device=backend.device))
    got = check(inputs, backend.name)
    if sum(map(bool, w)) <= 1:
        chosen = sum((t for t, w_k in zip(inputs.x, w) if w_k), torch.zeros_like(inputs.dy))
        assert torch.equal(got.y, chosen)


SPECIAL = [0.0, -0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("w", [[1, 1, 1, 1, 1], [0, 1, -1, 2, 1], [torch.inf, 0, 0, 1, 1],
                               [0, 0, torch.nan, 0, 0]], ids=str)  # fmt: skip
def test_inf_and_nan_spread_as_in_eager(
    backend: Target, dtype: torch.dtype, w: list[float]
) -> None:
    grid = torch.cartesian_prod(*[torch.tensor(SPECIAL)] * 3).to(backend.device, dtype)
    one = torch.ones_like(grid[:, 0])
    x = [*(t.contiguous() for t in grid.unbind(1)), one, -one]
    dy = torch.tensor(SPECIAL, device=backend.device, dtype=dtype).repeat(len(one) // len(SPECIAL))
    inputs = replace(
        make((len(one),), 5, dtype, backend.device),
        x=x, w=torch.tensor(w, device=backend.device, dtype=dtype), dy=dy,
    )  # fmt: skip
    for dy in (inputs.dy, one):
        inputs = replace(inputs, dy=dy)
        eager = by_eager(inputs).named()
        for name, found in run(inputs, backend.name).named().items():
            assert found is not None
            torch.testing.assert_close(
                found.cpu(), eager[name], equal_nan=True, rtol=0.05, atol=0.05, msg=name
            )


def test_overflow_is_inf_in_the_stored_dtype(backend: Target, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = [torch.full((5,), largest, dtype=dtype, device=backend.device)] * 2
    y = fastnas.mixed_sum(x, torch.ones(2, dtype=dtype, device=x[0].device), backend=backend.name)
    assert y.isposinf().all()


def stored_values(backend: Target, dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a 16-bit dtype, 2^16 of a wider one."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    patterns = torch.arange(-(2**15), 2**15) << (8 * dtype.itemsize - 16)
    values = patterns.to(whole).view(dtype)
    if backend.id == "triton-interpreter" and dtype == torch.bfloat16:
        # Interpreted Triton (3.9) does not convert subnormal bfloat16 rightly; compiled it does.
        values = values[~(values.abs().float() < torch.finfo(dtype).smallest_normal)]
    return values.to(backend.device)


@pytest.mark.backends(*KERNELS)
def test_stored_values_are_kept(backend: Target, dtype: torch.dtype) -> None:
    every = stored_values(backend, dtype)
    y = fastnas.mixed_sum([every], torch.ones(1, device=every.device), backend=backend.name)
    torch.testing.assert_close(y, every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("small", [2.0**-8, 2.0**-11, 2.0**-12])
def test_16_bit_results_are_rounded_to_nearest_even(backend: Target, small: float) -> None:
    """y = a + small b, which fp32 holds exactly or rounds in the same way, for every a."""
    # Interpreted Triton (3.9) truncates to bfloat16; compiled it rounds.
    interpreted = backend.id == "triton-interpreter"
    for dtype in (torch.float16,) if interpreted else (torch.float16, torch.bfloat16):
        a = stored_values(backend, dtype)
        b = a[torch.randperm(len(a)).to(a.device)]
        w = torch.tensor([1.0, small], device=a.device)
        y = fastnas.mixed_sum([a, b], w, backend=backend.name)
        expected = (a.float() + small * b.float()).to(dtype)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_one_tensor_given_twice(backend: Target) -> None:
    inputs = make((5, 31), 3, torch.float32, backend.device)
    x = inputs.x[0].clone().requires_grad_()
    y = fastnas.mixed_sum([x, inputs.x[1], x], inputs.w, backend=backend.name)
    (dx,) = torch.autograd.grad(y, x, inputs.dy)
    torch.testing.assert_close(dx, (inputs.w[0] + inputs.w[2]) * inputs.dy)


@pytest.mark.backends(*KERNELS)
def test_inputs_are_not_written(backend: Target) -> None:
    inputs = make((5, 31), 3, torch.float32, backend.device, layouts=LAYOUTS)
    tensors = (*inputs.x, inputs.w, inputs.dy)
    before = [t.clone() for t in tensors]
    run(inputs, backend.name)
    assert all(torch.equal(t, saved) for t, saved in zip(tensors, before))


def test_same_bits_every_time(backend: Target, dtype: torch.dtype) -> None:
    check_repeats(make((3, 4097), 5, dtype, backend.device), backend.name)


def test_rows_do_not_depend_on_their_neighbours(backend: Target) -> None:
    """An element of y is the same bits in a large tensor and alone."""
    inputs = make((9000,), 5, torch.float32, backend.device)
    whole = run(inputs, backend.name).y
    part = replace(inputs, x=[t[5000:5007] for t in inputs.x], dy=inputs.dy[5000:5007])
    assert torch.equal(bits(whole[5000:5007]), bits(run(part, backend.name).y))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, object]:
    terms = draw(st.integers(1, 6))
    noisy = draw(st.lists(st.integers(0, terms - 1), unique=True, max_size=2))
    return {
        "shape": draw(st.lists(st.integers(0, 9), max_size=5)),
        "terms": terms,
        "noise": noise_of(draw(st.sampled_from(FORMS))),
        "noisy": noisy,
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3)),
        "dy_layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 2**20)),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), call=calls(), needs=st.lists(st.booleans(), min_size=7, max_size=7))
def test_drawn_shapes(
    backend: Target, data: st.DataObject, call: dict[str, object], needs: list[bool]
) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes(OP)))
    inputs = make(dtype=dtype, device=backend.device, **call)  # type: ignore[arg-type]
    if inputs.x[0].numel() < 2 and inputs.form == "gaussian_additive":
        inputs = replace(inputs, noisy=())  # the standard deviation of one number is NaN
    check(inputs, backend.name, needs[: 1 + len(inputs.x)])


def test_laid_out_is_what_it_says() -> None:
    t = torch.randn(2, 3, 5, 7)
    for layout in LAYOUTS:
        other = laid_out(t, layout)
        assert torch.equal(other, t[..., :1].expand_as(t) if layout == "expanded" else t)
        assert layout in ("contiguous", "misaligned") or not other.is_contiguous()
    assert laid_out(t, "misaligned").data_ptr() % 16 != 0
