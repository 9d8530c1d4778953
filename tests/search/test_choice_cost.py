"""Costs of choices: counted at one-hot logits, differentiated, paid for, resumed, and refused."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastnas
from fastnas.nn import Choice, InputChoice, MobileNetSearchNetwork, count_parameters
from fastnas.nn.choice_cost import choice_costs, choice_shares, expected_cost
from fastnas.nn.cost import count_macs
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.choice_search import ChoiceSearch
from fastnas.spaces import MobileSpace


def convolutions(c=4):
    return {
        "skip": nn.Identity(),
        "small": nn.Conv2d(c, c, 1),
        "large": nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)),
    }


class Nodes(nn.Module):
    """A node of three states, whose edges are choices, one of which holds another."""

    def __init__(self, mixing="gdas", node="top2"):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        inner = Choice(convolutions(), mixing=mixing)
        outer = {"skip": nn.Identity(), "both": nn.Sequential(nn.Conv2d(4, 4, 1), inner)}
        self.edges = nn.ModuleList(
            [
                *(Choice(convolutions(), mixing=mixing) for _ in range(2)),
                Choice(outer, mixing=mixing),
            ]
        )
        self.node = InputChoice(3, mixing=node)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        y = self.node([partial(edge, x) for edge in self.edges])
        return self.classifier(y.mean((2, 3)))


def column(mixing="softmax"):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        Choice(convolutions(), mixing=mixing),
        nn.MaxPool2d(2),
        Choice(convolutions(), mixing=mixing),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def loader(size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(size) % 2), 4)


def search(network, **options):
    return ChoiceSearch(network, loader(), loader(), **{"epochs": 1, **options})


def decide(run, generator):
    with torch.no_grad():
        for logits in run.logits:
            logits.copy_(torch.randperm(len(logits), generator=generator) * 900.0)


@pytest.mark.parametrize("mixing", ["softmax", "gdas"])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_at_one_hot_it_is_what_is_counted(kind, mixing):
    run = search(column(mixing), cost=f"{kind}:1e6")
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        decide(run, generator)
        derived = run.derived_network()
        counted = count_macs(derived, (3, 8, 8)) if kind == "macs" else count_parameters(derived)
        assert float(run.cost.expected().detach()) == counted


@pytest.mark.parametrize("node", ["top2", "pairs", "softmax"])
def test_of_inputs_and_of_choices_in_choices_as_well(node):
    run = search(Nodes(node=node), cost="macs:1e6")
    generator = torch.Generator().manual_seed(2)
    seen = set()
    for _ in range(12):
        decide(run, generator)
        counted = count_macs(run.derived_network(), (3, 8, 8))
        assert float(run.cost.expected().detach()) == pytest.approx(counted, rel=1e-12)
        seen.add(counted)
    assert len(seen) > 3


def test_parameters_of_edges_that_no_node_reads_are_left_out():
    run = search(Nodes(), cost="params:1e6")
    generator = torch.Generator().manual_seed(2)
    for _ in range(12):
        decide(run, generator)
        derived = run.derived_network()
        kept = [derived.stem, derived.classifier, *(derived.edges[i] for i in derived.node.kept)]
        counted = sum(map(count_parameters, kept))
        assert float(run.cost.expected().detach()) == pytest.approx(counted, rel=1e-12)


def test_the_mobile_space():
    space = MobileSpace().scaled(0.25)
    torch.manual_seed(0)
    network = MobileNetSearchNetwork(2, space=space, mixing="softmax")
    run = search(network, cost="macs:1e6")
    generator = torch.Generator().manual_seed(3)
    decide(run, generator)
    counted = count_macs(run.derived_network(), (3, 8, 8))
    assert float(run.cost.expected().detach()) == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize(("mixing", "node"), [("sigmoid", "softmax"), ("gdas", "pairs")])
def test_the_gradient_is_that_of_finite_differences(mixing, node):
    network = Nodes(mixing, node).double()
    run = search(network.float(), cost="macs:1e4")
    network.double()
    generator = torch.Generator().manual_seed(0)
    logits = list(dict.fromkeys(run.logits))
    with torch.no_grad():
        for p in logits:
            p.copy_(torch.randn(p.shape, generator=generator))
    gradients = torch.autograd.grad(run.cost.expected(), logits)
    for p, gradient in zip(logits, gradients):
        for i in range(len(p)):
            sides = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    p[i] += step
                    sides.append(float(run.cost.expected().detach()))
                    p[i] -= step
            wanted = (sides[0] - sides[1]) / 2e-6
            assert float(gradient[i]) == pytest.approx(wanted, rel=1e-6, abs=1e-4)


def _shares(mixing):
    return choice_shares(Choice(convolutions(), mixing=mixing)).detach()


def test_shares_add_up_to_what_is_kept():
    for mixing in ("softmax", "sigmoid", "gdas"):
        assert float(_shares(mixing).sum()) == pytest.approx(1)
    for mixing in ("softmax", "top2", "pairs"):
        for inputs in (2, 4):
            found = choice_shares(InputChoice(inputs, mixing=mixing)).detach()
            assert found.shape == (inputs,) and float(found.sum()) == pytest.approx(2)


@pytest.mark.parametrize("mixing", ["softmax", "sigmoid", "gdas"])
def test_a_search_that_pays_derives_less(mixing):
    found = []
    for options in ({}, {"cost": "macs:1", "cost_weight": 100.0}):
        torch.manual_seed(0)
        network = column(mixing)
        with torch.no_grad():
            for p in (m.logits for m in network if isinstance(m, Choice)):
                p[2] += 0.1  # the dearest leads
        _, logits = fastnas.nn.split_parameters(network)
        run = search(network, epochs=4, logit_optimizer=torch.optim.Adam(logits, 0.1), **options)
        rows = run.run()
        found.append(count_macs(run.derived_network(), (3, 8, 8)))
    assert found[1] < found[0]
    costs = [row["expected_macs"] for row in rows]
    assert costs == sorted(costs, reverse=True) and set(run.derive().values()) == {"skip"}


def test_the_table_is_put_back_with_the_search(tmp_path):
    options = {"cost": "latency:1us", "epochs": 2}
    torch.manual_seed(0)
    whole = search(column(), **options)
    whole.run(tmp_path / "whole.pt")
    torch.manual_seed(0)
    first = search(column(), **options)
    first.cost.costs = dict(whole.cost.costs)
    first._run_epoch()
    first.save(tmp_path / "first.pt")
    again = search(column(), **options)
    assert again.cost.costs != whole.cost.costs
    again.run(tmp_path / "first.pt", resume=True)
    assert again.cost.costs == whole.cost.costs
    assert all(map(torch.equal, again.logits, whole.logits))
    other = search(column(), **{**options, "cost": "latency:2us"})
    with pytest.raises(fastnas.search.checkpoint.CheckpointError, match="of another search: cost"):
        other.load(tmp_path / "first.pt")


def test_counting_leaves_no_trace():
    networks = []
    for options in ({}, {"cost": "macs:1e12"}, {"cost": "latency:9s"}):
        torch.manual_seed(0)
        network = column("gdas")
        network.insert(0, nn.Dropout(0.2))
        network[0].eval()
        run = search(network, **options)
        assert not network[0].training and network[1].training
        assert all("forward" not in vars(module) for module in network.modules())
        run.run()
        networks.append(network.state_dict())
    for others in networks[1:]:
        assert all(map(torch.equal, networks[0].values(), others.values()))


def test_of_accelerated_candidates_as_of_others():
    from fastnas.layers.primitives import primitive

    names = ("sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3")
    choice = Choice({name: primitive(name, 4, 1, affine=False) for name in names}, mixing="softmax")
    network = nn.Sequential(nn.Conv2d(3, 4, 1), choice)
    x = torch.randn(1, 3, 8, 8)
    plain = choice_costs("macs", network, {"1": choice}, lambda: network(x))
    fastnas.accelerate(network)
    fused = choice_costs("macs", network, {"1": choice}, lambda: network(x))
    assert plain == fused and plain[(("1", 0),)] == 64 * 2 * (4 * 9 + 16)
    assert float(expected_cost(plain, {"1": choice}).detach()) > plain[()]


def test_a_batch_that_cannot_be_cut_is_to_be_given():
    def loss(network, batch):
        return network(batch["x"]).mean()

    batches = [{"x": torch.randn(4, 3, 8, 8), "edges": torch.zeros(2, 9)}]
    with pytest.raises(ValueError, match="tensors of 2, 4 rows; give one as cost_batch"):
        ChoiceSearch(column(), batches, batches, epochs=1, loss=loss, cost="macs:1e6")
    batch = {"x": torch.randn(2, 3, 8, 8)}
    two = ChoiceSearch(
        column(), batches, batches, epochs=1, loss=loss, cost="macs:1e6", cost_batch=batch
    )
    one = search(two.network, cost="macs:1e6")
    assert torch.equal(two.cost.expected(), 2 * one.cost.expected())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "macs:"}, "cost is 'macs:'; macs:NUMBER"),
        ({"cost": "latency:12"}, "cost is 'latency:12'; macs:NUMBER"),
        ({"cost": "macs:3", "cost_weight": 0.0}, "cost_weight is 0.0; a finite number > 0"),
        ({"cost": "macs:3", "cost_weight": float("inf")}, "cost_weight is inf; a"),
        ({"cost_weight": 1.0}, "cost_weight is given, but there is no cost"),
        ({"cost_batch": torch.ones(1)}, "cost_batch is given, but there is no cost"),
        ({"precision": "fp64"}, "precision is 'fp64'; allowed: fp32, bf16, fp16"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\\n]*$"):
        search(column(), **options)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_search_in_another_precision_resumes_to_the_same_bits(tmp_path, name):
    seen = set()

    def start(epochs=3):
        torch.manual_seed(0)
        network = column()
        network[-1].register_forward_hook(lambda module, given, y: seen.add(y.dtype))
        run = ChoiceSearch(network, loader(80), loader(80), epochs=epochs, precision=name)
        for scaling in run.precision.scales.values():
            scaling.scale = 2.0**30
        return run

    whole, first = start(), start()
    rows = whole.run()
    first._run_epoch()
    first.save(tmp_path / "first.pt")
    again = start()
    again.run(tmp_path / "first.pt", resume=True)
    assert all(
        map(torch.equal, whole.network.state_dict().values(), again.network.state_dict().values())
    )
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[name]}
    if name == "fp16":
        assert 10 < rows[0]["skipped_weight_steps"] < 20 > rows[0]["skipped_logit_steps"] > 5
        assert rows[1]["skipped_weight_steps"] < 5
        assert again.precision.state_dict() == whole.precision.state_dict()
    with pytest.raises(ValueError, match=r"the parameter '0.weight' is torch.float64"):
        search(column().double(), precision=name)


def pictures(generator=None):
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    data = TensorDataset(x, torch.arange(16) % 2)
    return DataLoader(data, batch_size=4, shuffle=True, generator=generator)


def test_a_cost_that_is_asked_for_moves_no_batch():
    """Counting takes a sample of the first batch, and puts the loader's generator back."""

    def first_batches(**cost):
        torch.manual_seed(0)
        loader = pictures(torch.Generator().manual_seed(4))
        seen = []

        def loss(network, batch):
            if len(batch[0]) > 1:  # the cost is counted with one row
                seen.append(batch[0])
            return nn.functional.cross_entropy(network(batch[0]), batch[1])

        ChoiceSearch(column(), loader, pictures(), epochs=1, loss=loss, **cost).run()
        return seen

    plain, paid = first_batches(), first_batches(cost="params:1e9")
    assert all(torch.equal(a, b) for a, b in zip(plain, paid, strict=True))


def test_another_weight_of_the_cost_is_another_search(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "a folder that is made" / "search.pt"
    options = {"epochs": 1, "cost": "params:10", "cost_weight": 0.5}
    ChoiceSearch(column(), pictures(), pictures(), **options).run(path)
    other = ChoiceSearch(column(), pictures(), pictures(), **{**options, "cost_weight": 0.25})
    with pytest.raises(CheckpointError, match="is of another search: cost is"):
        other.run(path, resume=True)
