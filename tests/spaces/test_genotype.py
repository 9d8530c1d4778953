import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnas.spaces import (
    FORMATS,
    NB201_OPS,
    Genotype,
    GraphGenotype,
    NB201Genotype,
    dump,
    from_darts,
    from_json,
    from_nb201,
    parameter_free_count,
    parse,
    skip_count,
    to_darts,
    to_fairdarts,
    to_nb201,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

DARTS_V2 = """DARTS_V2 = Genotype(
    normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
            ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)],
    normal_concat=[2, 3, 4, 5],
    reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1),
            ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)],
    reduce_concat=[2, 3, 4, 5])
"""
PAIR = (("max_pool_3x3", 0), ("skip_connect", 1))
SMALL = Genotype(normal=(PAIR,), normal_concat=(2,), reduce=(PAIR,), reduce_concat=(2,))
SPARSE = Genotype(
    normal=((("sep_conv_3x3", 1),), (), (("none", 0), ("noise", 0), ("skip_connect", 2))),
    normal_concat=(2, 3, 4),
    reduce=((), (("sep_conv_3x3", 2),), (("dil_conv_3x3", 0), ("skip_connect", 3))),
    reduce_concat=(4, 2),
)


def shared(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs shared/data/{name} beside the checkout")
    return path


def given_edges(cell):
    """The edges of a published cell as (operation, node, predecessor)."""
    if len(cell[0]) == 3:
        return sorted(map(tuple, cell), key=lambda edge: edge[1])
    return [(op, 2 + k // 2, source) for k, (op, source) in enumerate(cell)]


def test_published_genotypes_round_trip_in_every_format_that_can_say_them():
    published = json.loads(shared("known_genotypes.json").read_text())["genotypes"]
    assert len(published) == 147
    said = dict.fromkeys(["darts", "ptdarts", "fairdarts", "json"], 0)
    for name, value in published.items():
        genotype = parse(json.dumps(value))
        for cell in ("normal", "reduce"):
            assert list(genotype.edges(cell)) == given_edges(value[cell]), name
            assert list(genotype.concat(cell)) == value[f"{cell}_concat"], name
        for format in said:
            if format == "darts" and any(len(n) != 2 for n in genotype.normal + genotype.reduce):
                with pytest.raises(ValueError, match="exactly two edges"):
                    dump(genotype, format)
                continue
            text = dump(genotype, format)
            assert parse(text) == genotype, (name, format)
            assert dump(parse(text), format) == text
            said[format] += 1
    # Of the nine in FairDARTS' triples one has two edges for each node all the same.
    assert said == {"darts": 139, "ptdarts": 147, "fairdarts": 147, "json": 147}


def test_nas_bench_201_cells_round_trip():
    with shared("nb201_table.csv").open() as table:
        cells = [row["arch_str"] for row in csv.DictReader(table)]
    assert len({parse(text) for text in cells}) == len(cells) == 15625
    assert all(to_nb201(from_nb201(text)) == text for text in cells)


def test_darts_text():
    genotype = from_darts(DARTS_V2)
    assert genotype.normal[3] == (("skip_connect", 0), ("dil_conv_3x3", 2))
    assert genotype.normal_concat == (2, 3, 4, 5)
    assert parse(to_darts(genotype)) == genotype
    assert to_darts(genotype).startswith(
        "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1)"
    )
    assert to_darts(genotype).endswith("reduce_concat=range(2, 6))")


def test_the_three_published_shapes_mean_the_same():
    flat = "Genotype(normal=[('a', 0), ('b', 1), ('c', 2), ('d', 0)], normal_concat=range(2, 4), "
    flat += "reduce=[('a', 0), ('b', 1), ('c', 2), ('d', 0)], reduce_concat=(3, 2))"
    nested = flat.replace("[('a', 0), ('b', 1), ", "[[('a', 0), ('b', 1)], [").replace(
        "('d', 0)]", "('d', 0)]]"
    )
    triples = "Genotype(normal=[('c', 3, 2), ('a', 2, 0), ('b', 2, 1), ('d', 3, 0)], "
    triples += "normal_concat=range(2, 4), reduce=[('a', 2, 0), ('b', 2, 1), ('c', 3, 2), "
    triples += "('d', 3, 0)], reduce_concat=[3, 2])"
    assert parse(flat) == parse(nested) == parse(triples)
    assert parse(flat).reduce_concat == (3, 2)


@pytest.mark.parametrize(
    "text",
    [
        "Genotype2(normal=[('a', 0), ('b', 1)], normal_concat=[2], reduce=[('a', 0), ('b', 1)],"
        " reduce_concat=[2])",
        "  BEST=genotypes.Genotype(normal=(('a', 0), ('b', 1)), normal_concat=range(2, 3),"
        " reduce=[['a', 0], ['b', 1]], reduce_concat=range(2, 3, 1))  # the best\n",
        '\n{"normal": [["a", 0], ["b", 1]], "normal_concat": [2],'
        ' "reduce": [[["a", 0], ["b", 1]]], "reduce_concat": [2]}',
    ],
)
def test_spellings_that_are_read(text):
    node = (("a", 0), ("b", 1))
    assert parse(text) == Genotype((node,), (2,), (node,), (2,))


@pytest.mark.parametrize(
    "before",
    [
        "03/17 10:02:11 PM genotype = ",
        "2026-03-17 10:02:11,123 [INFO] search: epoch 3/50: ",
        "INFO:root:genotypes.",
        "\ufeff",
    ],
)
@pytest.mark.parametrize("integer", ["{}", "np.int64({})", "numpy.uint8({})", "intp({})"])
@pytest.mark.parametrize("concat", ["range(2, 3)", "list(range(2, 3))", "array([2])", "(2,)"])
def test_what_people_paste_out_of_logs(before, integer, concat):
    zero, one = integer.format(0), integer.format(1)
    cell = f"[(np.str_('sep_conv_3x3'), {zero}), ['skip_connect', {one}]]"
    assert parse(before + darts(cell, concat)) == parse(
        darts("[('sep_conv_3x3', 0), ('skip_connect', 1)]")
    )


def test_constructor_takes_the_integers_of_numpy():
    cell = [("a", np.int64(0)), (np.str_("b"), np.uint8(1))]
    genotype = Genotype(cell, [np.int64(2)], cell, range(2, 3))
    assert genotype == parse(darts())
    assert {type(source) for _, _, source in genotype.edges("normal")} == {int}
    with pytest.raises(ValueError, match="b into node 2 must come from"):
        Genotype([("a", 0), ("b", np.True_)], [2], cell, [2])


def test_constructor_takes_what_darts_files_hold():
    flat = Genotype(list(PAIR), range(2, 3), [list(edge) for edge in PAIR], [2])
    assert flat == SMALL
    assert hash(flat) == hash(SMALL)


def test_sparse_nodes():
    assert SPARSE.edges("reduce") == (
        ("sep_conv_3x3", 3, 2),
        ("dil_conv_3x3", 4, 0),
        ("skip_connect", 4, 3),
    )
    assert SPARSE.live_nodes("normal") == (2, 4)
    assert SPARSE.live_nodes("reduce") == (4,)
    for format in ("ptdarts", "fairdarts", "json"):
        assert parse(dump(SPARSE, format)) == SPARSE
    with pytest.raises(ValueError, match=r"normal \[1, 0, 3\] and reduce \[0, 1, 2\]"):
        to_darts(SPARSE)


@pytest.mark.parametrize("cell", [((), ()), (PAIR, ())])
def test_triples_cannot_hide_a_node(cell):
    genotype = Genotype(cell, (2,), cell, (2,))
    with pytest.raises(ValueError, match="cannot tell how many nodes normal has"):
        to_fairdarts(genotype)
    assert parse(dump(genotype, "ptdarts")) == parse(dump(genotype, "json")) == genotype


def test_counts():
    genotype = from_darts(DARTS_V2)
    assert skip_count(genotype) == 2
    assert skip_count(genotype, "reduce") == 3
    assert parameter_free_count(genotype, "normal") == 2
    assert parameter_free_count(genotype, "reduce") == 8
    assert parameter_free_count(SPARSE, "normal") == 3
    with pytest.raises(ValueError, match="'both' is not one of normal, reduce"):
        skip_count(genotype, "both")


def darts(normal="[('a', 0), ('b', 1)]", concat="[2]"):
    return f"Genotype(normal={normal}, normal_concat={concat}, reduce={normal}, reduce_concat=[2])"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected one `Genotype\(...\)`, with `NAME =` or .* before it or not, got ''"),
        ("sep_conv_3x3", r"expected one `Genotype\(...\)`.* got 'sep_conv_3x3'"),
        ("Genotype(", "not even an expression"),
        ("a\0b", "expected one `Genotype"),
        ("Genotype(\0)", "not even an expression"),
        ("(" * 5000, "expected one `Genotype"),
        ("Genotype(" + "(" * 5000, "not even an expression"),
        (darts() + "\n" + darts(), "not even an expression"),
        (darts() + ".normal", r"expected one `Genotype\(...\)`"),
        ("exit()", r"expected one `Genotype\(...\)`.* got 'exit\(\)'"),
        ("exit() or " + darts(), r"expected one `Genotype\(...\)`"),
        (darts("np.int64(0, 1)"), r"column 17: expected a list.* got 'np.int64\(0, 1\)'"),
        (darts("os.system(0)"), r"column 17: expected a list.* got 'os.system\(0\)'"),
        (darts("a.b.int64(0)"), r"column 17: expected a list.* got 'a.b.int64\(0\)'"),
        ("Genotype(1, 2)", r"line 1, column 10: the fields must be given by name"),
        ("Genotype(**{'normal': []})", "`\\*\\*` cannot be read"),
        ("Genotype(normal=[])", "has the fields normal, normal_concat, .* got normal$"),
        ("Genotype()", "got none$"),
        (darts("open('x')"), r"line 1, column 17: expected a list.* got \"open\('x'\)\""),
        (darts("[('a', -1), ('b', 1)]"), r"column 24: expected a list, a string.* got '-1'"),
        (darts("[('a', 0.0), ('b', 1)]"), "a whole number or range.* got '0.0'"),
        (darts("[]"), "^normal: has no nodes"),
        (darts("'sep_conv_3x3'"), "normal: expected a list, got 'sep_conv_3x3'"),
        (darts("[('a', 0), ('b', 1), ('c', 1)]"), "got 3 pairs"),
        (darts("[('a', 0), ('b', 2)]"), r"normal\[1\]: b into node 2 .* nodes 0 to 1, got 2"),
        (darts("[('a', 0), ('b', True)]"), r"normal\[1\]: b into node 2 .* got True"),
        (darts("[('a', 0), ('b', 2, 1)]"), r"normal\[1\]: a triple in a list that began with a p"),
        (darts("[('a', 0), ('b',)]"), r"normal\[1\]: expected \(operation, predecessor\) or"),
        (darts("[[('a', 0)], [('b', 1, 2)]]"), r"normal\[1\]\[0\]: expected \(operation, predec"),
        (darts("[[('a', 0)], [('b', 'c')]]"), r"normal\[1\]\[0\]: b into node 3"),
        (darts("[[('a', 0)], [7]]"), r"normal\[1\]\[0\]: expected a list, got 7"),
        (darts("[('a b', 0), ('b', 1)]"), r"normal\[0\]: expected the name of an operation"),
        (darts("[('a', 1, 0)]"), r"normal\[0\]: expected the number of a node from 2"),
        (darts("[('a', 10000000, 0)]"), "got 10000000"),
        (darts(concat="[]"), "normal_concat: names no node"),
        (darts(concat="[2, 2]"), r"normal_concat: repeated node in \[2, 2\]"),
        (darts(concat="[3]"), "normal_concat: node 3 does not exist; normal has the nodes 2 to 2"),
        (darts(concat="[0, 2]"), "normal_concat: expected the number of a node from 2 to 999"),
        (darts(concat="2"), "normal_concat: expected a list, got 2"),
        (darts(concat="range(2, 10**9)"), r"expected a list.* got '10\*\*9'"),
        (darts(concat="range(2, 999999999999999999999)"), "expected the number .* got 1000"),
        (darts(concat="range(2, 3, 0)"), "must not be zero, got 'range"),
        (darts(concat="range('a')"), "got \"range\\('a'\\)\""),
        ("{", "not even JSON"),
        ('{"a": ' * 10000, "not even JSON"),
        ('{"normal": []}', "got normal$"),
        ('{"normal": 1, "normal_concat": [2], "reduce": 1, "reduce_concat": [2]}', "normal: exp"),
        ("x" * 70000, "70000 characters, at most 65536"),
        ("|", r"node 1: expected \|op~0\|...\|, got '\|'"),
        ("|none~0|+|none~0|none~1|", "expected the edges into 3 nodes, got 2"),
        ("|none~0|+|none~0|+|none~0|none~1|none~2|", r"node 2: .*\[0, 1\] .* edges from \[0\]"),
        ("|none~0|+|none~1|none~0|+|none~0|none~1|none~2|", r"node 2: .* edges from \[1, 0\]"),
        ("|none~0|+|none~0|none~2|+|none~0|none~1|none~2|", "node 2: none into node 2 must"),
        ("|sep~0|+|none~0|none~1|+|none~0|none~1|none~2|", "'sep' from node 0 is not one of none"),
        ("|none|+|none~0|none~1|+|none~0|none~1|none~2|", "node 1: expected op~pre.* got 'none'"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_from_json_wants_an_object():
    with pytest.raises(ValueError, match=r"expected a JSON object, got '\[1\]'"):
        from_json("[1]")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: parse(b"Genotype()"), TypeError, "read from a str, got bytes"),
        (lambda: dump(SMALL, "yaml"), ValueError, "'yaml'; allowed: darts, ptdarts, fairdarts, "),
        (lambda: dump(SMALL, "nb201"), TypeError, "a Genotype; this format is for a NB201Genotype"),
        (lambda: dump("Genotype()", "json"), TypeError, "AnyGenotype is needed"),
        (lambda: Genotype(PAIR, range(2, 10**30), PAIR, (2,)), ValueError, "got 1000"),
        (lambda: NB201Genotype(5), ValueError, "cell: expected a list, got 5"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


names = st.sampled_from(["none", "sep_conv_3x3", "x", "_1", "Über"])


@st.composite
def cells(draw):
    nodes = tuple(
        tuple(draw(st.lists(st.tuples(names, st.integers(0, node - 1)), max_size=3)))
        for node in range(2, 2 + draw(st.integers(1, 6)))
    )
    ids = st.lists(st.integers(2, len(nodes) + 1), min_size=1, unique=True)
    return nodes, tuple(draw(ids))


genotypes = st.builds(lambda n, r: Genotype(*n, *r), cells(), cells())


@settings(deadline=None)
@given(genotypes, st.sampled_from(["darts", "ptdarts", "fairdarts", "json"]))
def test_what_is_written_is_read_back(genotype, format):
    try:
        text = dump(genotype, format)
    except ValueError:
        assert format in ("darts", "fairdarts")
    else:
        assert parse(text) == genotype


@settings(deadline=None)
@given(st.lists(st.sampled_from(NB201_OPS), min_size=6, max_size=6))
def test_any_nas_bench_201_cell_is_read_back(ops):
    nodes = (((ops[0], 0),), ((ops[1], 0), (ops[2], 1)), tuple(zip(ops[3:], range(3))))
    for format in ("nb201", "json"):
        assert parse(dump(NB201Genotype(nodes), format)) == NB201Genotype(nodes)


def assert_genotype_or_value_error(text):
    try:
        parsed = parse(text)
    except ValueError:
        return
    assert isinstance(parsed, Genotype | NB201Genotype | GraphGenotype)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@settings(deadline=None)
@given(st.one_of(st.text(), st.builds("{}{}".format, st.sampled_from("{|["), st.text())))
def test_garbage_raises_value_error(text):
    assert_genotype_or_value_error(text)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@settings(deadline=None)
@given(st.data())
def test_damaged_genotypes_raise_value_error(data):
    of_darts = [f for f in FORMATS if f not in ("nb201", "nas-bench-graph")]
    texts = [dump(SPARSE if f != "darts" else SMALL, f) for f in of_darts]
    texts.append("Arch([0, 1, 1, 2], ['gcn', 'cheb', 'gin', 'fc'])")
    texts.append("|none~0|+|none~0|none~1|+|none~0|none~1|none~2|")
    texts.append(f'{{"nb201": "{texts[-1]}"}}')
    text = data.draw(st.sampled_from(texts))
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 8)))
    patch = data.draw(st.text("()[]{}'\"|~+,:= 0129-*aGnrange\n", max_size=6))
    assert_genotype_or_value_error(text[:start] + patch + text[stop:])
