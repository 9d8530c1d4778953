"""mixed_sum with skip noise: values and gradients, the same integers everywhere, statistics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
    FORMS,
    LAYOUTS,
    by_eager,
    check,
    check_regenerates,
    check_repeats,
    make,
    noise_of,
    run,
    uniform_mantissas,
)
from targets import KERNELS, Target

import fastnas
from fastnas.ops import draw_rng
from fastnas.reference import SkipNoise
from fastnas.reference.skip_noise import philox_draw, philox_words

OP = "mixed_sum"
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
too_few_to_have_a_std = pytest.mark.filterwarnings("ignore:std.*degrees of freedom:UserWarning")
BIG = 2**63 - 1
STREAMS = [(0, 0), (1, 2**32 - 1), (2**32, 2**32), (2**62 - 1, 2**61 + 12345), (BIG, BIG), (-1, -7)]


@pytest.mark.parametrize("noisy", [(1,), (2, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(backend: Target, dtype: torch.dtype, form: str, noisy: tuple[int, ...]) -> None:
    check(make((2, 3, 5, 7), 4, dtype, backend.device, noise=noise_of(form), noisy=noisy),
          backend.name)  # fmt: skip


@pytest.mark.parametrize(("mean", "factor", "amplitude"), [(0.3, 0.5, 0.7), (-2.0, 0.0, 1.0),
                                                           (0.0, 1.5, 0.0)])  # fmt: skip
@pytest.mark.parametrize("form", FORMS[:4])
def test_mean_factor_and_amplitude(
    backend: Target, form: str, mean: float, factor: float, amplitude: float
) -> None:
    for dtype in backend.some_dtypes(OP, FORMS.index(form)):
        noise = noise_of(form, mean, factor)
        check(make((4, 21), 3, dtype, backend.device, noise=noise, noisy=[0], amplitude=amplitude),
              backend.name)  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, 4, 5, 4095, 4096, 4097, 10007])
@pytest.mark.parametrize("form", FORMS)
def test_every_size(backend: Target, form: str, size: int) -> None:
    dtype, noise = backend.in_turn(OP, FORMS.index(form) + size), noise_of(form)
    check(make((size,), 2, dtype, backend.device, noise=noise, noisy=[1]), backend.name)


@pytest.mark.parametrize("p", [0.0, 0.25, 0.999])
def test_dropout(backend: Target, dtype: torch.dtype, p: float) -> None:
    """What is kept is scaled, its gradient too, and the draws are those of the uniform noise."""
    noise = SkipNoise("bernoulli", "multiplicative", factor=p)
    check(make((3, 1024), 2, dtype, backend.device, noise=noise, noisy=[1]), backend.name)
    ones = torch.ones(40_000, dtype=dtype, device=backend.device, requires_grad=True)
    rng, w = torch.tensor([5, 6], device=backend.device), torch.ones(1, device=backend.device)
    y = fastnas.mixed_sum([ones], w, noise=noise, noisy=[0], rng=rng, backend=backend.name)
    y.sum().backward()
    # Triton's interpreter cuts bf16 off where others round.
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 1 / (1 - p)), **tolerance)
    assert (y >= 0).all()
    assert (ones.grad == y).all()
    kept = (y > 0).double().mean().item()
    assert abs(kept - (1 - p)) <= 5 * (p * (1 - p) / len(y)) ** 0.5
    eps = philox_draw("uniform_additive", rng.cpu(), 0, ones.detach().cpu())
    assert (y.cpu() > 0).equal((1 + eps) / 2 < 1 - p) or p > 0.99


@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_std_of_inputs_far_from_zero(backend: Target, dtype: torch.dtype, offset: float) -> None:
    """The mean is 100 standard deviations away from zero."""
    inputs = make((9001,), 2, dtype, backend.device, noise=SkipNoise(), noisy=[0, 1], offset=offset)
    check(inputs, backend.name)
    # Additive noise of the factor 1e4 leaves nothing of x but its standard deviation.
    level = torch.tensor([0.0, 1e4], dtype=torch.float64, device=backend.device)
    if dtype != torch.float16:
        check(replace(inputs, level=level), backend.name)


def test_std_of_very_different_blocks(backend: Target) -> None:
    inputs = make((9001,), 1, torch.float32, backend.device, noise=SkipNoise(), noisy=[0])
    blocks = torch.arange(9001, device=backend.device) // 4096
    steps = torch.tensor([-3e3, 5.0, 1e4], device=backend.device)[blocks]
    check(replace(inputs, x=[inputs.x[0] + steps]), backend.name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(backend: Target, form: str, layout: str) -> None:
    turn = FORMS.index(form) + LAYOUTS.index(layout)
    for shape in ((2, 3, 5, 7), (2, 5, 2, 3, 3)):
        dtype = backend.in_turn(OP, turn + len(shape))
        inputs = make(shape, 3, dtype, backend.device, noise=noise_of(form), noisy=[2, 1],
                      layouts=[layout], dy_layout=LAYOUTS[turn % len(LAYOUTS)])  # fmt: skip
        check(inputs, backend.name)


def test_all_terms_noisy(backend: Target) -> None:
    terms = 9 if backend.id == "triton-interpreter" else 128
    noise, noisy = SkipNoise("uniform", "multiplicative"), range(terms)[::-1]
    inputs = make((70,), terms, torch.float32, backend.device, noise=noise, noisy=noisy)
    check(inputs, backend.name)


@too_few_to_have_a_std
def test_relative_noise_on_one_element_is_nan_as_in_eager(backend: Target) -> None:
    inputs = make((1, 1), 2, torch.float32, backend.device, noise=SkipNoise(), noisy=[0])
    got = run(inputs, backend.name)
    assert got.y.isnan().all()
    assert got.dw is not None
    assert got.dw.isnan().tolist() == [True, False]


@too_few_to_have_a_std
@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(backend: Target, form: str) -> None:
    inputs = make((0, 3, 4, 4), 2, torch.float32, backend.device, noise=noise_of(form), noisy=[1])
    got = check(inputs, backend.name)
    assert got.dw is not None
    assert got.dw.tolist() == [0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_frozen_weights_see_the_noise(backend: Target, form: str) -> None:
    """Backward without dw has no x to read; the draw of a multiplicative form still scales dx."""
    inputs = make((3, 4100), 3, torch.float32, backend.device, noise=noise_of(form), noisy=[1, 2])
    check(inputs, backend.name, needs=[False, True, True, False])


@pytest.mark.parametrize("form", FORMS)
def test_backward_sees_the_noise_of_forward(backend: Target, dtype: torch.dtype, form: str) -> None:
    inputs = make((2, 3, 5, 7), 1, dtype, backend.device, noise=noise_of(form), noisy=[0])
    check_regenerates(inputs, backend.name)


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_every_time(backend: Target, form: str) -> None:
    noise = noise_of(form)
    check_repeats(make((9001,), 2, torch.float32, backend.device, noise=noise, noisy=[0, 1]),
                  backend.name)  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_the_same_integers(backend: Target, stream: tuple[int, int]) -> None:
    rng = torch.tensor(stream, dtype=torch.int64)
    m = uniform_mantissas(4101, rng.to(backend.device), backend.name)
    assert torch.equal(m, philox_words(*stream, 1026).flatten()[:4101] >> 9)


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 6, 3, 5, 4), (1, 1000, 2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_the_same_integers_in_every_layout(
    backend: Target, shape: tuple[int, ...], layout: str
) -> None:
    count = torch.Size(shape).numel()
    rng = torch.tensor([123456789, 2**40 + 3], device=backend.device)
    m = uniform_mantissas(count, rng, backend.name, layout, shape)
    expected = philox_words(123456789, 2**40 + 3, (count + 3) // 4).flatten()[:count] >> 9
    assert torch.equal(m, expected)


def test_term_j_draws_at_offset_plus_j(backend: Target) -> None:
    def noise_at(position: int, noisy: list[int], stream: tuple[int, int]) -> torch.Tensor:
        x = [torch.zeros(103, device=backend.device)] * 3
        w = torch.zeros(3, device=backend.device)
        w[position] = 1
        rng = torch.tensor(stream, device=backend.device)
        return fastnas.mixed_sum(x, w, noise=SkipNoise("uniform"), noisy=noisy, rng=rng,
                                 backend=backend.name)  # fmt: skip

    second = noise_at(0, [2, 0], (5, 2**32 - 1))
    assert torch.equal(second, noise_at(0, [0], (5, 2**32)))
    assert torch.equal(second, noise_at(1, [1], (5, 2**32)))
    assert not torch.equal(second, noise_at(2, [2, 0], (5, 2**32 - 1)))
    assert not torch.equal(second, noise_at(0, [0], (6, 2**32)))


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("form", FORMS[:2])
def test_gaussian_sums_agree_with_eager_to_rounding(backend: Target, form: str) -> None:
    noise = noise_of(form)
    inputs = make((2, 4, 30, 31), 3, torch.float32, backend.device, noise=noise, noisy=[0, 2])
    got, eager = run(inputs, backend.name).named(), by_eager(inputs).named()
    for name, t in got.items():
        assert t is not None
        torch.testing.assert_close(t.cpu(), eager[name], rtol=2e-5, atol=2e-5)


@pytest.mark.backends("eager", "cpu", "cuda")
@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_statistics(backend: Target, kind: str) -> None:
    """Mean, variance and fourth moment within 5 standard errors; no correlation of neighbours,
    of the members of a quad, or of two offsets or keys."""
    count = 40_000

    def sample(stream: tuple[int, int]) -> torch.Tensor:
        x = torch.ones(count, device=backend.device)
        noise = SkipNoise(kind, "multiplicative")
        level = torch.tensor([0.0, 1.0], dtype=torch.float64, device=backend.device)
        rng = torch.tensor(stream, device=backend.device)
        one = torch.ones(1, device=backend.device)
        y = fastnas.mixed_sum(
            [x], one, noise=noise, noisy=[0], level=level, rng=rng, backend=backend.name
        )
        return y.double().cpu()

    eps = sample((2024, 7))
    moments = {"gaussian": (1.0, 3.0, 105.0), "uniform": (1 / 3, 1 / 5, 1 / 9)}[kind]
    second, fourth, eighth = moments
    error = count**-0.5
    assert eps.mean().abs() < 5 * second**0.5 * error
    assert (eps.square().mean() - second).abs() < 5 * (fourth - second**2) ** 0.5 * error
    assert (eps.pow(4).mean() - fourth).abs() < 5 * (eighth - fourth**2) ** 0.5 * error
    if kind == "gaussian":
        share = (eps.abs() < 1).double().mean()
        assert (share - 0.6826894921).abs() < 5 * 0.4654 * error
        assert eps.abs().max() < 5.9  # the largest radius of 23 bits
    else:
        assert eps.abs().max() < 1

    def uncorrelated(a: torch.Tensor, b: torch.Tensor) -> bool:
        for f in (lambda t: t, torch.abs):
            r = torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1]
            if r.abs() > 5 * len(a) ** -0.5:
                return False
        return True

    for lag in (1, 2, 3, 4, 256, 1024, 4096):
        assert uncorrelated(eps[lag:], eps[:-lag]), lag
    for i in range(4):
        for j in range(i):
            assert uncorrelated(eps[i::4], eps[j::4]), (i, j)
    for stream in ((2024, 8), (2025, 7), (2024, 7 + 2**32), (2024 + 2**32, 7)):
        assert uncorrelated(eps, sample(stream)), stream


def test_manual_seed_governs(backend: Target) -> None:
    inputs = make((5, 31), 2, torch.float32, backend.device, noise=SkipNoise(), noisy=[0])
    inputs = replace(inputs, level=None, rng=None)

    def seeded(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [run(inputs, backend.name).y for _ in range(2)]

    first, second = seeded(3)
    again = seeded(3)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, seeded(4)[0])


def test_no_noise_where_no_term_is_named(backend: Target) -> None:
    inputs = make((5, 31), 2, torch.float32, backend.device)
    state = torch.get_rng_state()
    quiet = run(inputs, backend.name).y
    assert torch.equal(run(replace(inputs, noise=SkipNoise()), backend.name).y, quiet)
    assert torch.equal(torch.get_rng_state(), state)


def test_default_level_is_amplitude_one(backend: Target) -> None:
    noise = SkipNoise("uniform", "multiplicative", mean=0.5, factor=0.1)
    inputs = make((5, 31), 2, torch.float32, backend.device, noise=noise, noisy=[1])
    assert torch.equal(
        run(replace(inputs, level=None), backend.name).y, run(inputs, backend.name).y
    )
    check(replace(inputs, level=noise.level(0.25, torch.device(backend.device))), backend.name)


def test_draw_rng() -> None:
    torch.manual_seed(1)
    streams = draw_rng(1000)
    assert streams.shape == (1000, 2)
    assert streams.dtype == torch.int64
    assert (streams >= 0).all()
    assert (streams >= 2**60).any()
    assert len(streams.unique(dim=0)) == 1000
    torch.manual_seed(1)
    assert torch.equal(draw_rng(1000), streams)
