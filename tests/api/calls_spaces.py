"""Valid calls of fastnas.spaces, of its genotypes and of its distributions."""

from __future__ import annotations

import numpy as np
from wrong_values import Argument, Call, choice, instance, integer, number, one_of, sequence, text

from fastnas import spaces
from fastnas.spaces import Edge, EdgeTable, EdgeTerm, darts, distribution, nb201

DARTS = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2],"
    " reduce=[('max_pool_3x3', 0), ('sep_conv_5x5', 1)], reduce_concat=[2])"
)
NB201 = "|none~0|+|skip_connect~0|none~1|+|none~0|nor_conv_1x1~1|none~2|"
GRAPH = "Arch([0, 1, 1, 2], ['gcn', 'cheb', 'gin', 'fc'])"
EDGE = ("none", "skip_connect")
SLOTS = nb201.NB201Slots()
SKIP = EdgeTerm("skip", 0)
TABLE = EdgeTable(1, 1, 1, (Edge(0, 0, 1, (SKIP,)),))
SHARES = {"normal": (0.2, 0.2, 0.2, 0.2, 0.2)}

space = instance(lambda: spaces.get_space("S0"))
darts_cells = instance(lambda: spaces.parse(DARTS))
nb201_cells = instance(lambda: spaces.parse(NB201))
cell_type = choice("normal").called("cell type")
candidates = (
    sequence(text("none"), 1)
    .but("with a list")
    .plus(**{"a name twice": ["none", "none"], "an empty name": [""], "text": "none"})
)
counts = one_of(
    lambda: {"normal": (2, 2, 2, 0, 0)},
    **{"None": None, "a list": [1], "a row too short": {"normal": (6,)}, "a zero row":
       {"normal": (0,) * 5}, "negative": {"normal": (-1, 7, 0, 0, 0)}, "empty": {},
       "halves": {"normal": (0.5, 5.5, 0, 0, 0)}, "no rows": {"normal": 3}},
)  # fmt: skip
generator = instance(lambda: np.random.default_rng(0))
shares = one_of(
    lambda: SHARES,
    **{"None": None, "a list": [0.2] * 5, "a number": 3, "empty": {}, "one too few":
       {"normal": (0.5, 0.5)}, "sum 2": {"normal": (0.4,) * 5}, "negative":
       {"normal": (-1, 2, 0, 0, 0)}, "nan": {"normal": (float("nan"),) * 5},
       "text": {"normal": "abcde"}, "no row": {"normal": None}, "a number as a row":
       {"normal": 1.0}, "true": {"normal": (True, 0, 0, 0, 0)}},
).called("normal", "distribution")  # fmt: skip


def nodes_of(valid: object) -> Argument:
    return one_of(
        lambda: valid,
        **{"None": None, "a number": 3, "text": "abc", "empty": [], "pairs of numbers": [(1, 0)],
           "an edge from itself": [[("none", 2)]], "no predecessor": [[("none",)]], "a half":
           [[("none", 0.5)]], "true": [[("none", True)]], "negative": [[("none", -1)]],
           "a dict": {}, "an unnamed operation": [[("", 0)]]},
    )  # fmt: skip


concat = one_of(
    lambda: [2],
    **{"None": None, "a number": 2, "text": "2", "empty": [], "an input": [1], "a node twice":
       [2, 2], "a missing node": [3], "a half": [2.5], "true": [True], "nan": [float("nan")],
       "huge": [10**30]},
)  # fmt: skip
genotype_text = text(DARTS).called("genotype", "str", "cell").plus(
    **{"half a genotype": DARTS[:-10], "another call": "print(1)", "empty": "", "json": "{}",
       "a short cell": "|none~0|", "long": "[" * 100_000}
)  # fmt: skip
slots = one_of(
    lambda: {"normal": ["none"] * 6},
    **{"None": None, "a list": ["none"] * 6, "too few": {"normal": ["none"] * 5}, "too many":
       {"normal": ["none"] * 7}, "unknown": {"normal": ["no-such"] * 6}, "no cell": {}, "numbers":
       {"normal": [0] * 6}},
).called("normal", "operation")  # fmt: skip
darts_slots = {"normal": ["skip_connect"] * 2, "reduce": ["skip_connect"] * 2}
wiring = one_of(
    lambda: {"normal": [0], "reduce": [0]},
    **{"None": None, "a list": [0], "no cell": {}, "too many": {"normal": [0, 0], "reduce": [0]},
       "above": {"normal": [1], "reduce": [0]}, "negative": {"normal": [-1], "reduce": [0]},
       "a half": {"normal": [0.5], "reduce": [0]}, "a number": {"normal": 0, "reduce": [0]}},
)  # fmt: skip
length = integer(6, 1)
operations = sequence(text("none"), 1).plus(**{"a name twice": ["none", "none"], "text": "none"})

numbers = one_of(lambda: (3, 5), **{
    "None": None, "a number": 3, "text": "35", "empty": (), "halves": (0.5,), "zero": (0,),
    "twice": (3, 3), "true": (True,), "lists": ([3],), "huge": (10**30,),
})  # fmt: skip
stages = one_of(lambda: ((8, 2, 1), (8, 1, 2)), **{
    "None": None, "a number": 3, "text": "abc", "empty": (), "pairs": ((8, 2),),
    "a stride of 3": ((8, 3, 1),), "no layers": ((8, 2, 0),), "halves": ((8.5, 2, 1),),
    "true": ((8, True, 1),), "a stage alone": (8, 2, 1),
})  # fmt: skip
column = one_of(lambda: "k3_e6 skip", **{
    "None": None, "a number": 3, "bytes": b"skip", "empty": "", "another name": "k3_e6 none",
    "a list": ["skip"], "no expansion": "k3", "a long number": "k3_e" + "9" * 5000,
})  # fmt: skip
blocks = one_of(lambda: [(3, 6), "skip"], **{
    "None": None, "a number": 3, "text": "skip", "empty": [], "another name": ["none"],
    "three numbers": [(3, 6, 1)], "halves": [(3.5, 6)], "zero": [(0, 6)], "true": [(True, 6)],
})  # fmt: skip

of_fairnas = one_of(lambda: spaces.MOBILE_ARCHITECTURES["FairNAS-A"], **{
    "None": None, "a number": 3, "text": "skip", "empty": [], "one block": [(3, 6)],
    "a skip that halves": ["skip"] * 19, "numbers": [3] * 19,
})  # fmt: skip

CALLS = [
    Call("MobileSpace", spaces.MobileSpace, {
        "stages": stages, "stem": integer(8, 1), "stem_stride": integer(2, 1, 2),
        "first": integer(8, 1), "head": integer(8, 1), "kernels": numbers, "expansions": numbers}),
    Call("MobileSpace", spaces.MobileSpace().scaled, {"width": number(0.5, above=0.0)}, "scaled"),
    Call("MobileGenotype", spaces.MobileGenotype, {
        "architecture": of_fairnas, "width": number(0.5, high=16.0, above=0.0),
        "stem_stride": integer(2, 1, 2)}),
    Call("parse_column", spaces.parse_column, {"text": column}),
    Call("format_column", spaces.format_column, {"architecture": blocks}),
    Call("get_space", spaces.get_space, {"name": choice("S0").called("search space")}),
    Call("uniform_space", spaces.uniform_space, {
        "name": text("own").plus(empty=""), "candidates": candidates, "nodes": integer(2, 1)}),
    Call("Space", spaces.Space, {
        "name": text("own").plus(empty=""),
        "normal": one_of(lambda: (EDGE, EDGE), **{"None": None, "a number": 3, "text": "none",
            "one edge": (EDGE,), "an empty edge": (EDGE, ()), "uneven": (EDGE, ("none",)),
            "numbers": ((1,), (2,)), "a name twice": (EDGE, ("none", "none")), "empty": ()}),
        "reduce": one_of(lambda: (EDGE, EDGE), **{"None": None, "a number": 3, "empty": (),
            "more edges": (EDGE,) * 5, "text": "none"}),
        "layout": choice("darts")}),
    Call("Space", lambda op: spaces.get_space("S0").without(op), {
        "op": choice("none").called("operation")}, "Space.without"),
    Call("Space", lambda edge, cell_type: spaces.get_space("S0").stride(cell_type, edge), {
        "edge": one_of(lambda: (0, 2), **{"None": None, "a number": 3, "reversed": (2, 0),
            "missing": (0, 99), "halves": (0.5, 2.5), "a list": [[0], 2], "text": "02"}),
        "cell_type": cell_type}, "Space.stride"),
    Call("Space", lambda cell_type: spaces.get_space("S0").candidates(cell_type), {
        "cell_type": cell_type}, "Space.candidates"),
    Call("Space", lambda cell_type: spaces.get_space("S0").num_candidates(cell_type), {
        "cell_type": cell_type}, "Space.num_candidates"),
    Call("Genotype", spaces.Genotype, {
        "normal": nodes_of([[("none", 0)]]), "normal_concat": concat,
        "reduce": nodes_of([[("none", 0)]]), "reduce_concat": concat}),
    *(Call("Genotype", lambda cell, m=m: getattr(spaces.parse(DARTS), m)(cell), {
        "cell": choice("normal").called("cell type")}, f"Genotype.{m}")
      for m in ("nodes", "concat", "edges", "live_nodes")),
    Call("NB201Genotype", spaces.NB201Genotype, {"nodes": one_of(
        lambda: tuple(tuple(("none", i) for i in range(node)) for node in (1, 2, 3)),
        **{"None": None, "a number": 3, "text": "abc", "empty": (), "three empty": ((), (), ()),
           "unknown": ((("no", 0),), (), ())}).called("cell", "node")}),
    Call("NB201Genotype", lambda cell: spaces.parse(NB201).edges(cell), {
        "cell": choice("normal")}, "NB201Genotype.edges"),
    Call("GraphGenotype", spaces.GraphGenotype, {
        "links": one_of(lambda: (0, 1, 1, 2), **{"None": None, "a number": 3, "text": "0112",
            "three": (0, 1, 1), "itself": (1, 1, 1, 2), "negative": (0, -1, 1, 2),
            "a half": (0, 0.5, 1, 2), "true": (0, True, 1, 2), "a dict": {}}),
        "ops": one_of(lambda: ("gcn",) * 4, **{"None": None, "a number": 3, "text": "gcns",
            "five": ("gcn",) * 5, "unknown": ("no",) * 4, "numbers": (1, 2, 3, 4), "lists":
            ([], [], [], [])}).called("operation")}),
    Call("GraphGenotype", lambda cell: spaces.parse(GRAPH).edges(cell), {
        "cell": choice("normal")}, "GraphGenotype.edges"),
    Call("GraphGenotype", spaces.GraphGenotype.from_key, {"key": one_of(lambda: 61237, **{
        "None": None, "text": "61237", "negative": -1, "another spelling": 73221, "huge": 10**30,
        "a half": 0.5, "true": True})}, "GraphGenotype.from_key"),
    *(Call(f.__name__, f, {"genotype": darts_cells, "cell": choice("normal").called("cell type")})
      for f in (spaces.skip_count, spaces.parameter_free_count)),
    Call("dump", spaces.dump, {"genotype": darts_cells, "format": choice("json")}),
    *(Call(f.__name__, f, {"text": genotype_text})
      for f in (spaces.parse, spaces.from_darts)),
    Call("from_json", spaces.from_json, {"text": text(spaces.to_json(spaces.parse(DARTS))).called(
        "genotype", "str", "node").plus(**{"an array": "[]", "no json": "abc", "no keys": "{}",
        "deep": "[" * 5000, "a wrong cell": '{"nb201": "abc"}'})}),
    Call("from_nb201", spaces.from_nb201, {"text": text(NB201).called(
        "genotype", "str", "node", "cell").plus(**{"empty": "", "cut": NB201[:-4],
        "an unknown operation": NB201.replace("none", "no")})}),
    *(Call(f.__name__, f, {"genotype": darts_cells})
      for f in (spaces.to_darts, spaces.to_fairdarts, spaces.to_json, spaces.to_ptdarts)),
    Call("to_nb201", spaces.to_nb201, {"genotype": nb201_cells}),
    Call("NB201Slots", nb201.NB201Slots, {
        "ops": operations, "length": integer(6, 6, 6)}),
    Call("NB201Slots", lambda slots: SLOTS.genotype(slots), {
        "slots": slots}, "NB201Slots.genotype"),
    Call("NB201Slots", lambda genotype: SLOTS.slots(genotype), {
        "genotype": nb201_cells}, "NB201Slots.slots"),
    Call("DartsSlots", darts.DartsSlots, {"ops": operations, "length": integer(8, 1)}),
    Call("DartsSlots", lambda wiring: darts.DartsSlots(("skip_connect",), 2).genotype(
        darts_slots, wiring), {"wiring": wiring}, "DartsSlots.genotype"),
    Call("DartsSlots", lambda genotype: darts.DartsSlots(EDGE).slots(genotype), {
        "genotype": darts_cells}, "DartsSlots.slots"),
    Call("slots_of", distribution.slots_of, {
        "space": space.plus(**{"uneven candidates": spaces.get_space("S1")}),
        "length": integer(8, 1, optional=True)}),
    Call("OperationDistribution", distribution.OperationDistribution, {
        "ops": one_of(lambda: SLOTS.ops, **{"None": None, "a number": 3, "empty": (), "twice":
            ("none",) * 5, "one": ("none",), "numbers": (1, 2, 3, 4, 5),
            "text": "abcde"}).called("operations"),
        "p": shares}),
    Call("OperationDistribution", distribution.OperationDistribution.of, {
        "genotype": nb201_cells, "layout": instance(lambda: SLOTS)}),
    Call("OperationDistribution", distribution.OperationDistribution.from_counts, {
        "counts": counts, "layout": instance(lambda: SLOTS)}),
    Call("OperationDistribution", distribution.OperationDistribution.dirichlet, {
        "layout": instance(lambda: SLOTS), "rng": generator,
        "concentration": number(1.0, above=0.0).but("true", "a list")}),
    Call("OperationDistribution", distribution.OperationDistribution.from_dict, {
        "shares": one_of(lambda: {"normal": {"none": 1.0}}, **{"None": None, "a list": [], "empty":
            {}, "a number": 3, "no rows": {"normal": 3}, "text": {"normal": {"none": "1"}},
            "sum 2": {"normal": {"none": 2.0}}}).called("normal", "distribution")}),
    Call("OperationDistribution", lambda length: distribution.OperationDistribution(
        SLOTS.ops, SHARES).counts(length), {"length": length}, "OperationDistribution.counts"),
    Call("OperationDistribution", lambda layout, rng: distribution.OperationDistribution(
        SLOTS.ops, SHARES).sample(layout, rng), {
        "layout": instance(lambda: SLOTS), "rng": generator}, "OperationDistribution.sample"),
    Call("snap", distribution.snap, {
        "p": one_of(lambda: (0.5, 0.5), **{"None": None, "a number": 0.5, "empty": (), "text": "ab",
            "nan": (float("nan"), 1.0), "negative": (-1.0, 2.0), "zeros": (0.0, 0.0),
            "inf": (float("inf"), 1.0), "a table": ((0.5, 0.5),) * 2}),
        "length": length}),
    Call("lattice_size", distribution.lattice_size, {
        "operations": integer(3, 1), "length": integer(4, 0)}),
    Call("lattice", lambda operations, length: list(distribution.lattice(operations, length)), {
        "operations": integer(3, 1), "length": integer(4, 0)}, "lattice"),
    Call("layout_of", spaces.layout_of, {"genotype": darts_cells}),
    Call("EdgeTable", EdgeTable, {
        "inputs": integer(1, 1), "nodes": integer(1, 1), "candidates": integer(1, 1),
        "edges": one_of(lambda: (Edge(0, 0, 1, (SKIP,)),), **{"None": None, "a number": 1, "text":
            "ab", "empty": (), "numbers": (1, 2), "a source past the end": (Edge(9, 0, 1, ()),),
            "stride 3": (Edge(0, 0, 3, ()),), "a target past the end": (Edge(0, 9, 1, ()),),
            "stride true": (Edge(0, 0, True, ()),), "an unknown op": (Edge(0, 0, 1, (EdgeTerm(
                "no-such", 0),)),), "a term that is none": (Edge(0, 0, 1, (3,)),), "no terms":
            (Edge(0, 0, 1, None),), "a half": (Edge(0.5, 0, 1, ()),)}).called("edge")}),
    Call("EdgeTable", lambda choice: TABLE.path(choice), {
        "choice": one_of(lambda: (0,), **{"None": None, "a number": 1, "text": "0", "two": (0, 0),
            "past the end": (5,), "half": (0.5,), "nan": (float("nan"),),
            "below": (-2,)})}, "EdgeTable.path"),
    Call("EdgeTable", EdgeTable.decode, {
        "code": one_of(lambda: TABLE.code, **{"None": None, "a number": 1, "text": "0", "cut":
            TABLE.code[:-1], "empty": (), "an unknown op": (*TABLE.code[:-4], 99, 0, 0, 1),
            "halves": (0.5,) * 11, "negative": (*TABLE.code[:-4], -1, 0, 0, 1)})}),
]  # fmt: skip
