"""Objects that a forward reads: schedules, settings. A change of one is seen in the next call."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import math
import operator
import types

import numpy
import pytest
import torch
from accelerated import C
from public_darts import DilConv, Identity, SepConv
from test_plans import assert_alike, holder, inputs, planned
from torch import nn

import fastnas
from fastnas.dropin.plans import MOST


class Schedule:
    """A rate that the code of a search moves from epoch to epoch."""

    factor = 3.0

    def __init__(self):
        self.rate, self.steps = 0.7, [1.0, 2.0]

    def at(self, step):
        return self.rate * self.steps[step]

    @property
    def doubled(self):
        return 2 * self.rate


class Called(Schedule):
    def __call__(self):
        return self.rate


@dataclasses.dataclass
class Record:
    rate: float = 0.7


@dataclasses.dataclass(frozen=True)
class Fixed:
    rate: float = 0.7


SCHEDULE, CALLED, RECORD, OTHER, FIXED = Schedule(), Called(), Record(), Record(), Fixed()
OBJECT = None


def by_method(self, x, w):
    return self.mixed(x, w) * SCHEDULE.at(1)


READS = {
    "attribute": lambda self, x, w: self.mixed(x, w) * SCHEDULE.rate,
    "method": by_method,
    "property": lambda self, x, w: self.mixed(x, w) * SCHEDULE.doubled,
    "of its class": lambda self, x, w: self.mixed(x, w) * SCHEDULE.factor,
    "call": lambda self, x, w: self.mixed(x, w) * CALLED(),
    "record": lambda self, x, w: self.mixed(x, w) * RECORD.rate,
    "frozen record": lambda self, x, w: self.mixed(x, w) * FIXED.rate,
    "record, compared": lambda self, x, w: self.mixed(x, w) * (2.0 if RECORD == OTHER else 3.0),
    "getattr": lambda self, x, w: self.mixed(x, w) * getattr(SCHEDULE, "rate"),  # noqa: B009
    "hasattr": lambda self, x, w: self.mixed(x, w) * (2.0 if hasattr(SCHEDULE, "late") else 5.0),
}


@pytest.fixture(autouse=True)
def objects():
    globals().update(SCHEDULE=Schedule(), CALLED=Called(), RECORD=Record(), OTHER=Record())


@pytest.mark.parametrize("name", READS)
def test_what_an_object_says_is_no_reason_to_run(name):
    for read in (SCHEDULE, CALLED, RECORD, FIXED):
        copy.deepcopy(read)  # which leaves a name in its class
    eager, fused = holder(READS[name])
    for _ in range(3):
        assert_alike(eager, fused)
    assert planned(fused) == 1


CHANGES = {
    "attribute": ("attribute", lambda: setattr(SCHEDULE, "rate", 0.2)),
    "attribute of the one called": ("call", lambda: setattr(CALLED, "rate", 0.2)),
    "what a method reads": ("method", lambda: setattr(SCHEDULE, "rate", 0.2)),
    "in a list": ("method", lambda: SCHEDULE.steps.append(4.0) or SCHEDULE.steps.pop(0)),
    "what a property reads": ("property", lambda: setattr(SCHEDULE, "rate", 0.2)),
    "method on the object": ("method", lambda: setattr(SCHEDULE, "at", lambda step: 9.0)),
    "over its class's": ("of its class", lambda: setattr(SCHEDULE, "factor", 4.0)),
    "another class": ("of its class", lambda: setattr(SCHEDULE, "__class__", Quick)),
    "another object": ("attribute", lambda: globals().update(SCHEDULE=Quick())),
    "record": ("record", lambda: setattr(RECORD, "rate", 0.2)),
    "record, compared": ("record, compared", lambda: setattr(OTHER, "rate", 0.2)),
    "a name that it had not": ("hasattr", lambda: setattr(SCHEDULE, "late", 1)),
    "by getattr": ("getattr", lambda: setattr(SCHEDULE, "rate", 0.2)),
}


TABLE = {"a": 0.5, "b": 2.0, "c": 3.0}


def equal_then_changed(module):
    module.record = copy.deepcopy(module.record)
    module(*inputs())
    module.record.rate = 0.2


def turned(module):
    module.ops_by_name["a"] = module.ops_by_name.pop("a")


def by_name(self, x, w):
    return sum(a * op(x) for a, op in zip(w, self.ops_by_name.values()))


def with_attributes(forward):
    """The two of `holder`, with a record and candidates by name."""
    pair = holder(forward)
    for module in pair:
        module.record = Record()
        module.listed = [1, 1, 0]
    return pair


IN_THE_MODULE = {
    "an equal record, changed": (
        lambda self, x, w: self.mixed(x, w) * self.record.rate,
        equal_then_changed,
    ),
    "indices that become a mask": (
        lambda self, x, w: self.mixed(x, w[self.listed]),
        lambda module: module.listed.__setitem__(slice(None), [True, True, False]),
    ),
    "an order": (
        lambda self, x, w: sum(a * b * o(x) for a, b, o in zip(w, TABLE.values(), self.ops)),
        lambda module: TABLE.update(a=TABLE.pop("a")) if next(iter(TABLE)) == "a" else None,
    ),
    "a sign": (
        lambda self, x, w: self.mixed(x, w) * math.copysign(1.0, self.scale),
        lambda module: setattr(module, "scale", -module.scale),
    ),
    "all attributes of an object": (
        lambda self, x, w: self.mixed(x, w) * self.record.rate,
        lambda module: setattr(module.record, "__dict__", {"rate": 0.1}),
    ),
}


@pytest.mark.parametrize("name", IN_THE_MODULE)
def test_a_change_in_the_module_is_seen(name):
    forward, change = IN_THE_MODULE[name]
    eager, fused = with_attributes(forward)
    for module in (eager, fused):
        for _ in range(2):
            module(*inputs())
    assert planned(fused) == 1
    for module in (eager, fused):
        change(module)
    assert_alike(eager, fused)


def test_the_order_of_candidates_by_name_is_seen():
    torch.manual_seed(3)

    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            named = {"a": SepConv(C, 3, 1), "b": DilConv(C, 5, 1), "c": Identity()}
            self.ops_by_name = nn.ModuleDict(named)

        forward = by_name

    eager = ByName().double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    for _ in range(2):
        assert_alike(eager, fused)
    assert planned(fused) == 1
    for module in (eager, fused):
        turned(module)
    x, w = inputs()
    torch.testing.assert_close(fused(x, w), eager(x, w))


READ_BY_NAME = {
    "attrgetter": lambda self, x, w: self.mixed(x, w) * operator.attrgetter("rate")(SCHEDULE),
    "of builtins": lambda self, x, w: self.mixed(x, w) * builtins.getattr(SCHEDULE, "rate"),  # noqa: B009
    "by another name": lambda self, x, w: self.mixed(x, w) * GET(SCHEDULE, "rate"),
}
GET = getattr


@pytest.mark.parametrize("name", READ_BY_NAME)
def test_names_that_are_texts(name):
    eager, fused = holder(READ_BY_NAME[name])
    assert_alike(eager, fused)
    assert_alike(eager, fused)
    SCHEDULE.rate = 0.2
    assert_alike(eager, fused)


@dataclasses.dataclass
class OwnEquality:
    rate: float = 0.7

    def __eq__(self, other):
        return FACTOR > 2


FACTOR = 1.0


def test_a_comparison_of_a_records_own_is_looked_into():
    equality = OwnEquality()
    eager, fused = holder(lambda self, x, w: self.mixed(x, w) * (2.0 if equality == 1 else 3.0))
    assert_alike(eager, fused)
    assert_alike(eager, fused)
    globals().update(FACTOR=3.0)
    assert_alike(eager, fused)
    globals().update(FACTOR=1.0)


class Quick(Schedule):
    factor = 8.0

    def __init__(self):
        self.rate = 0.1


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name):
    reads, change = CHANGES[name]
    eager, fused = holder(READS[reads])
    assert_alike(eager, fused)
    assert_alike(eager, fused)
    assert planned(fused) == 1
    before = [module(*inputs()) for module in (eager, fused)]
    change()
    assert_alike(eager, fused)
    assert_alike(eager, fused)
    assert not torch.equal(fused(*inputs()), before[1])


def test_a_patched_class_is_seen(monkeypatch):
    eager, fused = holder(READS["method"])
    assert_alike(eager, fused)
    monkeypatch.setattr(Schedule, "at", lambda self, step: 0.3)
    assert_alike(eager, fused)


def test_an_equal_rate_is_no_change():
    eager, fused = holder(READS["attribute"])
    for _ in range(20):
        SCHEDULE.rate = float(str(SCHEDULE.rate))
        assert_alike(eager, fused)
    assert vars(fused)["forward"].args[1].plans.left == MOST  # no call was in vain


# ---- objects that are more than their attributes


class Counts(Schedule):
    def at(self, step):
        self.steps = [self.steps[0] + 1] * 2
        return self.steps[0]


class Slotted:
    __slots__ = ("rate",)

    def __init__(self):
        self.rate = 0.7


class Number(float):
    pass


class Weighs(Schedule):
    def __rmul__(self, y):
        self.rate += 1
        return self.rate * y


class Found(Schedule):
    def __getattr__(self, name):
        self.rate += 1
        return self.rate


class Holds(Schedule):
    def __init__(self):
        self.rate = torch.tensor(0.7, dtype=torch.float64)


HIDING = {
    "keeps a count": (Counts, lambda self, x, w: self.mixed(x, w) * OBJECT.at(0)),
    "slots": (Slotted, lambda self, x, w: self.mixed(x, w) * OBJECT.rate),
    "a number": (Number, lambda self, x, w: self.mixed(x, w) * (OBJECT + 1)),
    "an operator": (Weighs, lambda self, x, w: self.mixed(x, OBJECT.__rmul__(1.0) * w)),
    "makes attributes up": (Found, lambda self, x, w: self.mixed(x, w) * OBJECT.other),
    "holds a tensor": (Holds, lambda self, x, w: self.mixed(x, w) * OBJECT.rate),
    "an array": (
        lambda: types.SimpleNamespace(rate=numpy.array([0.5, 2.0])),
        lambda self, x, w: self.mixed(x, w) * float(OBJECT.rate[0]),
    ),
    "a namespace": (
        lambda: types.SimpleNamespace(rate=torch.ones(())),
        lambda self, x, w: self.mixed(x, w) * OBJECT.rate,
    ),
}


@pytest.mark.parametrize("name", HIDING)
def test_what_hides_something_runs_itself(name):
    kind, forward = HIDING[name]
    eager, fused = holder(forward)
    for _ in range(3):
        # One that counts is made anew for each of the two, which would share it else.
        outputs = []
        for module in (eager, fused):
            globals().update(OBJECT=kind())
            outputs += [[module(*inputs()) for _ in range(2)]]
        for own, by_plan in zip(*outputs):
            torch.testing.assert_close(by_plan, own)
    assert planned(fused) == 0


def test_a_reduction_beside_a_list_of_candidates_is_one():
    """DARTS- adds an auxiliary skip beside its list; at stride 2 it looks like a preprocessing."""
    from fastnas.benchmarks.layouts import LAYOUTS

    network = LAYOUTS["darts-minus"].build(4, 3, 2)
    report = fastnas.accelerate(network)
    LAYOUTS["darts-minus"].call(network, torch.randn(2, 3, 8, 8)).sum().backward()
    names = {name for name, module in network.named_modules() if "auxiliary_op" in name}
    assert names
    own = [name for name in names if "." not in name.split("auxiliary_op")[1]]
    forwards = {vars(network.get_submodule(name)).get("forward") for name in own}
    assert {f.func.__name__ for f in forwards if f} == {"candidate_forward"}
    assert report.calls.share == 1.0
