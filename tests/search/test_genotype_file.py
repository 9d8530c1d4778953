"""What a user gives for a genotype is a file where there is one, and else a text."""

import pytest

from fastnas.search.config import ConfigError
from fastnas.search.genotype_file import MOST_NODES, read_genotype
from fastnas.spaces import parse

TEXT = (
    "Genotype(normal=[('a', 0), ('b', 1)], normal_concat=[2],"
    " reduce=[('a', 0), ('b', 1)], reduce_concat=[2])"
)
NB201 = "|none~0|+|skip_connect~0|none~1|+|none~0|nor_conv_1x1~1|none~2|"


@pytest.mark.parametrize(
    "name", ["g.txt", "runs (1)", "{a}", "a|b", "|", "{", "Genotype(x)", NB201]
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_that_exists_is_a_file(tmp_path, monkeypatch, name, mark):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(mark + TEXT + "\n")
    assert read_genotype(name) == parse(TEXT)


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "g").write_text(TEXT)
    assert read_genotype("~/g") == parse(TEXT)


@pytest.mark.parametrize("text", [TEXT, NB201, f"03/17 10:02:11 PM genotype = {TEXT}"])
def test_else_it_is_a_text(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert read_genotype(text) == parse(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "genotype is empty"),
        ("runs (1)/g.txt", r"^genotype file runs \(1\)/g.txt cannot be read: No such file"),
        ("a{b}|c", r"^genotype file a\{b\}\|c cannot be read: No such file"),
        (".", "genotype file . cannot be read: Is a directory"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("Genotype(normal=", "^genotype: not a genotype"),
        ("|none~0|", "^genotype: cell: expected the edges into 3 nodes"),
        ("{}", "^genotype: a genotype has the fields"),
    ],
)
def test_what_is_neither(given, message):
    with pytest.raises(ConfigError, match=message):
        read_genotype(given)


@pytest.mark.parametrize(("nodes", "edges"), [(MOST_NODES + 1, 2), (1, 300)])
def test_a_cell_that_would_take_minutes_to_draw_is_refused(nodes, edges):
    cell = ", ".join(str([("a", 0)] * edges) for _ in range(nodes))
    text = f"Genotype(normal=[{cell}], normal_concat=[2], reduce=[{cell}], reduce_concat=[2])"
    with pytest.raises(
        ConfigError, match=f"normal cell has {nodes} nodes and {nodes * edges} edge"
    ):
        read_genotype(text)
