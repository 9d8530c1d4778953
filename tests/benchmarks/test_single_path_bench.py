"""The single-path benchmarks: what they verify, and the ablation's rows."""

from dataclasses import replace

import pytest
import torch
from host_recorder import HostRecorder

import fastnas
from fastnas import nn
from fastnas.benchmarks.harness.schema import current_conditions
from fastnas.benchmarks.search import ablation, single_path
from fastnas.benchmarks.search.providers import Size
from fastnas.benchmarks.search.single_path import GRAPHS, PROVIDERS, build, verdict

SIZE = Size(C=4, layers=3, batch=4, pixels=12)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(single_path, "SIZES", {"quick": SIZE})
    monkeypatch.setattr(single_path, "VERIFIED_BATCH", SIZE.batch)


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_is_right_and_steps(name):
    assert verdict(PROVIDERS[name], SIZE, "cpu") == "yes"
    search = build(PROVIDERS[name], replace(SIZE, batch=2), "cpu")
    before = [t.detach().clone() for t in search.inputs()]
    search.step()
    assert any(not torch.equal(t, old) for t, old in zip(search.inputs(), before))


def test_a_provider_has_a_row_as_soon_as_it_is_verified(monkeypatch):
    """The rows of the end, timed in turn and weighed, replace them."""
    chosen = {name: PROVIDERS[name] for name in ("eager", "fastnas-gdas")}
    monkeypatch.setattr(single_path, "providers", lambda device: chosen)
    verified = []

    def says_yes(provider, size, device):
        verified.append(provider)
        return "yes"

    monkeypatch.setattr(single_path, "verdict", says_yes)
    rows = single_path.single_path_rows(current_conditions("cpu"), "cpu", True, lambda what: None)
    first = next(rows)
    assert first.backend == "eager" and first.median_ms and verified == [chosen["eager"]]
    rest = list(rows)
    assert [row.backend for row in rest] == ["fastnas-gdas", "eager", "fastnas-gdas"]
    assert all(row.saved_bytes for row in rest[1:])


def test_a_graph_is_compared_with_the_stream(monkeypatch, cuda_host):
    """On the CPU's kernels the host reads the paths, and a recording repeats those of its step."""
    monkeypatch.setattr(single_path, "CudaRecorder", HostRecorder)
    graph = GRAPHS["fastnas-rome-graph"]
    assert verdict(graph, SIZE, "cpu").startswith("no: dalpha is off by")
    with fastnas.use_backend(cuda_host.name):
        assert verdict(graph, SIZE, "cpu") == "yes"


def test_what_cannot_be_captured_is_not_timed(monkeypatch):
    class Failing(HostRecorder):
        def record(self, work):
            raise RuntimeError("operation not permitted")

    monkeypatch.setattr(single_path, "CudaRecorder", Failing)
    found = verdict(GRAPHS["fastnas-rome-graph"], SIZE, "cpu")
    assert found == "not run: capture failed: operation not permitted"


def test_a_wrong_network_is_found(monkeypatch):
    class Wrong(nn.SearchNetwork):
        def forward(self, x, weights, draw=None):
            halved = {c: w._replace(weight=0.9 * w.weight) for c, w in weights.items()}
            return super().forward(x, halved, draw)

    monkeypatch.setattr(single_path.nn, "SearchNetwork", Wrong)
    assert verdict(PROVIDERS["fastnas-rome"], SIZE, "cpu").startswith("no: ")


FOUND = dict.fromkeys(ablation.FOUND, 1) | {"seconds": 0.1, "genotype": "g"}


def test_the_ablation_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    searched = []
    monkeypatch.setattr(ablation, "searched", lambda config: searched.append(config) or FOUND)
    arguments = [str(tmp_path / "a.csv"), "--epochs", "2", "--seeds", "2", "--channels", "4"]
    ablation.main([*arguments, "--rows", "3"])
    page = tmp_path / "page.md"
    page.write_text("# t\n<!-- ablation:begin -->\nold\n<!-- ablation:end -->\nrest\n")
    ablation.main([*arguments, "--page", str(page)])
    assert "2 epochs with 7 samples a step and 7 times" in page.read_text()
    assert "old" not in page.read_text() and page.read_text().endswith("\nrest\n")
    assert len(searched) == 8
    assert len({config.out for config in searched}) == 8
    assert {(c.method, c.options["samples"], c.epochs) for c in searched} == {
        ("rome", 7, 2), ("rome", 1, 14), ("single-path-darts", 7, 2), ("single-path-darts", 1, 14),
    }  # fmt: skip
    rows = ablation.read(tmp_path / "a.csv")
    assert [(r["topology"], r["accumulation"]) for r in rows[:4]] == [
        ("off", "off"), ("off", "on"), ("on", "off"), ("on", "on"),
    ]  # fmt: skip
    assert "| digits | on | on | 2 | 1 +- 0 | 1 +- 0 | 1 +- 0 |" in capsys.readouterr().out


def test_a_row_of_the_ablation(tmp_path):
    arguments = ["--epochs", "1", "--channels", "2", "--layers", "2", "--images", "64"]
    ablation.main([str(tmp_path / "a.csv"), *arguments, "--batch-size", "16", "--rows", "1"])
    (row,) = ablation.read(tmp_path / "a.csv")
    assert 0 <= float(row["valid_accuracy"]) <= 1
    assert 0 <= int(row["parameter_free_normal"]) <= 8
    assert (row["samples"], row["epochs"]) == ("1", "7")
