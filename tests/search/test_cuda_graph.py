"""Steps replayed from a recording are the steps that `Bilevel` makes, bit for bit."""

import logging
from types import SimpleNamespace

import pytest
import torch
from host_recorder import HostReadError, HostRecorder, Tape
from step_cases import METHODS, assert_same, batches, build, search, state

import fastnas
from fastnas.search.cuda_graph import GraphedBilevel, why_not_graphed
from fastnas.strategies.precision import Precision


@pytest.mark.parametrize(
    ("method", "space"),
    [*((method, "S2") for method in METHODS), ("noisy-darts", "S4"), ("noisy-darts", "nb201")],
)
def test_replayed_steps_are_the_eager_steps(method, space):
    """S2: fused cells. S4: cells of `mixed_sum`s, for a candidate that draws from torch itself."""
    expected = search(6, build(method, space))
    generator = torch.get_rng_state()
    recorder = HostRecorder()
    graphed = GraphedBilevel(build(method, space), recorder)
    assert_same(search(6, graphed), expected)
    assert torch.equal(torch.get_rng_state(), generator)
    assert recorder.warm_ups == len(recorder.tapes) == 2
    assert graphed.failure is None


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rome", {"samples": 2}),
        ("rome-v1", {"samples": 1}),
        ("gdas", {"gdas_gradient": "siblings", "samples": 2, "paths_at_once": True}),
    ],
)
def test_a_graph_serves_every_sample(method, options, cuda_host):
    """The kernels read the paths; a host that did would stop the recording (`HostReadError`)."""
    with fastnas.use_backend(cuda_host.name):
        expected = search(2, build(method, "S2", **options))
        recorder = HostRecorder()
        graphed = GraphedBilevel(build(method, "S2", **options), recorder)
        found = search(2, graphed)  # the second replays what the first has recorded
    assert graphed.failure is None
    assert recorder.warm_ups == len(recorder.tapes) == 2
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for ours, eager in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_a_rate_that_is_no_tensor_would_be_captured():
    """What `why_not_graphed` refuses; and the recorder of these tests is no mere call."""
    expected = search(6, build(capturable=False))
    with pytest.raises(AssertionError):
        assert_same(search(6, GraphedBilevel(build(capturable=False), HostRecorder())), expected)


def test_buffers_stay_where_they_are():
    graphed = GraphedBilevel(build(), HostRecorder())

    def addresses():
        found = {}
        for role, buffers in graphed._buffers.items():
            images, labels, draw, _ = buffers.inputs
            found[role] = [t.data_ptr() for t in (images, labels, draw.level, draw.rng)]
        return found

    for i, batch in enumerate(batches(4)):
        loss = graphed.arch_step(batch, batch)
        results = graphed.weight_step(batch)
        if i == 0:
            first, held = addresses(), [t.data_ptr() for t in (loss, *results)]
            assert set(first) == {"valid", "train"}
    assert addresses() == first
    assert [t.data_ptr() for t in (loss, *results)] == held


def test_only_the_weights_before_the_logits_move():
    """`arch_start_epoch`: the weight step is captured epochs before the architecture step."""
    steps = [build(), GraphedBilevel(build(), HostRecorder())]
    ends = []
    for step in steps:
        torch.manual_seed(7)
        for i, batch in enumerate(batches(5)):
            if i > 2:
                step.arch_step(batch, batch)
            step.weight_step(batch)
        ends.append(state(getattr(step, "bilevel", step)))
    assert all(torch.equal(a, b) for a, b in zip(*ends))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "the search is on cpu; a CUDA device is needed"),
        ({"backend": "eager"}, "the backend is eager; cuda or triton is needed"),
        ({"method": "rome"}, None),
        ({"method": "rome", "backend": "triton"}, "the backend is triton; the kernels that read"),
        (
            {"method": "gdas", "space": "nb201"},
            "a cell of nb201 reads its sampled path on the",
        ),
        ({"method": "darts", "space": "nb201"}, None),
        ({"order": 2}, "order is 2; only the first-order step"),
        ({"skip_drop_path": 0.3}, "skip_drop_path draws noise on the host"),
        ({"capturable": False}, "the learning rate of SGD is a number"),
        ({"precision": "bf16"}, None),
        ({"precision": "fp16"}, "precision is fp16; whether a step is skipped is decided on the"),
    ],
)
def test_why_not(change, reason):
    names = ("method", "space", "order", "skip_drop_path")
    options = {name: change[name] for name in names if name in change}
    step = build(capturable=change.get("capturable", True), **options)
    on_cuda = SimpleNamespace(device=torch.device(change.get("device", "cuda:0")))
    bilevel = SimpleNamespace(
        params=[on_cuda],
        network=step.network,
        strategy=step.strategy,
        params_optimizer=step.params_optimizer,
        arch_optimizer=step.arch_optimizer,
        precision=Precision(change.get("precision", "fp32")),
    )
    found = why_not_graphed(bilevel, change.get("backend", "cuda"))
    assert found is None if reason is None else found.startswith(reason)


class Failing(HostRecorder):
    def record(self, work):
        try:
            super().record(work)
            raise HostReadError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("the capture was invalidated")


def test_a_capture_that_fails_leaves_the_eager_search(caplog):
    expected = search(4, build())
    with caplog.at_level(logging.WARNING, "fastnas"):
        graphed = GraphedBilevel(build(), Failing())
        assert_same(search(4, graphed), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "fastnas: an eager search step, not a CUDA graph: capture failed: operation not permitted"
        " when stream is capturing"
    ]
    assert graphed.failure is not None


def test_an_error_of_the_step_itself_is_its_own():
    graphed = GraphedBilevel(build(), HostRecorder())
    before = state(graphed.bilevel)
    images, labels = batches(1)[0]
    with pytest.raises(IndexError):
        graphed.weight_step((images, labels + 4))
    assert all(torch.equal(a, b) for a, b in zip(state(graphed.bilevel), before))


def test_a_smaller_batch_takes_the_eager_step(caplog):
    ends = []
    given = [*batches(2), *batches(1, size=2), *batches(1)]
    for step in (build(), GraphedBilevel(build(), HostRecorder())):
        torch.manual_seed(7)
        for batch in given * 2:
            step.arch_step(batch, batch)
            step.weight_step(batch)
        ends.append(state(getattr(step, "bilevel", step)))
    assert all(torch.equal(a, b) for a, b in zip(*ends))
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "the images of a valid batch are torch.float32 [2, 3, 8, 8]; captured are torch.float32"
        " [3, 3, 8, 8]"
    )


def test_a_value_read_on_the_host_is_no_recording():
    with pytest.raises(HostReadError), Tape():
        torch.ones(()).item()
