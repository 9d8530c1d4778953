"""A search of a network of one's own is the two halves of DARTS' step, written out, in turns."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastnas
from fastnas.nn import Choice, split_parameters
from fastnas.reference import SkipNoise
from fastnas.search.callbacks import Callback, StopSearch, TensorBoard
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.choice_search import ChoiceSearch
from fastnas.search.diverged import DivergedError


def candidates(C=4):
    wide = nn.Sequential(nn.Linear(C, 8), nn.Tanh(), nn.Linear(8, C))
    return {"skip": nn.Identity(), "linear": nn.Linear(C, C), "wide": wide}


def network(mixing="softmax", memory="lean", seed=0, **options):
    torch.manual_seed(seed)
    choices = [Choice(candidates(), mixing=mixing, memory=memory, **options) for _ in range(2)]
    return nn.Sequential(nn.Linear(3, 4), *choices, nn.Dropout(0.2), nn.Linear(4, 2)).double()


def data(seed=1, size=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x.sum(1) > 0).long())


def loader(seed=1, size=12, **options):
    return DataLoader(data(seed, size), batch_size=4, **{"shuffle": True, **options})


def search(model, epochs=3, **options):
    return ChoiceSearch(model, loader(1), loader(2), epochs=epochs, **options)


def tensors(model):
    return [t.detach().clone() for t in model.state_dict().values()]


def assert_same(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **{"rtol": 0, "atol": 0, **tolerance})


def batches(seed):
    return list(loader(seed, shuffle=False))


class Mixed(nn.Module):
    """The same network without a Choice: logits, candidates and the sum of DARTS, eq. 2."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList(model)

    def forward(self, x):
        for layer in self.layers:
            if isinstance(layer, Choice):
                w = layer.logits.softmax(0)
                x = sum(w[k] * op(x) for k, op in enumerate(layer.candidates.values()))
            else:
                x = layer(x)
        return x


def optimizers(model):
    weights, logits = split_parameters(model)
    momentum = torch.optim.SGD(weights, lr=0.025, momentum=0.9, weight_decay=3e-4)
    return momentum, torch.optim.Adam(logits, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)


@pytest.mark.parametrize("memory", ["eager", "lean", "recompute", "minimal"])
def test_steps_are_those_of_darts_written_out(memory):
    own = network(memory=memory).eval()  # without dropout
    by_hand = copy.deepcopy(own)
    mixed, (momentum, adam) = Mixed(by_hand), optimizers(by_hand)
    run = search(own, grad_clip=0.05)
    for train, valid in zip(batches(1), batches(2)):
        figures = run.step(train, valid)
        losses = {}
        for name, (x, y), optimizer in (
            ("valid_loss", valid, adam),
            ("train_loss", train, momentum),
        ):
            by_hand.zero_grad()
            losses[name] = F.cross_entropy(mixed(x), y)
            losses[name].backward()
            if optimizer is momentum:
                nn.utils.clip_grad_norm_(split_parameters(by_hand)[0], 0.05)
            optimizer.step()
        for name, loss in losses.items():
            torch.testing.assert_close(figures[name], loss.detach(), rtol=0, atol=1e-12)
    assert_same(tensors(own), tensors(by_hand), atol=1e-10)


def test_neither_half_forms_gradients_of_the_other():
    model = network()
    run = search(model)
    train, valid = batches(1)[0], batches(2)[0]
    run.logit_step(valid, train)
    assert all(p.grad is None for p in run.weights)
    run.weight_step(train)
    assert all(p.grad is None for p in run.logits) and all(p.requires_grad for p in run.logits)


@pytest.mark.parametrize("noisy", [False, True])
def test_the_unrolled_step_is_equations_7_and_8(noisy):
    """Against the exact gradient through the step of the weights, which torch differentiates.

    With noise and dropout the losses of a finite difference have to draw the same.
    """
    model = network(noise={"skip": SkipNoise(factor=0.3)} if noisy else None).train(noisy)
    exact = copy.deepcopy(model)
    train, valid = batches(1)[0], batches(2)[0]
    run = search(model, order=2, logit_optimizer=torch.optim.SGD(split_parameters(model)[1], lr=1))
    before = [p.detach().clone() for p in run.logits]
    weights = [p.detach().clone() for p in run.weights]
    torch.manual_seed(3)
    run.logit_step(valid, train)
    assert_same([p.detach() for p in run.weights], weights)
    given = [b - p.detach() for b, p in zip(before, run.logits)]

    params, logits = split_parameters(exact)
    names = {id(p): name for name, p in exact.named_parameters()}
    torch.manual_seed(3)
    loss = F.cross_entropy(exact(train[0]), train[1])
    ahead = torch.autograd.grad(loss, params, create_graph=True)
    moved = {names[id(p)]: p - 0.025 * (g + 3e-4 * p) for p, g in zip(params, ahead)}
    moved |= {names[id(p)]: p for p in logits}
    y = torch.func.functional_call(exact, moved, valid[0])
    want = torch.autograd.grad(F.cross_entropy(y, valid[1]), logits)
    torch.manual_seed(3)
    exact(train[0])  # draws what the first loss has drawn
    first = torch.autograd.grad(F.cross_entropy(exact(valid[0]), valid[1]), logits)
    for g, w, f in zip(given, want, first):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-5)
        assert (g - w).abs().max() < 0.05 * (w - f).abs().max()  # and no first-order gradient


def test_samples_are_averaged_for_the_logits_and_added_for_the_weights():
    one, many = network("gdas").eval(), network("gdas").eval()
    for choice in one[1], one[2], many[1], many[2]:
        choice.train()  # which samples; dropout stays off
    train, valid = batches(1)[0], batches(2)[0]
    runs = [
        search(
            m,
            samples=k,
            weight_optimizer=torch.optim.SGD(split_parameters(m)[0], lr=1),
            logit_optimizer=torch.optim.SGD(split_parameters(m)[1], lr=1),
            grad_clip=1e9,
        )
        for m, k in ((one, 1), (many, 3))
    ]
    sums = {}
    for half in ("logits", "weights"):
        starts = [[p.detach().clone() for p in getattr(run, half)] for run in runs]
        torch.manual_seed(5)
        total = [torch.zeros_like(p) for p in starts[0]]
        for _ in range(3):
            if half == "logits":
                runs[0].logit_step(valid, train)
            else:
                runs[0].weight_step(train)
            for t, p, start in zip(total, getattr(runs[0], half), starts[0]):
                t += p.detach() - start
                p.data.copy_(start)
        torch.manual_seed(5)
        if half == "logits":
            runs[1].logit_step(valid, train)
        else:
            runs[1].weight_step(train)
        moved = [p.detach() - s for p, s in zip(getattr(runs[1], half), starts[1])]
        scale = 1 / 3 if half == "logits" else 1
        assert_same(moved, [scale * t for t in total], atol=1e-12)
        for p, start in zip(getattr(runs[1], half), starts[1]):
            p.data.copy_(start)
        sums[half] = sum(float(t.abs().sum()) for t in total)
    assert min(sums.values()) > 0


def test_what_is_not_sampled_stands_still():
    model = network("gdas")
    with torch.no_grad():
        for choice in model[1], model[2]:
            choice.logits.copy_(torch.tensor([0.0, 50.0, 0.0]))
    run = search(model)
    still = [p.detach().clone() for p in model[1].candidates["wide"].parameters()]
    moving = model[1].candidates["linear"].weight.detach().clone()
    for train, valid in zip(batches(1), batches(2)):
        run.step(train, valid)
    assert_same([p.detach() for p in model[1].candidates["wide"].parameters()], still)
    assert not torch.equal(model[1].candidates["linear"].weight, moving)


def test_the_zero_one_loss_drives_sigmoids_apart():
    model = network("sigmoid")
    with torch.no_grad():
        model[1].logits.copy_(torch.tensor([0.5, -0.5, 0.1]))
    run = search(model, zero_one_weight=10.0)
    sigma = torch.cat([model[1].logits, model[2].logits]).sigmoid()
    torch.testing.assert_close(run.regulariser(), -10 * (sigma - 0.5).square().mean())
    valid = batches(2)[0]
    run.loss = lambda network, batch: network(batch[0]).sum() * 0
    run.logit_step(valid, valid)
    assert model[1].logits[0] > 0.5 and model[1].logits[1] < -0.5


def test_schedules_of_temperature_and_noise():
    seen = []

    class Look(Callback):
        def on_epoch(self, search, figures):
            choice = search.choices["1"]
            seen.append((choice.tau, choice.noise_amplitude))

    search(network("gdas"), tau=(10, 0.1), callbacks=[Look()]).run()
    assert [tau for tau, _ in seen] == pytest.approx([10, 5.05, 0.1])
    seen.clear()
    noisy = network(noise={"skip": SkipNoise()})
    search(noisy, noise_decay="cosine", callbacks=[Look()]).run()
    assert [amplitude for _, amplitude in seen] == pytest.approx([1, 0.75, 0.25])


# ---- runs


class Killed(Exception):
    pass


class KilledIn(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_step(self, search, figures):
        if search.epoch == self.epoch:
            raise Killed


@pytest.mark.parametrize("mixing", ["softmax", "gdas"])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path, mixing):
    """With shuffled loaders, dropout and samples, all drawn from torch's generators."""
    runs = [search(network(mixing), epochs=4) for _ in range(2)]
    torch.manual_seed(7)
    whole = runs[0].run(tmp_path / "whole.pt")
    runs[1].callbacks = [KilledIn(2)]
    torch.manual_seed(7)
    with pytest.raises(Killed):
        runs[1].run(tmp_path / "killed.pt")
    torch.manual_seed(99)
    again = search(network(mixing, seed=5), epochs=4)
    parts = again.run(tmp_path / "killed.pt", resume=True)
    assert_same(tensors(again.network), tensors(runs[0].network))
    drop = ("seconds",)
    assert [{k: v for k, v in row.items() if k not in drop} for row in parts] == [
        {k: v for k, v in row.items() if k not in drop} for row in whole
    ]
    assert [row["epoch"] for row in whole] == [1, 2, 3, 4]


def test_it_learns_and_finds():
    torch.manual_seed(0)
    model = network()
    rows = search(
        model, epochs=30, weight_optimizer=torch.optim.SGD(split_parameters(model)[0], lr=0.2)
    ).run()
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert set(rows[-1]["derived"]) == {"1", "2"}
    assert rows[-1]["derived"]["1"] in candidates()


def test_a_callback_stops_it():
    class Stop(Callback):
        def on_epoch(self, search, figures):
            if figures["epoch"] == 2:
                raise StopSearch

    rows = search(network(), epochs=9, callbacks=[Stop()]).run()
    assert len(rows) == 2


def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    search(network(), epochs=2, callbacks=[TensorBoard(tmp_path / "logs")]).run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [e.step for e in read.Scalars("train_loss")] == [1, 2]


def test_any_batch_and_any_loss():
    """Batches that are dicts, as of Hugging Face, and targets that are no classes."""

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.choice = Choice(candidates(3), mixing="softmax")
            self.out = nn.Linear(3, 1)

        def forward(self, inputs, mask):
            return self.out(self.choice(inputs) * mask).squeeze(-1)

    def loss(model, batch):
        return F.mse_loss(model(batch["inputs"], batch["mask"]), batch["target"])

    x = torch.randn(8, 3)
    rows = [{"inputs": x[i], "mask": torch.ones(3), "target": x[i].sum()} for i in range(8)]
    model = Regression()
    run = ChoiceSearch(
        model, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4), epochs=40, loss=loss,
        weight_optimizer=torch.optim.SGD(split_parameters(model)[0], lr=0.1),
    )  # fmt: skip
    history = run.run()
    assert history[-1]["train_loss"] < 0.2 * history[0]["train_loss"]
    assert set(run.derive()) == {"choice"}


def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_checkpoint(tmp_path):
    model, path = network(), tmp_path / "search.pt"

    class Spoil(Callback):
        def on_step(self, search, figures):
            if search.epoch == 1:
                with torch.no_grad():
                    model[0].weight.fill_(math.nan)

    with pytest.raises(DivergedError, match=r"diverged: .* in epoch 2"):
        search(model, callbacks=[Spoil()]).run(path)
    again = search(network())
    again.load(path)
    assert again.epoch == 1 and all(t.isfinite().all() for t in tensors(again.network))


# ---- what is derived


def test_the_derived_network_has_what_was_chosen():
    model = network().eval()
    with torch.no_grad():
        model[1].logits.copy_(torch.tensor([0.0, 1.0, 0.0]))
        model[2].logits.copy_(torch.tensor([0.0, 0.0, 1.0]))
    run = search(model)
    assert run.derive() == {"1": "linear", "2": "wide"}
    found = run.derived_network()
    assert not any(isinstance(m, Choice) for m in found.modules())
    x = torch.randn(5, 3, dtype=torch.float64)
    h = model[1].candidates["linear"](model[0](x))
    torch.testing.assert_close(found(x), model[4](model[2].candidates["wide"](h)))
    assert found[1].weight is not model[1].candidates["linear"].weight  # a copy
    new = run.derived_network(keep_weights=False)
    assert new[1].weight.shape == found[1].weight.shape
    assert not torch.equal(new[1].weight, found[1].weight)


# ---- what is refused

REFUSED = {
    "no choice": (lambda: nn.Linear(3, 2), {}, "network has no choice with logits"),
    "given weights": (lambda: Choice(candidates()), {}, "network has no choice with logits"),
    "an iterator": (network, {"train": iter([])}, "train is a list_iterator; batches that can be"),
    "a loss": (network, {"loss": 3}, "loss is 3; a function of"),
    "order": (network, {"order": 3}, "order is 3"),
    "order of samples": (lambda: network("gdas"), {"order": 2}, "'1' samples; 1 is needed"),
    "samples": (network, {"samples": 2}, "samples is 2, but no choice samples"),
    "tau": (network, {"tau": (10, 0.1)}, "but no choice samples"),
    "tau of 0": (lambda: network("gdas"), {"tau": (10, 0)}, "finite numbers > 0"),
    "noise": (network, {"noise_decay": "cosine"}, "no choice has noise"),
    "zero-one": (network, {"zero_one_weight": 1.0}, "no choice mixes by sigmoids"),
    "clip": (network, {"grad_clip": 0}, "grad_clip is 0"),
    "callback": (network, {"callbacks": [print]}, "a callback"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(name):
    make, options, message = REFUSED[name]
    given = {"train": loader(1), "valid": loader(2), "epochs": 2, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        ChoiceSearch(make(), **given)


def test_optimizers_that_are_refused():
    model = network()
    weights, logits = split_parameters(model)
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"weight_optimizer lacks 0 .* and holds 2 of its logits"):
        search(model, weight_optimizer=everything)
    with pytest.raises(ValueError, match="logit_optimizer lacks 1 of the network's logits"):
        search(model, logit_optimizer=torch.optim.SGD(logits[:1], lr=0.1))
    with pytest.raises(ValueError, match="order is 2, but weight_optimizer is no plain SGD"):
        search(model, order=2, weight_optimizer=torch.optim.Adam(weights))
    other = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(weights, lr=0.1))
    mine = torch.optim.SGD(weights, lr=0.1)
    with pytest.raises(ValueError, match="moves another optimizer"):
        search(model, weight_optimizer=mine, scheduler=other)


def test_checkpoints_that_are_refused(tmp_path):
    path = tmp_path / "search.pt"
    search(network(), epochs=1).run(path)
    with pytest.raises(CheckpointError, match="another search: epochs is 1 there and 2 here"):
        search(network(), epochs=2).run(path, resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        search(network(), epochs=1).run(tmp_path / "none.pt", resume=True)
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        search(network(), epochs=1).run(resume=True)


def test_loaders_without_batches():
    empty = ChoiceSearch(network(), loader(1), [], epochs=1)
    with pytest.raises(ValueError, match="valid has no batches"):
        empty.run()
    with pytest.raises(ValueError, match="train has no batches"):
        ChoiceSearch(network(), [], loader(2), epochs=1).run()


def test_it_is_a_name_of_the_package():
    assert fastnas.ChoiceSearch is ChoiceSearch


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": nn.CrossEntropyLoss()}, "loss is CrossEntropyLoss(); a function of (network, b"),
        ({"callbacks": TensorBoard("logs")}, "a list of callbacks is needed"),
        ({"callbacks": ["logs"]}, "a callback is 'logs'"),
    ],
)
def test_losses_and_callbacks_of_another_kind(options, text):
    with pytest.raises(TypeError, match=re.escape(text)):
        search(network(), **options)


def test_a_batch_that_the_usual_loss_does_not_know():
    rows = [{"x": torch.ones(2, 3)}]
    with pytest.raises(TypeError, match="a batch is a dict; by default pairs"):
        ChoiceSearch(network(), rows, rows, epochs=1).run()
