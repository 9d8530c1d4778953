import ast
from pathlib import Path

import pytest

from fastnas import spaces
from fastnas.spaces import (
    DARTS_PRIMITIVES,
    NB201_OPS,
    OPS,
    SPACES,
    Space,
    get_space,
    uniform_space,
)

EDGES_OF_FOUR_NODES = (
    *((0, 2), (1, 2)),
    *((0, 3), (1, 3), (2, 3)),
    *((0, 4), (1, 4), (2, 4), (3, 4)),
    *((0, 5), (1, 5), (2, 5), (3, 5), (4, 5)),
)


def test_s0_is_the_darts_space():
    space = get_space("S0")
    assert space.nodes == 4
    assert space.edges == EDGES_OF_FOUR_NODES
    assert space.normal == space.reduce == (DARTS_PRIMITIVES,) * 14
    assert DARTS_PRIMITIVES.index("none") == 0
    assert DARTS_PRIMITIVES.index("skip_connect") == 3
    assert DARTS_PRIMITIVES.index("dil_conv_5x5") == 7


def test_s1_edges():
    short = {
        "max_pool_3x3": "max",
        "avg_pool_3x3": "avg",
        "skip_connect": "skip",
        "sep_conv_3x3": "sep3",
        "dil_conv_3x3": "dil3",
        "dil_conv_5x5": "dil5",
    }
    spelled = {
        cell: " ".join("/".join(short[op] for op in edge) for edge in SPACES["S1"].candidates(cell))
        for cell in ("normal", "reduce")
    }
    assert spelled["normal"] == (
        "skip/dil3 skip/dil5 skip/dil5 skip/sep3 skip/dil3 max/skip skip/sep3 skip/sep3 "
        "skip/dil3 skip/sep3 max/skip skip/dil3 dil3/dil5 dil3/dil5"
    )
    assert spelled["reduce"] == (
        "max/avg max/dil3 max/avg max/avg skip/dil5 max/avg max/sep3 skip/dil3 skip/dil5 "
        "max/avg max/avg skip/dil5 skip/dil5 skip/dil5"
    )


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("S2", ("skip_connect", "sep_conv_3x3")),
        ("S3", ("none", "skip_connect", "sep_conv_3x3")),
        ("S4", ("noise", "sep_conv_3x3")),
    ],
)
def test_uniform_robust_darts_spaces(name, candidates):
    space = get_space(name)
    assert space.name == name
    assert space.candidates("normal") == space.candidates("reduce") == (candidates,) * 14


def test_every_candidate_has_a_known_name():
    for space in SPACES.values():
        assert space.operations <= set(OPS if space.layout == "darts" else NB201_OPS)


@pytest.mark.parametrize("nodes", range(1, 8))
def test_nodes_and_edges(nodes):
    space = uniform_space("any", ["a", "b", "c"], nodes=nodes)
    assert space.nodes == nodes
    assert len(space.edges) == len(space.normal) == nodes * (nodes + 3) // 2
    assert space.num_candidates("normal") == space.num_candidates("reduce") == 3
    assert all(0 <= i < j for i, j in space.edges)


def test_stride_is_two_only_out_of_the_inputs_of_a_reduction_cell():
    space = get_space("S0")
    assert {space.stride("normal", edge) for edge in space.edges} == {1}
    strided = [edge for edge in space.edges if space.stride("reduce", edge) == 2]
    assert strided == [edge for edge in space.edges if edge[0] < 2]
    assert len(strided) == 8


def test_nb201():
    space = get_space("nb201")
    assert space.normal == (NB201_OPS,) * 6 and space.reduce == ()
    assert space.edges == ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert (space.inputs, space.nodes, space.kept_edges) == (1, 3, 6)
    assert space.cell_types == ("normal",)
    assert {space.stride("normal", edge) for edge in space.edges} == {1}
    assert space.without("none").layout == "nb201"
    assert space.without("none").normal == (NB201_OPS[1:],) * 6
    assert space.without("max_pool_3x3") is space


def test_the_darts_spaces_keep_two_edges_a_node():
    space = get_space("S0")
    assert (space.inputs, space.nodes, space.kept_edges) == (2, 4, 8)
    assert space.cell_types == ("normal", "reduce")


def test_without():
    space = get_space("S0").without("none")
    assert space.normal == space.reduce == (DARTS_PRIMITIVES[1:],) * 14
    assert space.name == "S0-without-none"
    assert space.without("none") is space
    assert get_space("S2").without("noise") == get_space("S2")


def test_spaces_are_values():
    same = uniform_space("S2", ["skip_connect", "sep_conv_3x3"])
    assert same == SPACES["S2"]
    assert hash(same) == hash(SPACES["S2"])


def test_lists_become_tuples():
    assert Space("x", [["a"], ["b"]], [["a"], ["a"]]).normal == (("a",), ("b",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_space("S5"), r"no search space 'S5'; there are S0, S1, S2, S3, S4"),
        (lambda: get_space(["S0"]), "no search space"),
        (lambda: get_space("S2").without("sep_conv"), "'sep_conv'; S2 has sep_conv_3x3"),
        (lambda: get_space("S1").without("skip_connect"), "same number of candidates"),
        (
            lambda: get_space("S2").without("skip_connect").without("sep_conv_3x3"),
            r"normal\[0\]: no candidate is left",
        ),
        (lambda: uniform_space("x", []), "x: candidates: no candidate"),
        (lambda: uniform_space("x", ["a"], nodes=0), "nodes is 0; at least 1 is needed"),
        (lambda: uniform_space("x", "none"), "expected a tuple of operation names, got 'none'"),
        (lambda: uniform_space("x", ["a", "a"]), "repeated candidate"),
        (lambda: uniform_space("x", 3), "expected a tuple of operation names, got 3"),
        (lambda: Space("x", 3, 3), "x: normal: expected a tuple with the candidates per edge"),
        (lambda: uniform_space("x", ["a", 3]), "expected a tuple of operation names"),
        (lambda: uniform_space("", ["a"]), "needs a name"),
        (lambda: Space("x", (("a",),) * 3, (("a",),) * 3), "x: normal: 3 edges make no whole"),
        (lambda: Space("x", (), ()), "0 edges"),
        (lambda: Space("x", (("a",),) * 2, (("a",),) * 5), "normal has 2 edges and reduce 5"),
        (lambda: Space("x", (("a",), ("a", "b")), (("a",),) * 2), r"got \[1, 2\] edge by edge"),
        (lambda: get_space("S0").stride("reduce", (2, 2)), r"S0: no edge \(2, 2\)"),
        (lambda: get_space("S0").stride("reduce", 0), "S0: no edge 0"),
        (lambda: get_space("S0").stride("reduction", (0, 2)), "not one of normal, reduce"),
        (lambda: get_space("S0").candidates("both"), "'both' is not one of normal, reduce"),
        (lambda: Space("x", (("a",),) * 2), "x: reduce: 0 edges make no whole"),
        (lambda: Space("x", (("none",),) * 6, layout="nb301"), "'nb301' is not one of darts, nb"),
        (
            lambda: Space("x", (("none",),) * 6, layout=["darts"]),
            r"layout \['darts'\] is not one of",
        ),
        (lambda: Space("x", (("none",),) * 5, layout="nb201"), "5 edges; a cell of layout nb201"),
        (lambda: Space("x", (("none", "a"),) * 6, layout="nb201"), "a in layout nb201, whose op"),
        (lambda: Space("x", (("none",),) * 6, (("none",),) * 6, "nb201"), "no reduction cell"),
        (lambda: get_space("nb201").candidates("reduce"), "nb201 has no reduce cell"),
        (lambda: get_space("nb201").stride("normal", (1, 4)), r"0 <= i < j and 1 <= j <= 3"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_module_here_imports_torch():
    for path in Path(spaces.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "torch"], path


@pytest.mark.parametrize("nodes", [1.5, 2.0, True, "2", None])
def test_nodes_are_a_whole_number(nodes):
    with pytest.raises(TypeError, match=r"nodes is .*; a whole number is needed"):
        uniform_space("x", ["a"], nodes=nodes)
