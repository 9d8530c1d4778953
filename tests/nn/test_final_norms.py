"""Cells and mixed ops that are not fused: sums with the batch norms that candidates end in."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import assert_same, assert_same_state, observed
from accelerated import calls as calls
from torch import nn

from fastnas import nn as fused
from fastnas import reference, use_backend
from fastnas.nn import NoiseDraw
from fastnas.ops import draw_rng
from fastnas.reference import SkipNoise
from fastnas.spaces import get_space

C = 4
SPACE = get_space("S0")
REPLACED = SPACE.normal[0].index("dil_conv_5x5")
POOL = SPACE.normal[0].index("max_pool_3x3")


def conv_norm(channels, stride):
    """No operation of DARTS, but ends in a batch norm as those do."""
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(channels, affine=False))


class Residual(nn.Module):
    """Made of one `op` that ends in a batch norm, and does more than run it."""

    def __init__(self, channels, stride):
        super().__init__()
        self.op = conv_norm(channels, stride)
        self.stride = stride

    def forward(self, x):
        return x[:, :, :: self.stride, :: self.stride] + self.op(x)


def no_norm(channels, stride):
    return nn.Conv2d(channels, channels, 1, stride, bias=False)


def cells(kind="normal", foreign=conv_norm, **options):
    """The reference cell and ours with the same state, one candidate of every edge foreign."""
    arguments = (SPACE, kind, 6, 8, C, False)
    options["extra"] = {"dil_conv_5x5": foreign}
    eager = reference.Cell(*arguments, **options).double()
    ours = fused.Cell(*arguments, **options).double()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def inputs_of(layout=torch.contiguous_format):
    s0, s1 = torch.randn(3, 6, 8, 8), torch.randn(3, 8, 8, 8)
    w = torch.randn(14, 8).softmax(-1).double()
    states = [t.double().contiguous(memory_format=layout) for t in (s0, s1)]
    return [t.requires_grad_() for t in (*states, w)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("foreign", [conv_norm, Residual, no_norm])
@pytest.mark.parametrize("kind", ["normal", "reduce"])
def test_cell_is_the_reference(calls, kind, foreign, layout):
    """Output, gradients, running statistics and their counters; then in evaluation mode."""
    eager, ours = cells(kind, foreign)
    inputs = inputs_of(layout)
    assert "edge 0, candidate 7" in ours.why_not_fused(inputs[1])
    assert_same(observed(ours, inputs), observed(eager, inputs))
    ends_in_norm = SPACE.nodes if foreign is conv_norm else 0  # the other candidates are fused
    assert calls["mixed_norm_sum"] == ends_in_norm
    assert_same_state(ours, eager)
    eager.eval(), ours.eval()
    assert_same(observed(ours, inputs), observed(eager, inputs))
    assert calls["mixed_norm_sum"] == 2 * ends_in_norm
    assert_same_state(ours, eager)


@pytest.mark.parametrize("foreign", [conv_norm, Residual])
@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_op_is_the_reference(calls, stride, foreign):
    arguments = (["skip_connect", "none", "avg_pool_3x3", "sep_conv_3x3", "own"], C, stride)
    eager = reference.MixedOp(*arguments, extra={"own": foreign}).double()
    ours = fused.MixedOp(*arguments, extra={"own": foreign}).double()
    ours.load_state_dict(eager.state_dict())
    inputs = [torch.randn(2, C, 7, 8).double(), torch.randn(5).softmax(0).double()]
    inputs = [t.requires_grad_() for t in inputs]
    assert_same(observed(ours, inputs), observed(eager, inputs))
    assert calls["mixed_norm_sum"] == (foreign is conv_norm)


@pytest.mark.parametrize("form", ["gaussian", "uniform"])
@pytest.mark.parametrize("kind", ["normal", "reduce"])
def test_noise_on_skips_goes_into_the_same_sum(calls, kind, form):
    noise = SkipNoise(form)
    eager, ours = cells(kind, noise=noise)
    inputs = inputs_of()
    draw = NoiseDraw(noise.level(), draw_rng(SPACE.nodes))

    class ByModules(nn.Module):
        """Every candidate by its module, then the specification of the sum and its noise."""

        def __init__(self):
            super().__init__()
            self.cell = eager

        def forward(self, s0, s1, w):
            states = [eager.preprocess0(s0), eager.preprocess1(s1)]
            for node in range(SPACE.nodes):
                edges = list(eager.edges_into(node))
                terms = [op(x) for e, x in zip(edges, states) for op in eager._ops[e]._ops]
                skips = [8 * position + eager._ops[0].skips[0] for position in range(len(edges))]
                flat = w[edges[0] : edges[-1] + 1].flatten()
                states.append(reference.mixed_sum(terms, flat, skips, noise.form, draw.level,
                                                  draw.rng[node]))  # fmt: skip
            return torch.cat(states[2:], 1)

    expected = observed(ByModules(), inputs)
    assert_same(observed(ours, [*inputs, draw]), expected)
    assert calls == {"mixed_norm_sum": SPACE.nodes}
    assert_same_state(ours, eager)


def test_drop_path_on_skips_comes_before_the_sum(calls):
    eager, ours = cells(skip_drop_path=0.4)
    inputs = inputs_of()
    assert_same(observed(ours, inputs), observed(eager, inputs))
    assert calls == {"mixed_norm_sum": SPACE.nodes}
    assert_same_state(ours, eager)


def test_skips_named_by_index_are_summed_after_their_norm():
    """Noise is on the output of a skip, so its batch norm cannot wait for the sum."""
    ops = [conv_norm(C, 1), nn.Identity()]
    op = fused.MixedOp(ops, C, 1, noise=SkipNoise(), skips=[0]).double()
    terms = op.terms(torch.randn(2, C, 5, 5).double())
    assert terms.noisy == [0] and not terms.norms


def test_an_overridden_reduce_is_given_the_normalised_outputs(calls):
    class Largest(fused.MixedOp):
        def reduce(self, outputs, w, noisy, draw):
            assert all(y.mean().abs() < 1e-12 for y in outputs)
            return torch.stack(list(outputs)).amax(0)

    op = Largest(["avg_pool_3x3", "sep_conv_3x3", conv_norm(C, 1)], C, 1).double()
    x = torch.randn(2, C, 6, 6).double()
    expected = torch.stack([candidate(x) for candidate in copy.deepcopy(op)._ops]).amax(0)
    assert_same([op(x, torch.ones(3).double())], [expected])
    assert not calls


def change_eps(cell):
    cell._ops[3]._ops[POOL][1].eps = 1e-2


def change_momentum(cell):
    cell._ops[0]._ops[POOL][1].momentum = 0.5


def freeze(cell):
    cell._ops[1]._ops[REPLACED][-1].eval()


def freeze_an_edge(cell):
    cell._ops[1].eval()


def make_affine(cell):
    cell._ops[2]._ops[REPLACED][-1] = nn.BatchNorm2d(C).double()


def forget_running_statistics(cell):
    norm = nn.BatchNorm2d(C, affine=False, track_running_stats=False)
    cell._ops[2]._ops[REPLACED][-1] = norm.double()


@pytest.mark.parametrize(
    "change",
    [change_eps, change_momentum, freeze, freeze_an_edge, make_affine, forget_running_statistics],
)
def test_a_batch_norm_unlike_the_others_runs_by_its_module(calls, change):
    eager, ours = cells()
    change(eager), change(ours)
    inputs = inputs_of()
    assert_same(observed(ours, inputs), observed(eager, inputs))
    assert calls == {"mixed_norm_sum": SPACE.nodes}
    assert_same_state(ours, eager)


@pytest.mark.parametrize("path", ["", ".0", ".1"])
def test_hooks_of_a_candidate_and_its_layers_are_called(path):
    eager, ours = cells()
    seen = []
    for cell in (eager, ours):
        for e in range(4):
            module = cell.get_submodule(f"_ops.{e}._ops.{POOL}{path}")
            module.register_forward_hook(lambda module, _, y: seen.append(module) or 2 * y)
    inputs = inputs_of()
    assert_same(observed(ours, inputs), observed(eager, inputs))
    assert len(seen) == 8 and len(set(seen)) == 8
    assert_same_state(ours, eager)


@pytest.mark.parametrize(("kind", "runs"), [("normal", 5), ("reduce", 5)])
def test_a_pool_of_a_state_is_computed_once(monkeypatch, kind, runs):
    _, ours = cells(kind, skip_drop_path=0.1)  # which leaves all candidates to their modules
    count = 0
    forward = nn.MaxPool2d.forward

    def counted(self, x):
        nonlocal count
        count += 1
        return forward(self, x)

    monkeypatch.setattr(nn.MaxPool2d, "forward", counted)
    ours(*inputs_of())
    assert count == runs  # of 14 edges


def test_a_pool_is_computed_again_after_its_input_was_overwritten():
    def overwriting(channels, stride):
        return nn.Sequential(nn.ReLU(inplace=True), no_norm(channels, stride))

    eager, ours = cells(foreign=overwriting)
    with torch.no_grad():
        assert_same([ours(*inputs_of_seed(1))], [eager(*inputs_of_seed(1))])
    with torch.inference_mode():
        assert_same([ours(*inputs_of_seed(2))], [eager(*inputs_of_seed(2))])


def inputs_of_seed(seed):
    torch.manual_seed(seed)
    return [t.detach() for t in inputs_of()]


def test_without_a_kernel_the_norms_run_by_their_modules(calls):
    eager, ours = cells()
    inputs = inputs_of()
    with use_backend("eager"):
        given = observed(ours, inputs)
    assert_same(given, observed(eager, inputs))
    assert not calls


def test_compiles_without_a_graph_break():
    ops = [conv_norm(C, 1), nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(C, affine=False))]
    op = fused.MixedOp([*ops, "skip_connect"], C, 1).double()
    x, w = torch.randn(2, C, 6, 6).double(), torch.randn(3).softmax(0).double()
    op(x, w)  # reads the candidates, which cannot be traced
    again = copy.deepcopy(op)
    torch._dynamo.reset()
    assert_same([torch.compile(op, backend="eager", fullgraph=True)(x, w)], [again(x, w)])
    assert_same_state(op, again)


def test_one_value_per_channel_raises_what_batch_norm_raises():
    op = fused.MixedOp([conv_norm(C, 1), nn.Identity()], C, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        op(torch.randn(1, C, 1, 1), torch.ones(2))


def test_interpreted_triton_sums_a_mixed_op(calls):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the CUDA device here")
    ops = [conv_norm(C, 1), nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(C, affine=False))]
    ours = fused.MixedOp([*ops, "skip_connect"], C, 1)
    eager = reference.MixedOp(list(copy.deepcopy(ours)._ops), C, 1).double()
    inputs = [torch.randn(2, C, 6, 6), torch.randn(3).softmax(0)]
    with use_backend("triton"):
        given = observed(ours, [t.requires_grad_() for t in inputs])
    expected = observed(eager, [t.detach().double().requires_grad_() for t in inputs])
    assert calls == {"mixed_norm_sum": 1}
    assert_same([t.double() for t in given], [t.double() for t in expected], 1e-5)
