"""What the compiled kernels promise beyond the rule: threads, vector widths, order of execution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import FORMS, Inputs, bits, check, make, noise_of, run, uniform_mantissas
from host_cuda import HostCudaBackend
from targets import Target

import fastnas
from fastnas.reference.skip_noise import philox_words

OP = "mixed_sum"
RELATIVE = noise_of("gaussian_additive")


def same_bits(inputs: Inputs, backend: str, others: list[dict[str, torch.Tensor | None]]) -> None:
    for name, found in run(inputs, backend).named().items():
        for other in others:
            assert torch.equal(bits(found), bits(other[name])), name


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("form", [None, *FORMS])
def test_threads_do_not_change_a_bit(backend: Target, dtype: torch.dtype, form: str | None) -> None:
    noise = None if form is None else noise_of(form)
    inputs = make((40_001,), 3, dtype, noise=noise, noisy=[0, 2] if form else [])
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outcomes.append(run(inputs, "cpu").named())
    same_bits(inputs, "cpu", outcomes)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native = pytest.importorskip("fastnas._C")
    if request.param not in native.supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_vector_width(isa: str, dtype: torch.dtype) -> None:
    for terms in (1, 2, 3, 4, 5, 7):
        check(make((4097,), terms, dtype), "cpu")
    check(make((4097,), 19, dtype, noise=RELATIVE, noisy=[1]), "cpu")  # more than go side by side
    for form in FORMS:
        check(make((3, 5, 7, 11), 3, dtype, noise=noise_of(form), noisy=[1]), "cpu")
        check(make((3, 5, 7, 11), 3, dtype, noise=noise_of(form), noisy=[1],
                   layouts=["channels_last"], dy_layout="channels_last"), "cpu")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.3337, -2.75, 1e-3, 7e4])
def test_every_16_bit_value_is_converted_as_torch_does(
    isa: str, dtype: torch.dtype, scale: float
) -> None:
    """Subnormals, infinities and NaN too; scaled, so that rounding has all its cases."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).requires_grad_()
    w = torch.tensor([scale], requires_grad=True)
    right = (x.detach().float() * w.detach()).to(dtype)
    y = fastnas.mixed_sum([x], w, backend="cpu")
    dx, _ = torch.autograd.grad(y, [x, w], x.detach())
    for found in (y.detach(), dx):
        assert ((found == right) | found.isnan() & right.isnan()).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_vector_width_draws_the_same_integers(isa: str, layout: str) -> None:
    rng = torch.tensor([987654321, 2**33 + 1])
    m = uniform_mantissas(2 * 3 * 25 * 41, rng, "cpu", layout, (2, 3, 25, 41))
    assert torch.equal(
        m, philox_words(987654321, 2**33 + 1, len(m) // 4 + 1).flatten()[: len(m)] >> 9
    )


def test_vector_widths_agree_to_rounding() -> None:
    native = pytest.importorskip("fastnas._C")
    before = native.isa()
    inputs = make((9001,), 5, torch.float32, noise=RELATIVE, noisy=[1])
    outcomes = []
    for name in native.supported_isas():
        native.use_isa(name)
        outcomes.append(run(inputs, "cpu").named())
    native.use_isa(before)
    for name, found in outcomes[0].items():
        for other in outcomes[1:]:
            torch.testing.assert_close(found, other[name], rtol=1e-5, atol=1e-5)


def test_a_vector_width_that_is_not_there() -> None:
    native = pytest.importorskip("fastnas._C")
    with pytest.raises(
        ValueError, match="unknown instruction set 'sse9'; baseline, avx2 and avx512"
    ):
        native.use_isa("sse9")
    for name in {"avx2", "avx512"} - set(native.supported_isas()):
        with pytest.raises(ValueError, match=f"this CPU has no {name}"):
            native.use_isa(name)


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_any_order_of_threads_gives_the_same_bits(
    cuda_host: HostCudaBackend, form: str | None, terms: int
) -> None:
    """Every kernel, on one block and on two, in eight orders: a missing barrier would show."""
    noise = None if form is None else noise_of(form)
    for size in (300, 4099):
        inputs = make((size,), terms, torch.float32, noise=noise, noisy=[0] if form else [])
        outcomes = []
        for seed in range(8):
            cuda_host.seed(seed)
            outcomes.append(run(inputs, cuda_host.name).named())
        cuda_host.seed(0)
        same_bits(inputs, cuda_host.name, outcomes)
        check(inputs, cuda_host.name)


def test_frozen_weights_and_frozen_terms_in_any_order(cuda_host: HostCudaBackend) -> None:
    inputs = make((4099,), 3, torch.float32, noise=RELATIVE, noisy=[1])
    for seed in range(4):
        cuda_host.seed(seed)
        for needs in ([True, False, False, False], [False, True, False, True]):
            check(replace(inputs), cuda_host.name, needs)
    cuda_host.seed(0)


@pytest.mark.parametrize("module", ["_C", "_cuda"])
def test_a_binding_refuses_what_would_overrun_its_tables(module: str) -> None:
    native = pytest.importorskip(f"fastnas.{module}")
    for terms in (0, native.max_terms + 1):
        with pytest.raises(ValueError, match=f"{terms} terms; 1 to {native.max_terms} are allowed"):
            native.MixedSumParams(x=[0] * terms)
    with pytest.raises(ValueError, match="0 terms"):
        native.MixedSumParams(n=4)
    with pytest.raises(ValueError, match="dx has 2 of 3 terms"):
        native.MixedSumParams(x=[0] * 3, dx=[0] * 2)
    for k in (-1, 3):
        with pytest.raises(ValueError, match=f"noisy is term {k} of 3"):
            native.MixedSumParams(x=[0] * 3, noisy=[k])


def test_a_binding_refuses_names_that_it_has_not() -> None:
    """A field that was misspelled would be null to the kernel."""
    native = pytest.importorskip("fastnas._C")
    with pytest.raises(TypeError, match="MixedSumParams has no field 'z'"):
        native.MixedSumParams(x=[0], z=[0])
    with pytest.raises(ValueError, match="there is no 'gaussian' among none to"):
        native.MixedSumParams(x=[0], form="gaussian")
