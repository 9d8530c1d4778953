"""Names of files are names: whatever a file system takes is read, written and printed as it is."""

import json

import numpy as np
import pytest
from nb201_tables import write

from fastnas.search.config import SearchConfig, make_config, read_settings

CELL = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)

NAMES = [
    "a (1)",
    "b{0}",
    "c|d",
    "e?x=1",
    "f#g",
    "h%20i",
    "[lr=0.1]",
    "[bold]",
    "$v_$1",
    "l\u00e4rm",
]
NAMES += ["k\nl", "m\udc80n", "'o\"", ":smile:", "-p", "q" * 200]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write(tmp_path_factory.mktemp("table") / "table.csv")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_names(fastnas, tmp_path, name):
    (tmp_path / f"{name}.txt").write_text("\ufeff" + CELL)
    picture = f"./{name}.svg"
    code, _, error = fastnas("draw", f"./{name}.txt", picture, "--title", name)
    assert code == 0, error
    text = (tmp_path / picture).read_text()
    if name.isascii() and name.isprintable() and not {*name} & {*"'\""}:
        assert f"<!-- {name} -->" in text  # matplotlib's comment above the outlines of a text
    code, _, error = fastnas("draw", f"./{name}.txt", picture)
    assert code == 2 and "exists; --force replaces it" in error


@pytest.mark.parametrize("name", ["w?x=1#%20{0}[b]", "~"])
def test_a_study_is_in_the_folder_that_was_named(fastnas, tmp_path, monkeypatch, table, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = f"{name}/s" if name == "~" else name
    arguments = ["--method=random", "--budget=2", f"--evaluator=table:{table}", f"--out={folder}"]
    code, out, error = fastnas("search", *arguments)
    assert code == 0, error
    path = tmp_path / ("home/s" if name == "~" else name)
    assert (path / "study.db").stat().st_size > 0
    assert f"report: {path if name == '~' else name}/report.md" in out.splitlines()
    code, _, error = fastnas("search", *arguments, "--config", f"{folder}/config.json", "--resume")
    assert code == 0, error
    url = f"--study=sqlite:///{folder}/study.db"
    if name == "~":
        code, _, error = fastnas("search", *arguments[:-1], url, "--out=other")
        assert code == 0 and not (tmp_path / "other/study.db").exists(), error


@pytest.mark.parametrize("name", ["[red]$v_$1", "a\udc80\n{b}"])
def test_a_search_of_data_and_into_a_folder_of_such_names(fastnas, tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / f"{name}.npz", images=pixels, labels=np.arange(60) % 2)
    arguments = ["--space=S2", "--channels=2", "--layers=1", "--batch-size=8", "--epochs=1"]
    arguments += ["--train-epochs=0", "--compare-steps=0", f"--data={name}.npz", f"--out={name}"]
    arguments += [] if name.isprintable() else ["--no-tensorboard"]
    code, out, error = fastnas("search", *arguments)
    assert code == 0, error
    shown = name.encode(errors="backslashreplace").decode()
    assert f"report: {shown}/report.md" in out
    assert f" on {shown}.npz" in (tmp_path / name / "report.md").read_text()
    assert json.loads((tmp_path / name / "report.json").read_text())["data"] == f"{name}.npz"
    config = make_config(SearchConfig, read_settings(tmp_path / name / "config.json"))
    assert (config.data, config.out) == (f"{name}.npz", name)
