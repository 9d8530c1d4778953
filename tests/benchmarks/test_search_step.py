"""The search step's benchmark: which providers run, in which dtype, and their verdicts."""

import pytest
import torch

from fastnas.benchmarks.harness.graph import Captured
from fastnas.benchmarks.harness.run import run_suite
from fastnas.benchmarks.harness.schema import current_conditions, read_csv
from fastnas.benchmarks.harness.timing import Timing
from fastnas.benchmarks.search import ahead, providers, setup
from fastnas.benchmarks.search.ahead import CompileAhead, step_command
from fastnas.benchmarks.search.providers import PROVIDERS, Size, StepSettings
from fastnas.benchmarks.search.step import search_rows

TINY = Size(C=4, layers=3, batch=4, pixels=8, space="S2")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(providers.SIZES, "quick", TINY)


def rows_of(**settings):
    """Rows as they are at the end: later ones replace earlier ones."""
    quiet = StepSettings(quick=True, **settings)
    rows = search_rows(current_conditions("cpu"), "cpu", quiet, lambda what: None)
    return [*{row.backend: row for row in rows}.values()]


@pytest.fixture
def no_processes(monkeypatch):
    """Resident memory is measured in processes of their own, which know nothing of a tiny size."""
    monkeypatch.setattr("fastnas.benchmarks.search.step.peak_rss_of", lambda command: 0)


@pytest.mark.usefixtures("tiny", "no_processes")
@pytest.mark.parametrize(
    ("dtype", "others"),
    [("float32", ["eager-pruned", "fastnas"]), ("bfloat16", ["fastnas-minimal"])],
)
def test_steps_are_verified_in_both_dtypes(dtype, others):
    rows = rows_of(only=others, dtype=dtype, batch=6)
    reported = [PROVIDERS[name].reported_as or name for name in others]
    assert [row.backend for row in rows] == ["eager", *reported]
    assert {row.verified for row in rows} == {"yes"}
    assert {(row.dtype, row.shape) for row in rows} == {(dtype, "6x3x8x8")}
    assert all(row.median_ms for row in rows)


@pytest.mark.usefixtures("tiny", "no_processes")
def test_a_wrong_step_is_red_and_has_no_time(monkeypatch):
    right = setup.Bilevel.weight_step

    def mislabelled(self, train):
        return right(self, (train[0].flip(0), train[1]))

    monkeypatch.setattr(setup.Bilevel, "weight_step", mislabelled)
    rows = {row.backend: row for row in rows_of(only=["fastnas"])}
    assert rows["fastnas"].is_red and rows["fastnas"].median_ms is None
    assert "dparams" in rows["fastnas"].verified
    assert rows["eager"].verified == "yes"


@pytest.mark.usefixtures("tiny", "no_processes")
def test_a_run_that_is_stopped_leaves_its_rows(tmp_path, monkeypatch):
    """Here eager's and the first of ours, when the second cannot even be built."""
    build = setup.build

    def stopped(name, *arguments, **options):
        if name == "fastnas-minimal":
            raise KeyboardInterrupt
        return build(name, *arguments, **options)

    monkeypatch.setattr("fastnas.benchmarks.search.step.build", stopped)
    out, only = tmp_path / "step.csv", ["fastnas", "fastnas-minimal"]
    with pytest.raises(KeyboardInterrupt):
        run_suite("search", quick=True, only=only, out=out, device="cpu")
    rows = read_csv(out)
    assert [row.backend for row in rows] == ["eager", "fastnas"]
    assert all(row.verified == "yes" and row.median_ms for row in rows)
    monkeypatch.setattr("fastnas.benchmarks.search.step.build", build)
    rows = run_suite("search", quick=True, only=only, out=tmp_path / "whole.csv", device="cpu")
    assert [row.backend for row in rows] == ["eager", *only]
    assert read_csv(tmp_path / "whole.csv") == rows and all(row.saved_bytes for row in rows)


@pytest.mark.usefixtures("tiny", "no_processes")
def test_of_one_name_the_fastest_so_far_is_reported(monkeypatch):
    order = ["eager", "eager-pruned", "eager-pruned-channels-last"]
    taken = dict(zip(order, (3.0, 1.0, 2.0)))

    def measure(calls, **_):
        return {name: Timing(*[taken[name]] * 3) for name in calls}

    monkeypatch.setattr("fastnas.benchmarks.search.step.measure", measure)
    quiet = StepSettings(quick=True, only=order[1:])
    rows = search_rows(current_conditions("cpu"), "cpu", quiet, lambda what: None)
    seen = [(row.backend, row.median_ms) for row in rows]
    best = ("eager-best", 1.0)
    assert seen == [("eager", 3.0), best, best, ("eager", 3.0), best]


def test_providers_of_a_device():
    usual = StepSettings().providers("cpu")
    assert usual[0] == "eager" and "compile" in usual and "fastnas" in usual
    assert not any(name.endswith("-graph") or PROVIDERS[name].slow for name in usual)
    on_gpu = StepSettings(full=True, skip=["compile"]).providers("cuda")
    assert {"eager-channels-last", "eager-graph", "fastnas-graph", "compile-max-graph"} <= {*on_gpu}
    assert "compile" not in on_gpu
    # The most important first: they have rows when the time is up.
    ordered = ["fastnas-graph", "fastnas", "eager-graph"]
    assert StepSettings(only=ordered).providers("cuda") == ["eager", *ordered]
    assert StepSettings(only=["compile-max"]).providers("cpu") == ["eager", "compile-max"]
    assert "compile" not in StepSettings(quick=True).providers("cuda")


def test_a_graph_is_reported_beside_its_stream():
    for name, provider in PROVIDERS.items():
        if provider.graph:
            stream = PROVIDERS[name.removesuffix("-graph")]
            assert (provider.network, provider.layout) == (stream.network, stream.layout)
            assert provider.reported_as == (stream.reported_as and stream.reported_as + "-graph")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ["jax"]}, "only has 'jax'; allowed: eager, "),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32, bfloat16"),
        ({"batch": 1}, "batch is 1; a whole number is needed, 2 to 65536"),
        ({"compile_seconds": 0}, "compile_seconds is 0; a number is needed, above 0"),
        ({"only": ["eager-graph"]}, "'eager-graph', which needs a CUDA device"),
        ({"suite": "ops", "batch": 64}, "of the search suite, not 'ops'"),
        ({"suite": "ops", "dtype": "bfloat16"}, "of the search suite, not 'ops'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        run_suite(**{"suite": "search", "device": "cpu", **settings})


def test_compiling_ahead_ends_in_time(monkeypatch):
    """What is not compiled in time is not measured; a graph asks for what its stream compiles."""
    ran = []

    def sleeps(name, settings, device):
        ran.append(name)
        return ["sleep", "60"]

    monkeypatch.setattr(ahead, "step_command", sleeps)
    compiler = CompileAhead(StepSettings(compile_seconds=0.2), "cpu")
    assert compiler.why_not("compile") == "the 0 s for torch.compile are used up"
    assert compiler.why_not("compile-graph") == compiler.why_not("compile")
    assert compiler.why_not("compile-max") is not None
    assert ran == ["compile"]
    assert compiler.why_not("fastnas") is None
    assert CompileAhead(StepSettings(), "cpu").why_not("compile") is None


def test_compiling_ahead_says_what_went_wrong(monkeypatch):
    fails = ["python3", "-c", "raise RuntimeError('no compiler here')"]
    monkeypatch.setattr(ahead, "step_command", lambda *_: fails)
    compiler = CompileAhead(StepSettings(compile_seconds=30), "cpu")
    assert compiler.why_not("compile") == "RuntimeError: no compiler here"


def test_the_step_command_says_all_there_is():
    settings = StepSettings(quick=True, batch=5, dtype="bfloat16")
    command = step_command("fastnas", settings, "cpu", steps=2, threads=1)
    given = dict(zip(command[4::2], command[5::2]))
    assert given == {
        "--size": "quick", "--batch": "5", "--dtype": "bfloat16", "--device": "cpu",
        "--steps": "2", "--threads": "1",
    }  # fmt: skip


def test_a_capture_leaves_the_search_where_it_was(monkeypatch):
    """On the CPU, with a capture that warms up and records nothing."""

    def warmed_up(call):
        for _ in range(3):
            call()
        return Captured(call, 7)

    monkeypatch.setattr(setup, "captured", warmed_up)
    stream, graph = (setup.build("eager-pruned", TINY, "cpu") for _ in range(2))
    graph.capture()
    assert graph.graph_peak_bytes == 7
    for _ in range(2):
        stream.step()
        graph.step()
        for name, right in stream.gradients().items():
            torch.testing.assert_close(graph.gradients()[name], right, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["eager-graph", "eager-pruned-graph", "fastnas-graph"])
def test_a_captured_step_is_the_step(name):
    """The first replay starts where the search was, and a second goes on from there."""
    stream = setup.build(name, TINY, "cuda")
    graph = setup.build(name, TINY, "cuda")
    graph.capture()
    for _ in range(2):
        stream.step()
        graph.step()
        for key, right in stream.gradients().items():
            torch.testing.assert_close(graph.gradients()[key], right, rtol=1e-4, atol=1e-6)
    assert graph.graph_peak_bytes > 0
