"""mixed_norm_sum on every backend and dtype: values, gradients, statistics, noise, layouts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import norm_cases
import pytest
import torch
from cases import FORMS, LAYOUTS, bits, laid_out, noise_of
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import BACKENDS_OF_CASES, EPS, Inputs, by_eager, check, make, run
from targets import Target
from torch import nn

import fastnas

OP = "mixed_norm_sum"
pytestmark = [
    BACKENDS_OF_CASES,
    # Interpreted Triton computes in numpy, which warns of what inf and NaN do.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

MIXED = [True, False, True]
# One image, one pixel, more than a tile, channels that straddle tiles, ranks 2 to 5, images that
# straddle parts.
# (2, 2, 33, 37) and (3, 40, 5, 5) are more than a tile of Triton's in either direction.
SHAPES = [
    (2, 1), (5, 7), (100, 1030), (3, 4, 1), (2, 3, 5), (2, 3, 5, 7), (1, 2, 3, 3), (4, 1, 5, 5),
    (3, 5, 40, 41), (37, 3, 4, 4), (2, 600, 3, 3), (2, 3, 2, 4, 5), (3, 4, 1, 1), (70, 24, 16, 16),
    (3, 2, 65, 64), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4),
    (2, 2, 33, 37), (3, 40, 5, 5),
]  # fmt: skip


@pytest.mark.parametrize("terms", [*range(1, 17), 128])
def test_every_number_of_terms(backend: Target, terms: int) -> None:
    if backend.id == "triton-interpreter":
        terms = min(terms, 40)
    normed = [k % 3 != 1 for k in range(terms)]
    dtype = backend.in_turn(OP, terms)
    check(make((3, 2, 7, 5), normed, dtype, backend.device), backend.name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_and_rank(
    backend: Target, shape: tuple[int, ...], layout: str, training: bool
) -> None:
    if backend.id == "triton-interpreter" and torch.Size(shape).numel() > 10_000:
        pytest.skip("too large for an interpreter")
    turn = SHAPES.index(shape) + training
    # Outside of training nothing is summed but the gradients: one dtype for each size will do.
    for dtype in backend.some_dtypes(OP, turn) if training else [backend.in_turn(OP, turn)]:
        inputs = make(shape, MIXED, dtype, backend.device, layouts=[layout], dy_layout=layout,
                      training=training)  # fmt: skip
        check(inputs, backend.name)


@pytest.mark.parametrize("normed", [[True], [False], [True] * 5, [False, False]], ids=str)
def test_all_normed_and_none(backend: Target, normed: list[bool]) -> None:
    for dtype in backend.some_dtypes(OP, len(normed)):
        check(make((2, 3, 5, 7), normed, dtype, backend.device), backend.name)


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(backend: Target, layout: str, dy_layout: str) -> None:
    inputs = make((2, 3, 5, 7), MIXED, torch.float32, backend.device, layouts=[layout],
                  dy_layout=dy_layout)  # fmt: skip
    check(inputs, backend.name)


def test_mixed_layouts(backend: Target, dtype: torch.dtype) -> None:
    inputs = make((2, 3, 5, 7), [True] * 6, dtype, backend.device, layouts=LAYOUTS)
    check(inputs, backend.name)


def test_all_channels_last_stays_channels_last(backend: Target) -> None:
    last = "channels_last"
    got = run(make((2, 3, 5, 7), MIXED, torch.float32, backend.device, layouts=[last],
                   dy_layout=last), backend.name)  # fmt: skip
    for t in (got.y, *got.dx):
        assert t is not None
        assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_w_of_another_dtype(backend: Target, w_dtype: torch.dtype) -> None:
    for dtype in backend.some_dtypes(OP, w_dtype.itemsize // 2):
        got = check(make((5, 31), MIXED, dtype, backend.device, w_dtype=w_dtype), backend.name)
        assert got.dw is not None
        assert got.dw.dtype == w_dtype


@pytest.mark.parametrize("w", [[0, 0, 0], [0, 1, 0], [1, 0, 0], [-1, 2, 0.5]], ids=str)
def test_plain_weights(backend: Target, w: list[float]) -> None:
    for dtype in backend.some_dtypes(OP, sum(map(bool, w))):
        inputs = make((2, 3, 5, 7), MIXED, dtype, backend.device)
        weights = torch.tensor(w, dtype=dtype, device=backend.device)
        got = check(replace(inputs, w=weights), backend.name)
        for dz, w_k in zip(got.dx, w):
            assert dz is not None
            assert w_k or not dz.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_inputs_far_from_zero(
    backend: Target, dtype: torch.dtype, offset: float, layout: str
) -> None:
    """The mean is 100 standard deviations away; as a whole, too, at most twice eager's error."""
    inputs = make((9, 2, 17, 19), MIXED, dtype, backend.device, offset=offset, layouts=[layout])
    got = check(inputs, backend.name).named()
    exact, eager = by_eager(inputs, torch.float64).named(), by_eager(inputs).named()
    for name in ("y", "dx[0]", "dx[2]"):
        found, want, like = got[name], exact[name], eager[name]
        assert found is not None and want is not None and like is not None
        found = found.cpu()
        slack = torch.finfo(dtype).eps * want.abs().max() + (1e-10 if dtype == torch.double else 0)
        assert (found - want).abs().max() <= 2 * (like - want).abs().max() + slack, name


def test_images_that_differ_more_than_their_pixels(backend: Target) -> None:
    """As one-pass sums of squares would lose it: each image has its own mean."""
    inputs = make((40, 3, 8, 8), [True], torch.float32, backend.device)
    steps = torch.arange(40.0, device=backend.device).view(-1, 1, 1, 1) % 7 * 1e3
    check(replace(inputs, z=[inputs.z[0] + steps]), backend.name)


@pytest.mark.backends("cpu", "cuda-host", "cuda", "triton")
def test_a_constant_channel(backend: Target, dtype: torch.dtype) -> None:
    inputs = make((4, 3, 5, 5), [True], dtype, backend.device)
    z = inputs.z[0].clone()
    z[:, 1] = 3.0
    got = run(replace(inputs, z=[z]), backend.name)
    assert not got.y[:, 1].any()


SPECIAL = [torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("where", ["z", "dy", "w"])
def test_inf_and_nan_spread_as_in_eager(
    backend: Target, where: str, layout: str, training: bool
) -> None:
    for special, dtype in product(SPECIAL, backend.some_dtypes(OP, len(where) + training)):
        inputs = make((4, 5, 3, 3), MIXED, dtype, backend.device, layouts=[layout],
                      training=training)  # fmt: skip
        z, w, dy = [t.clone() for t in inputs.z], inputs.w.clone(), inputs.dy.clone()
        if where == "z":
            z[0][1, 2, 0, 1] = z[1][2, 3, 1, 1] = special
        elif where == "dy":
            dy[3, 1, 2, 2] = special
        else:
            w[2] = special
        given = replace(inputs, z=z, w=w, dy=dy)
        eager = by_eager(given).named()
        for name, found in run(given, backend.name).named().items():
            assert found is not None
            torch.testing.assert_close(
                found.cpu(), eager[name], equal_nan=True, rtol=0.05, atol=0.05,
                msg=lambda text, name=name, special=special: f"{name}, {special}: {text}",
            )  # fmt: skip


def test_empty_batch(backend: Target, dtype: torch.dtype) -> None:
    """As batch_norm: empty results, dw 0, the running statistics left alone."""
    on = {"device": backend.device}
    running = [(torch.full((3,), 2.0, **on), torch.full((3,), 5.0, **on)), None]
    z = [torch.empty(0, 3, 4, 4, dtype=dtype, **on).requires_grad_() for _ in range(2)]
    w = torch.ones(2, requires_grad=True, **on)
    y = fastnas.mixed_norm_sum(z, w, normed=[True, False], running=running, backend=backend.name)
    dw, *dz = torch.autograd.grad(y.sum(), [w, *z])
    assert y.shape == dz[0].shape == dz[1].shape == (0, 3, 4, 4)
    assert dw.tolist() == [0, 0]
    assert running[0] is not None
    assert running[0][0].tolist() == [2] * 3 and running[0][1].tolist() == [5] * 3


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_statistics_are_those_of_batch_norm(
    backend: Target, dtype: torch.dtype, layout: str, momentum: float
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    on = {"device": backend.device, "dtype": wide}
    modules = [nn.BatchNorm2d(5, EPS, momentum, affine=False, **on) for _ in range(2)]
    running: list[tuple[torch.Tensor, torch.Tensor] | None] = [
        (torch.zeros(5, **on), torch.ones(5, **on)) for _ in range(2)
    ]
    running.insert(1, None)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5

    def compare(training: bool, seed: int) -> None:
        z = make((4, 5, 3, 7), MIXED, dtype, backend.device, offset=3.0, layouts=[layout],
                 seed=seed).z  # fmt: skip
        y = fastnas.mixed_norm_sum(z, z[0].new_ones(3), normed=MIXED, eps=EPS, running=running,
                                   momentum=momentum, training=training,
                                   backend=backend.name)  # fmt: skip
        want = modules[0](z[0]) + z[1] + modules[1](z[2])
        rough = max(tolerance, 4 * torch.finfo(dtype).eps) if dtype != torch.float64 else tolerance
        torch.testing.assert_close(y, want, rtol=rough, atol=8 * rough)
        for module, pair in zip(modules, (running[0], running[2])):
            assert pair is not None
            for got, torchs in zip(pair, (module.running_mean, module.running_var)):
                torch.testing.assert_close(got, torchs, rtol=tolerance, atol=tolerance)

    for seed in range(3):
        compare(True, seed)
    for module in modules:
        module.eval()
    compare(False, 3)


def test_running_mean_of_inf_is_inf(backend: Target) -> None:
    z = torch.randn(4, 2, 3, 3, device=backend.device)
    z[0, 1, 0, 0] = torch.inf
    running = (z.new_zeros(2), z.new_ones(2))
    fastnas.mixed_norm_sum([z], z.new_ones(1), normed=[True], running=[running],
                           backend=backend.name)  # fmt: skip
    assert running[0].isfinite().tolist() == [True, False]
    assert running[0][1] == torch.inf
    assert running[1][1].isnan()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_noise_by_the_rule(backend: Target, form: str, training: bool, layout: str) -> None:
    dtype = backend.in_turn(OP, FORMS.index(form) + training + 2 * (layout == "contiguous"))
    inputs = make((3, 5, 7, 11), [True, False, True, False], dtype, backend.device,
                  noise=noise_of(form), noisy=[3, 1], layouts=[layout], dy_layout=layout,
                  training=training)  # fmt: skip
    check(inputs, backend.name)
    check(inputs, backend.name, [False, True, False, False, True])


@pytest.mark.parametrize("size", [(17, 21), (18, 22)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_noise_is_that_of_mixed_sum(
    backend: Target, form: str, layout: str, size: tuple[int, int]
) -> None:
    """In images of a multiple of four pixels and others: Philox draws four at a time."""
    inputs = make((2, 3, *size), [False, False], torch.float32, backend.device,
                  noise=noise_of(form), noisy=[1], layouts=[layout])  # fmt: skip
    y = run(inputs, backend.name).y
    same = fastnas.mixed_sum(inputs.z, inputs.w, noise=inputs.noise, noisy=[1], level=inputs.level,
                             rng=inputs.rng, backend=backend.name)  # fmt: skip
    torch.testing.assert_close(y, same, rtol=1e-6, atol=1e-6)


def test_noise_from_the_generator(backend: Target) -> None:
    inputs = make((3, 5, 4, 4), MIXED, torch.float32, backend.device)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return fastnas.mixed_norm_sum(inputs.z, inputs.w, normed=MIXED, noisy=[1],
                                      noise=fastnas.SkipNoise(), backend=backend.name)  # fmt: skip

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 5, 33, 31), (200, 24, 8, 8)], ids=str)
def test_threads_do_not_change_a_bit(
    backend: Target, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    inputs = make(shape, MIXED, dtype, noise=noise_of("gaussian_additive"), noisy=[1],
                  layouts=[layout], dy_layout=layout)  # fmt: skip
    outcomes = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        outcomes.append(run(inputs, "cpu").named())
    for other in outcomes[1:]:
        for name, found in outcomes[0].items():
            assert torch.equal(bits(found), bits(other[name])), name


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_vector_width(isa: str) -> None:
    native = pytest.importorskip("fastnas._C")
    if isa not in native.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    before = native.isa()
    native.use_isa(isa)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for layout in ("contiguous", "channels_last"):
                for terms in (1, 3, 7):
                    normed = [k != 1 for k in range(terms)]
                    check(make((5, 7, 9, 11), normed, dtype, layouts=[layout]), "cpu")
                check(make((5, 7, 9, 11), MIXED, dtype, noise=noise_of("gaussian_additive"),
                           noisy=[1], layouts=[layout]), "cpu")  # fmt: skip
    finally:
        native.use_isa(before)


def test_inputs_are_not_written(backend: Target) -> None:
    inputs = make((2, 3, 5, 7), MIXED, torch.float32, backend.device, training=False)
    assert inputs.statistics is not None
    tensors = (*inputs.z, inputs.w, inputs.dy, *inputs.statistics)
    before = [t.clone() for t in tensors]
    run(inputs, backend.name)
    assert all(torch.equal(t, saved) for t, saved in zip(tensors, before))


def test_one_tensor_given_twice(backend: Target) -> None:
    inputs = make((5, 31), [True, False], backend.dtypes(OP)[-1], backend.device)
    z = inputs.z[0].clone().requires_grad_()
    got = run(replace(inputs, z=[z, z]), backend.name).dx
    y = norm_cases.call(inputs, [z, z], inputs.w, backend.name)
    (dz,) = torch.autograd.grad(y, z, inputs.dy)
    assert got[0] is not None and got[1] is not None
    torch.testing.assert_close(dz, got[0] + got[1])


@st.composite
def calls(draw: st.DrawFn, dtypes: list[torch.dtype], device: str) -> Inputs:
    terms = draw(st.integers(1, 6))
    normed = draw(st.lists(st.booleans(), min_size=terms, max_size=terms))
    skips = [k for k, wanted in enumerate(normed) if not wanted]
    noisy = draw(st.lists(st.sampled_from(skips), unique=True, max_size=2)) if skips else []
    return make(
        # Two values of a channel have |v| = 1 whatever they are: dz is nothing but rounding.
        [draw(st.integers(3, 9)), *draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))],
        normed,
        draw(st.sampled_from(dtypes)),
        device,
        noise=noise_of(draw(st.sampled_from(FORMS))),
        noisy=noisy,
        training=draw(st.booleans()),
        layouts=draw(st.lists(st.sampled_from(LAYOUTS[:5]), min_size=1, max_size=3)),
        dy_layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**20)),
    )


def test_drawn_shapes(backend: Target) -> None:
    dtypes = [d for d in backend.dtypes(OP) if d in (torch.float32, torch.float64)]
    examples = 8 if backend.id == "triton-interpreter" else 40

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(
        inputs=calls(dtypes, backend.device),
        needs=st.lists(st.booleans(), min_size=7, max_size=7),
    )
    def check_drawn(inputs: Inputs, needs: list[bool]) -> None:
        check(inputs, backend.name, needs[: 1 + len(inputs.z)])

    check_drawn()


def test_a_term_that_is_expanded(backend: Target) -> None:
    inputs = make((2, 3, 5, 7), MIXED, torch.float32, backend.device)
    z = [laid_out(t, "expanded") for t in inputs.z]
    check(replace(inputs, z=z), backend.name)
