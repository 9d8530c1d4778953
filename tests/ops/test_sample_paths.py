"""sample_paths: the same integers on every backend, exact weights, gradients, special logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from path_cases import DARTS, by_closed_form, check_paths, draw, make_paths, run
from targets import Target
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnas import reference
from fastnas.backends import BACKENDS
from fastnas.ops import sample_paths
from fastnas.reference import TOPOLOGIES
from fastnas.reference.gumbel import gumbel_draw

OP = "sample_paths"
EVERY_TOPOLOGY = pytest.mark.parametrize("topology", TOPOLOGIES)
ROUGH = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
# Interpreted kernels are slow, and what these hold follows from one test of the others.
QUICK = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")
pytestmark = ROUGH  # the Triton interpreter warns where NaN or wrapping integers are meant


@EVERY_TOPOLOGY
def test_a_darts_cell(backend: Target, dtype: torch.dtype, topology: str) -> None:
    if backend.id == "triton-interpreter" and (dtype == torch.float32) != (topology == "top2"):
        return  # 1.5 s each; both dtypes have a topology
    got = check_paths(make_paths(topology, paths=1, dtype=dtype), backend.name)
    kept = got["op"] >= 0
    assert set(got["weight"].unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(got["weight"] == 1, kept)
    per_node = torch.stack([part.sum(-1) for part in kept.split(list(DARTS), -1)], -1)
    assert torch.equal(per_node, torch.tensor(DARTS).expand(1, 2, 4)) == (topology == "none")
    assert topology == "none" or bool((per_node == 2).all())


@EVERY_TOPOLOGY
@pytest.mark.parametrize(
    ("nodes", "O", "lead", "paths"),
    [((2,), 1, (), 1), ((3, 2), 33, (1,), 2), ((4,), 128, (), 1), ((9,), 5, (2, 1), 1),
     ((2, 2, 3), 2, (3,), 9)],
    ids=str,
)  # fmt: skip
def test_shapes(
    backend: Target,
    topology: str,
    nodes: Sequence[int],
    O: int,
    lead: Sequence[int],
    paths: int,
) -> None:
    if backend.id == "triton-interpreter" and sum(nodes) * paths > 10:
        return
    check_paths(make_paths(topology, nodes, O, lead, paths), backend.name)


@QUICK
@EVERY_TOPOLOGY
@pytest.mark.parametrize("seed", range(20))
def test_many_samples(backend: Target, dtype: torch.dtype, topology: str, seed: int) -> None:
    tau = 10 ** (1 - seed / 10)
    inputs = make_paths(topology, paths=17, dtype=dtype, tau=tau, seed=seed)
    check_paths(inputs, backend.name)


@pytest.mark.backends("cpu", "cuda")
@EVERY_TOPOLOGY
def test_more_edges_than_a_tile_and_more_paths_than_a_thread(
    backend: Target, topology: str
) -> None:
    check_paths(make_paths(topology, (16, 7, 16), 65, (2,), 40, torch.float32), backend.name)


def test_the_noise_has_the_same_bits(backend: Target) -> None:
    """Logits -g make every row a tie of exact zeros, which one bit of one g would break."""
    cells = {"triton": 3, "cuda-host": 100}.get(backend.name, 5000)
    rng = torch.tensor([-9, 2**62])
    alpha = -gumbel_draw(rng, 0, (cells, *DARTS[:1], 7))
    beta = -gumbel_draw(rng, 1, (cells, 3 * 2 // 2 - 1))
    given = {"nodes": (2,), "tau": 1.0, "rng": rng.to(backend.device), "backend": backend.name}
    sample = sample_paths(alpha.to(backend.device), beta.to(backend.device), topology="top2",
                          **given)  # fmt: skip
    assert not sample.op.any()
    beta = -gumbel_draw(rng, 1, (cells, 6))
    alpha = alpha[:, :1].repeat(1, 4, 1)
    given["nodes"] = (4,)
    sample = sample_paths(alpha.to(backend.device), beta.to(backend.device), topology="pairs",
                          **given)  # fmt: skip
    assert torch.equal(
        (sample.op >= 0).cpu(), torch.tensor([1, 1, 0, 0]).bool().expand(1, cells, 4)
    )


@pytest.mark.backends("cpu")
def test_every_instruction_set_has_the_same_bits(backend: Target) -> None:
    module = BACKENDS["cpu"].module  # type: ignore[attr-defined]
    usual = module.isa()
    try:
        for isa in module.supported_isas():
            module.use_isa(isa)
            test_the_noise_has_the_same_bits(backend)
            check_paths(make_paths("pairs", paths=5), "cpu")
    finally:
        module.use_isa(usual)


@pytest.mark.backends("cpu")
@EVERY_TOPOLOGY
def test_threads_do_not_change_a_bit(backend: Target, topology: str) -> None:
    inputs = make_paths(topology, paths=200, dtype=torch.float32)
    torch.set_num_threads(1)
    want = run(inputs, backend.name)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        got = run(inputs, backend.name)
        assert all(torch.equal(got[name], want[name]) for name in want)


@QUICK
@EVERY_TOPOLOGY
def test_repeats_to_the_bit(backend: Target, topology: str) -> None:
    inputs = make_paths(topology, (3,), 5, (), 2, dtype=torch.float32)
    first, second = run(inputs, backend.name), run(inputs, backend.name)
    assert all(torch.equal(first[name], second[name]) for name in first)


@QUICK
@EVERY_TOPOLOGY
def test_a_temperature_changes_no_draw(backend: Target, topology: str) -> None:
    inputs = make_paths(topology, (3, 2), 4, (), 1).to(backend.device)
    drawn = [draw(replace(inputs, tau=tau), backend.name).op for tau in (0.01, 1.0, 30.0)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("dtype_of_tau", [torch.float32, torch.float64])
def test_a_temperature_on_the_device(backend: Target, dtype_of_tau: torch.dtype) -> None:
    inputs = make_paths("top2", (3,), 4, (), 1, tau=0.5)
    on_device = replace(inputs, tau=torch.tensor(0.5, dtype=dtype_of_tau, device=backend.device))
    got, want = run(on_device, backend.name), run(inputs, backend.name)
    assert all(torch.equal(got[name], want[name]) for name in want)


@QUICK
def test_paths_of_one_call_are_those_of_a_longer_one(backend: Target) -> None:
    inputs = make_paths("pairs", (3,), 4, (), 1).to(backend.device)
    one, three = (draw(replace(inputs, paths=paths), backend.name).op for paths in (1, 3))
    assert torch.equal(one, three[:1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("topology", ["top2", "pairs"])
def test_special_logits(backend: Target, topology: str, value: float) -> None:
    """One in alpha, one in beta, and a row that is nothing else."""
    if backend.id == "triton-interpreter" and topology == "pairs" and value == value:
        return
    inputs = make_paths(topology, (3, 2, 4), 4, (), 2)
    assert inputs.beta is not None
    alpha, beta = inputs.alpha.clone(), inputs.beta.clone()
    alpha[0, 2] = value
    alpha[3] = value
    beta[1] = value
    inputs = replace(inputs, alpha=alpha, beta=beta)
    got = check_paths(inputs, backend.name, by_closed_form)
    assert bool(((got["op"] >= -1) & (got["op"] < 4)).all())
    assert bool(((got["op"] >= 0).sum(-1) == 6).all())
    assert got["weight"].isnan().any()


@EVERY_TOPOLOGY
def test_two_predecessors_are_both_kept_without_a_gradient(backend: Target, topology: str) -> None:
    inputs = make_paths(topology, (2, 2), 3, (), 3)
    got = run(inputs, backend.name)
    assert bool((got["op"] >= 0).all())
    if topology != "none":
        assert torch.equal(got["dbeta"], torch.zeros_like(got["dbeta"]))


@QUICK
def test_layouts_do_not_change_a_bit(backend: Target) -> None:
    inputs = make_paths("top2", (3,), 4, (2,), 1, dtype=torch.float32)
    assert inputs.beta is not None
    want = run(inputs, backend.name)
    strided = replace(
        inputs,
        alpha=inputs.alpha.transpose(1, 2).contiguous().transpose(1, 2),
        beta=torch.stack([inputs.beta, inputs.beta], -1)[..., 0],
        rng=torch.stack([inputs.rng, inputs.rng], -1)[:, 0],
        dweight=inputs.dweight[..., :1].expand_as(inputs.dweight),
    )
    got = run(strided, backend.name)
    assert all(torch.equal(got[name], want[name]) for name in ("op", "weight"))
    same = run(replace(inputs, dweight=strided.dweight.contiguous()), backend.name)
    assert all(torch.equal(got[name], same[name]) for name in got)


@EVERY_TOPOLOGY
def test_no_cells_at_all(backend: Target, topology: str) -> None:
    got = run(make_paths(topology, (3,), 4, (0,), 2), backend.name)
    assert got["op"].shape == (2, 0, 3)
    assert got["dalpha"].shape == (0, 3, 4)


@pytest.mark.backends("eager", "cpu", "cuda")
def test_draws_are_governed_by_the_seed(backend: Target) -> None:
    alpha = torch.zeros(2, 14, 7, device=backend.device)

    def drawn(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [sample_paths(alpha, nodes=DARTS, tau=1.0, backend=backend.name).op for _ in "ab"]

    first, second = drawn(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, drawn(1)[0])
    assert torch.equal(second, drawn(1)[1])


@EVERY_TOPOLOGY
def test_the_reference_waits_for_no_value(topology: str) -> None:
    """A fake tensor has no values: an .item() on the way would raise."""
    with FakeTensorMode():
        inputs = make_paths(topology)
        given = inputs.alpha, inputs.beta, inputs.nodes, topology, inputs.tau, inputs.rng
        op, weight = reference.sample_paths(*given, 2)
        reference.sample_paths_grads(*given, op, weight)
