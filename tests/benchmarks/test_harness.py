"""The harness: rows, orders, verification before timing, saved bytes, what README and docs say."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fastnas.benchmarks.harness import readme, schema
from fastnas.benchmarks.harness.plot import plot_csv
from fastnas.benchmarks.harness.roofline import measure_roof
from fastnas.benchmarks.harness.run import OP_PROVIDERS, op_cases, op_rows, result_path, run_suite
from fastnas.benchmarks.harness.schema import (
    COLUMNS,
    SINCE_ROOFLINE,
    current_conditions,
    new_row,
    read_csv,
    write_csv,
)
from fastnas.benchmarks.harness.timing import Roof, Timing, measure
from fastnas.benchmarks.harness.verify import EAGER, verify
from fastnas.benchmarks.ops.mixed_edges import CellCase, MixedOpCase
from fastnas.benchmarks.ops.relu_conv_bn import ReluConvBnCase
from fastnas.benchmarks.search import memory
from fastnas.ops import OPS
from fastnas.saved_bytes import saved_bytes, storage_bytes
from fastnas.spaces import get_space

CONDITIONS = current_conditions("cpu")
CASE = op_cases("cpu", "mixed_sum", quick=True, full=False)[0]


def row(backend, median, **columns):
    settings = {"suite": "ops", "op": "mixed_sum", "pass_": "fwd+bwd", "dtype": "float32"}
    settings |= {"shape": "2x3", "K": 8, "layout": "contiguous", "saved_bytes": 100} | columns
    timing = median and Timing(median, median, median)
    settings = {"verified": "yes" if median else "no: y is off", "bytes_moved": 10**6} | settings
    return new_row(CONDITIONS, backend=backend, timing=timing, **settings)


def test_rows_round_trip_and_are_not_overwritten(tmp_path):
    path = tmp_path / "results" / "cpu.csv"
    rows = [row("eager", 3.0), row("fastnas-cpu", 1.0), row("compile", None)]
    write_csv(rows, path)
    assert read_csv(path) == rows
    with pytest.raises(FileExistsError, match=r"cpu\.csv exists"):
        write_csv(rows, path)
    assert read_csv(path) == rows
    with pytest.raises(ValueError, match="2 pairs of device and commit"):
        write_csv([rows[0], replace(rows[1], commit="other")], tmp_path / "b.csv")


def test_a_copy_without_its_git_folder_is_told_its_commit(monkeypatch):
    monkeypatch.setattr(schema, "checkout", lambda: None)
    commit = schema.commit.__wrapped__
    assert commit() == "unknown"
    monkeypatch.setenv("FASTNAS_COMMIT", "1a2b3c4")
    assert commit() == "1a2b3c4"


def test_broken_csv(tmp_path):
    path = tmp_path / "cpu.csv"
    write_csv([row("eager", 3.0)], path)
    text = path.read_text()
    path.write_text(text.replace("median_ms", "median"))
    with pytest.raises(ValueError, match="missing columns"):
        read_csv(path)
    path.write_text(text.replace("3.0", "fast", 1))
    with pytest.raises(ValueError, match="'fast'"):
        read_csv(path)


def test_a_file_older_than_the_roofline_columns_is_read(tmp_path):
    path, older = tmp_path / "cpu.csv", tmp_path / "older.csv"
    rows = [row("eager", 3.0), row("fastnas-cpu", 1.0)]
    write_csv(rows, path)
    table = [dict(zip(COLUMNS, line.split(","))) for line in path.read_text().splitlines()]
    kept = [name for name in COLUMNS if name not in SINCE_ROOFLINE]
    older.write_text("".join(",".join(line[name] for name in kept) + "\n" for line in table))
    assert read_csv(older) == rows


def test_bandwidth_and_rate():
    timed = new_row(
        CONDITIONS,
        backend="x",
        verified="yes",
        timing=Timing(1.0, 1.0, 1.0),
        roof=Roof(bandwidth=2e9, fma_rate=8e9),
        bytes_moved=10**6,
        fma=4 * 10**6,
        suite="ops",
        op="o",
        pass_="fwd",
        dtype="float32",
        shape="1",
        K=1,
        layout="contiguous",
    )
    assert (timed.GBps, timed.copy_share) == (1.0, 0.5)
    assert (timed.GFMAps, timed.fma_share) == (4.0, 0.5)
    roof = measure_roof("cpu", quick=True)
    assert roof.bandwidth > 0 and roof.fma_rate > 0


@pytest.mark.parametrize("names", ["", "a", "ab", "abc", "abcdef"])
def test_providers_run_in_all_orders_alike(names):
    calls = []
    providers = {name: (lambda name=name: calls.append(name)) for name in names}
    timings = measure(providers, repeats=290, warmup=10, device="cpu")
    assert set(timings) == set(names)
    assert len(calls) == 300 * len(names)
    if len(names) > 1:
        assert all(before != after for before, after in pairwise(calls))
    if len(names) > 2:
        pairs = Counter(pairwise(calls))
        assert len(pairs) == len(names) * (len(names) - 1)
        fair = len(calls) / len(pairs)
        assert fair / 2 < min(pairs.values()) and max(pairs.values()) < 2 * fair


def test_a_wrong_provider_is_not_timed(monkeypatch):
    import fastnas.benchmarks.ops.mixed_sum as cases

    right = cases.mixed_sum
    monkeypatch.setattr(cases, "mixed_sum", lambda x, w, **k: right(x, 1.01 * w, **k))
    small = replace(CASE, shape=(2, 4, 3, 3))
    rows = op_rows(small, CONDITIONS, "cpu", quick=True, full=False, roof=None)
    ours = [r for r in rows if r.is_fastnas]
    assert ours and all(r.is_red and r.median_ms is None and r.saved_bytes is None for r in ours)
    assert all(r.median_ms for r in rows if r.backend == "eager")


@pytest.mark.parametrize(
    "case",
    [
        MixedOpCase((2, 4, 6, 6)),
        MixedOpCase((2, 4, 6, 6), stride=2, dtype=torch.bfloat16),
        CellCase((2, 4, 6, 6), "reduce"),
        ReluConvBnCase((2, 8, 6, 6), 4),
        ReluConvBnCase((2, 8, 6, 6), 4, stride=2),
    ],
    ids=lambda case: case.op,
)
def test_modules_are_verified_on_the_same_parameters(case):
    problem = case.problem("cpu", full=False)
    forwards = {n: f for n, f in problem.forwards.items() if n != "compile"}
    verdicts = verify(replace(problem, forwards=forwards))
    assert "fastnas-cpu" in verdicts and set(verdicts.values()) == {"yes"}


def test_memory_of_supernets_and_single_paths(monkeypatch):
    monkeypatch.setitem(memory.SIZES, "quick", memory.Size(C=4, layers=3, batch=2, pixels=8))
    rows = list(memory.memory_rows(CONDITIONS, "cpu", quick=True, say=lambda what: None))
    assert {row.verified for row in rows} == {"yes"}
    saved = {row.backend: row.saved_bytes for row in rows}
    assert saved["fastnas-minimal"] < saved["fastnas"] < saved["fastnas-fast"] < saved["eager"]
    assert saved["rome"] < saved["gdas"] < saved["eager"]


def test_samplers():
    space, generator = get_space("S0"), torch.Generator().manual_seed(0)
    assert memory.gdas(space, "normal", generator).sum(1).tolist() == [1] * 14
    w = memory.rome(space, "normal", generator)
    nodes = w.sum(1).split([2, 3, 4, 5])
    assert [node.sum() for node in nodes] == [2] * 4 and not w[:, 0].any()


def test_saved_bytes_counts_storages_once_and_leaves_out_what_it_is_told():
    x = torch.randn(1000, requires_grad=True)
    w = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: x * w) == 8000
    assert saved_bytes(lambda: x * w, exclude=[w]) == 4000
    assert saved_bytes(lambda: (x * w) * w, exclude=[x, w]) == 4000
    assert saved_bytes(lambda: x.view(10, 100).sin() + x.view(100, 10).t().sin().sum()) == 4000
    assert storage_bytes([x, x[:10], w]) == 8000


def test_saved_bytes_of_mixed_sum_are_its_inputs():
    from fastnas import mixed_sum

    x = [torch.randn(64, requires_grad=True) for _ in range(4)]
    w = torch.rand(4, requires_grad=True)
    assert saved_bytes(lambda: mixed_sum(x, w)) == 4 * 256 + 16
    assert saved_bytes(lambda: mixed_sum(x, w), exclude=[*x, w]) == 0
    assert saved_bytes(lambda: mixed_sum(x, w.detach())) == 16


def test_pages_show_the_rows_that_lose(tmp_path):
    csv, front, page = (tmp_path / name for name in ("cpu.csv", "README.md", "docs/benchmarks.md"))
    rows = [row("eager", 3.0), row("compile", 1.0), row("fastnas-cpu", 1.5, saved_bytes=50)]
    rows += [row("compile", 1.0, pass_="bwd"), row("fastnas-cpu", 2.0, pass_="bwd")]
    rows += [row("compile", 1.0, pass_="fwd"), row("fastnas-cpu", 0.5, pass_="fwd")]
    weighed = {"suite": "memory", "pass_": "saved", "verified": "yes"}
    rows += [row("eager", None, **weighed), row("gdas", None, **weighed, saved_bytes=75)]
    write_csv([*rows, *HEADLINE], csv)
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    front.write_text("# title\n<!-- headline:begin -->\nold\n<!-- headline:end -->\nrest\n")
    page.write_text("# all\n<!-- figures:begin -->\nold\n<!-- figures:end -->\nrest\n")
    arguments = ["cpu.csv", "--root", str(tmp_path)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    block = page.read_text()
    assert "| 2.00 |" in block and "| **0.67** |" in block and "| 0.50 |" in block
    assert "bwd alone" in block and "| **0.50** |" in block and "fwd alone" not in block
    assert "| gdas |" in block and "| 0.75 |" in block
    assert block.startswith("# all\n") and block.endswith("\nrest\n") and "\nold\n" not in block
    text = front.read_text()
    assert text.startswith("# title\n") and text.endswith("\nrest\n") and "\nold\n" not in text
    assert "| search step, `SearchNetwork` of fastnas | 8.00 | 4.00 | 2.00 | 0.25 |" in text
    slowest = "| the slowest of all: mixed_sum float32 2x3 K=8, bwd alone |  |  | **0.50** |  |"
    assert slowest in text and text.count("\n| ") == 1 + 6
    assert (tmp_path / "docs/pictures/search-step.png").stat().st_size > 1000


STEP = {"suite": "search", "op": "search_step S0", "pass_": "step"}
CELL = {"op": "mixed_edges normal cell"}
HEADLINE = [
    *(row("eager", 16.0, **STEP), row("eager-best", 8.0, **STEP), row("compile", 4.0, **STEP)),
    *(row(f"fastnas{kind}", 2.0, **STEP, saved_bytes=25) for kind in ("", "-minimal")),
    *(row("fastnas-accelerated", 2.0, **STEP), row("fastnas-cpu", 1.0, **CELL)),
]
"""What the first six rows of README.md need, beside a row of `mixed_sum`."""


def test_pages_of_paths_and_without_their_rows(tmp_path):
    csv, front, page = (tmp_path / name for name in ("cpu.csv", "README.md", "docs/benchmarks.md"))
    rows = [row("eager", 3.0), row("fastnas-cpu", 1.0), *HEADLINE]
    paths = {"suite": "paths", "pass_": "step"}
    rows += [row("eager", 8.0, **paths), row("fastnas-rome", 2.0, **paths)]
    write_csv(rows, csv)
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    front.write_text("<!-- headline:begin -->\n<!-- headline:end -->\n")
    page.write_text(
        "<!-- figures:begin -->\n<!-- figures:end -->\n<!-- paths:begin -->\n<!-- paths:end -->\n"
    )
    arguments = ["cpu.csv", "--root", str(tmp_path)]
    assert readme.main(arguments) == 0
    assert "| eager-gdas | 8 | 1.00 |" in page.read_text()
    assert "| fastnas-rome | 2 | 0.25 |" in page.read_text()
    write_csv([row("eager", 3.0)], csv, overwrite=True)
    before = front.read_text(), page.read_text()
    assert readme.main(arguments) == 2  # no search step, which README.md opens with
    page.write_text("no markers")
    write_csv(rows, csv, overwrite=True)
    assert readme.main(arguments) == 2
    assert (front.read_text(), page.read_text()) == (before[0], "no markers")


def test_plot(tmp_path):
    write_csv([row("eager", 3.0), row("fastnas-cpu", 1.0)], tmp_path / "cpu.csv")
    plot_csv(tmp_path / "cpu.csv", tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"suite": "everything"},
            "suite is 'everything'; allowed: ops, search, paths, memory, roofline, all",
        ),
        ({"suite": "ops", "op": "mixed"}, "op is 'mixed'; allowed: mixed_sum"),
        ({"suite": "search", "op": "mixed_sum"}, "only 'ops' has ops"),
        ({"suite": "ops", "threads": 0}, "threads is 0"),
        ({"suite": "ops", "threads": 10**8}, "threads is 100000000; a whole number is needed"),
        ({"suite": "ops", "device": "tpu"}, "device is 'tpu'"),
        ({"suite": "ops", "skip": ["jax"]}, "skip has 'jax'; allowed in 'ops': eager-stack"),
        ({"suite": "all", "skip": ["jax"]}, "skip has 'jax'; allowed in 'all': eager-stack"),
        ({"suite": "memory", "skip": ["compile"]}, "allowed in 'memory': none"),
        ({"suite": "search", "skip": ["eager"]}, "which everything is compared with"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_suite(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_every_provider_of_an_op_can_be_skipped(op):
    problem = op_cases("cpu", op, quick=True, full=False)[0].problem("cpu", True)
    ours = "fastnas-cuda-host"  # of other tests, where they ran before in this process
    assert {*problem.forwards} - {ours} <= {EAGER, *OP_PROVIDERS}


def test_result_path(tmp_path):
    assert result_path(CONDITIONS, tmp_path / "a.csv", "ops", False) == tmp_path / "a.csv"
    named = result_path(CONDITIONS, tmp_path, "all", False)
    assert named.parent == tmp_path and named.suffix == ".csv"
