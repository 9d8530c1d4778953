"""What the CUDA kernels of mixed_norm_sum promise beyond the rule: any order of threads, parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import bits, laid_out, noise_of
from host_cuda import HostCudaBackend
from norm_cases import Inputs, check, make, run

from fastnas.backends.calls import NO_NOISE, NormSumCall
from fastnas.backends.outputs import Place

MIXED = [True, False, True]
# Two parts of a channel and more, whole 16-byte loads or not; ten sums are two groups of a barrier.
SHAPES = [(5, 2, 30, 30), (5, 2, 31, 29), (2, 35, 12, 12)]


def results(inputs: Inputs, cuda_host: HostCudaBackend, seed: int = 0) -> dict[str, torch.Tensor]:
    cuda_host.seed(seed)
    found = {name: bits(t) for name, t in run(inputs, cuda_host.name).named().items()}
    cuda_host.seed(0)
    return found


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, t in got.items():
        assert torch.equal(t, want[name]), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_threads_gives_the_same_bits(
    cuda_host: HostCudaBackend, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    """Every kernel, in eight orders: a missing barrier would show."""
    inputs = make(shape, [*MIXED] * 3, dtype, noise=noise_of("gaussian_additive"), noisy=[1],
                  layouts=[layout], dy_layout=layout)  # fmt: skip
    first = results(inputs, cuda_host)
    for seed in range(1, 8):
        same(results(inputs, cuda_host, seed), first)
    check(inputs, cuda_host.name)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_weights_and_frozen_terms_in_any_order(
    cuda_host: HostCudaBackend, training: bool
) -> None:
    inputs = make((5, 3, 31, 29), MIXED, torch.float32, noise=noise_of("uniform_multiplicative"),
                  noisy=[1], training=training)  # fmt: skip
    wanted = [True, False, False, False], [False, True, False, True], [False, False, True, False]
    for seed in range(4):
        cuda_host.seed(seed)
        for needs in wanted:
            check(inputs, cuda_host.name, needs)
    cuda_host.seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_alignment_does_not_change_a_bit(cuda_host: HostCudaBackend, dtype: torch.dtype) -> None:
    """Loads of 16 bytes and loads of one value add in the same order, and draw the same noise."""
    inputs = make((5, 3, 32, 32), MIXED, dtype, noise=noise_of("gaussian_additive"), noisy=[1])
    apart = replace(inputs, z=[laid_out(t, "misaligned") for t in inputs.z])
    assert any(t.data_ptr() % 16 for t in apart.z)
    same(results(apart, cuda_host), results(inputs, cuda_host))


@pytest.mark.parametrize(
    ("shape", "channels_last", "parts"),
    [
        ((64, 16, 32, 32), False, 16),  # 65,536 values of a channel by 4,096
        ((64, 16, 32, 32), True, 256),  # by 256 pixels of 16 channels
        ((64, 64, 8, 8), False, 1),
        ((64, 64, 8, 8), True, 32),  # by 128 pixels of 32 channels
        ((1, 3, 4096, 1), False, 1),
        ((1, 3, 4097, 1), False, 2),
        ((513, 3, 1, 1), False, 2),  # one pixel: channels last, by 512 of 8 channels
    ],
    ids=str,
)
def test_parts_of_a_channel(
    cuda_host: HostCudaBackend, shape: tuple[int, ...], channels_last: bool, parts: int
) -> None:
    """Enough blocks for a GPU where a channel has many values: not one a channel."""
    n, pixels = torch.Size(shape).numel(), torch.Size(shape[2:]).numel()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    place = Place(layout, channels_last, shape[1], pixels)
    assert cuda_host.kernels["mixed_norm_sum"].parts(n, place) == parts


def test_more_shared_memory_than_the_default(cuda_host: HostCudaBackend) -> None:
    """128 terms of 32 channels: the table of backward is 64 KiB."""
    normed = [k % 5 > 0 for k in range(128)]
    check(make((3, 40, 2, 2), normed, torch.float32, layouts=["channels_last"],
               dy_layout="channels_last"), cuda_host.name)  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_100_000_deviations_from_zero(cuda_host: HostCudaBackend, layout: str) -> None:
    """The mean to its last bit, the variance to 1e-6: parts are centred before they are merged."""
    (z,) = make((5, 3, 31, 29), [True], torch.float32, offset=1e5, layouts=[layout]).z
    call = NormSumCall([z], torch.ones(1), [True], 1e-5, None, None, NO_NOISE)
    _, (_, mean, var) = cuda_host.kernels["mixed_norm_sum"].forward(call)
    exact = z.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean[0].double(), exact.mean(1), rtol=2**-24, atol=0)
    torch.testing.assert_close(var[0].double(), exact.var(1, correction=0), rtol=1e-6, atol=0)


def test_a_given_mean_of_inf_meets_only_what_there_is(cuda_host: HostCudaBackend) -> None:
    """dw = <dy, v> is -inf where dy > 0, not NaN of the threads that have no value."""
    inputs = make((5, 3, 31, 29), [True], torch.float32, training=False)
    assert inputs.statistics is not None
    inputs.statistics[0][0, 1] = torch.inf
    got = run(replace(inputs, dy=inputs.dy.abs()), cuda_host.name)
    assert got.dw is not None
    assert got.dw.tolist() == [-torch.inf]
