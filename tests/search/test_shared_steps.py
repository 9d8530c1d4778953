"""Several processes make the step that one makes, on the mean of their losses."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from forked import together
from step_cases import build, state
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastnas.nn import Choice
from fastnas.processes import here
from fastnas.search.callbacks import Callback, StopSearch
from fastnas.search.choice_search import ChoiceSearch
from fastnas.strategies.hypergradient import first_order, unrolled
from fastnas.strategies.precision import Precision
from fastnas.strategies.steps import ArchStep, Inputs, WeightStep

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, STEPS = 8, 2
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def given():
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(4, (BATCH,), generator=generator),
        )
        for _ in range(2 * STEPS)
    ]


def doubled(method, **options):
    bilevel = build(method, capturable=False, **options)
    bilevel.network.double()
    bilevel.arch.double()
    return bilevel


def steps_of(method, spread, options):
    """Returns what a process does: its share of two steps, and their results."""

    def work():
        bilevel, processes = doubled(method, **options), here()
        bilevel.precision, share = Precision("fp32", "cpu", processes), processes.share
        if spread == "samples":
            bilevel.strategy.share_samples(share)
        torch.manual_seed(7)
        losses = []
        for valid, train in zip(given()[::2], given()[1::2]):
            if spread == "batches":
                valid, train = (
                    (images.chunk(share.size)[share.rank], share.of(labels))
                    for images, labels in (valid, train)
                )
            arch = bilevel.arch_step(valid, train)
            loss, _ = bilevel.weight_step(train)
            losses += processes.means([arch.detach(), loss.detach()])
        moved = [p.detach() for p in (*bilevel.params, *bilevel.alphas)]
        return losses, state(bilevel), torch.get_rng_state(), moved

    return work


@dataclass(frozen=True)
class Mean:
    """The half of a step whose losses are the means of those of the parts."""

    parts: list

    def __getattr__(self, name):
        return getattr(self.parts[0], name)

    def valid_loss(self):
        return torch.stack([part.valid_loss() for part in self.parts]).mean()

    def train_loss(self, exact=False):
        return torch.stack([part.train_loss(exact) for part in self.parts]).mean()


def parts_of(batch, draw, size):
    images, labels = batch
    return [Inputs(x, y, draw) for x, y in zip(images.chunk(size), labels.chunk(size))]


def one_process(method, size, order):
    """The same two steps, written out: losses and statistics of each part, one after the other."""
    bilevel = doubled(method, order=order)
    strategy, network, arch = bilevel.strategy, bilevel.network, bilevel.arch
    torch.manual_seed(7)
    losses = []
    for valid, train in zip(given()[::2], given()[1::2]):
        before = {name: b.clone() for name, b in network.named_buffers()}
        # A process has statistics of its own parts, from the halves of a step in turn.
        copies = [copy.deepcopy(network) for _ in range(size)]
        valids, trains = parts_of(valid, None, size), parts_of(train, None, size)
        given_step = (strategy, network, arch, bilevel.params, bilevel.alphas)
        half = Mean(
            [ArchStep(*given_step, v, t, bilevel.params_optimizer) for v, t in zip(valids, trains)]
        )
        gradient, loss = (unrolled if order == 2 else first_order)(half)
        losses.append(loss)
        if order == 1:  # the unrolled half puts statistics back
            for each, v in zip(copies, valids):
                each(v.images, strategy.mixing_weights(arch))
        for alpha, g in zip(bilevel.alphas, gradient):
            alpha.grad = g
        bilevel.arch_optimizer.step()
        bilevel.params_optimizer.zero_grad(set_to_none=True)
        halves = [WeightStep(strategy, network, arch, bilevel.params, t, 5.0) for t in trains]
        found = [half.forward()[0] for half in halves]
        torch.stack(found).mean().backward()
        losses.append(torch.stack(found).mean().detach())
        clip_grad_norm_(bilevel.params, 5.0)
        for each, t in zip(copies, trains):
            each(t.images, strategy.mixing_weights(arch))
        bilevel.params_optimizer.step()
        statistics = [dict(each.named_buffers()) for each in copies]
        for name, buffer in network.named_buffers():
            parts = torch.stack([s[name] for s in statistics])
            buffer.copy_(parts.mean(0) if parts.is_floating_point() else parts[0])
            assert not buffer.equal(before[name])
    return losses, state(bilevel)


def assert_close(given, expected):
    assert len(given) == len(expected)
    for a, b in zip(given, expected):
        torch.testing.assert_close(a, b, **CLOSE)


def assert_alike(found):
    """All processes end with the same bits."""
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0][1], other[1], strict=True))
        assert found[0][2].equal(other[2])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("order", [1, 2])
def test_processes_share_a_batch(size, order, tmp_path):
    found = together(size, steps_of("darts", "batches", {"order": order}), tmp_path)
    assert_alike(found)
    losses, expected = one_process("darts", size, order)
    assert_close(found[0][0], losses)
    assert_close(found[0][1], expected)


@pytest.mark.parametrize("options", [{}, {"paths_at_once": True}, {"params_accumulation": "mean"}])
def test_processes_share_samples(options, tmp_path):
    """All run whole batches, so that one process ends with the same weights and logits."""
    options = {"samples": 4, **options}
    found = together(2, steps_of("rome", "samples", options), tmp_path)
    assert_alike(found)
    (alone,) = together(1, steps_of("rome", "samples", options), tmp_path)
    assert_close(found[0][0], alone[0])
    # Statistics differ: one process moves them four times a half, each of these twice.
    assert_close(found[0][3], alone[3])


def test_samples_that_cannot_be_shared(tmp_path):
    for method, options, text in (
        ("rome", {"samples": 3}, "ValueError: samples is 3; a multiple of 2"),
        ("darts", {}, "ValueError: method darts has no samples that processes could share"),
        ("rome", {"samples": 2, "clip_samples": "each"}, "ValueError: clip_samples is 'each', but"),
    ):
        for told in together(2, steps_of(method, "samples", options), tmp_path):
            assert told.startswith(text)


@pytest.mark.parametrize("method", ["noisy-darts", "gdas", "sdarts-rs", "sdarts-adv", "drnas"])
def test_processes_end_alike_where_they_draw(method, tmp_path):
    options = {"samples": 2} if method == "gdas" else {}
    assert_alike(together(2, steps_of(method, "batches", options), tmp_path))


def test_what_overflows_in_one_process_is_skipped_by_all(tmp_path):
    """In fp16 no process makes a step whose loss, or whose gradient, one of them cannot hold."""

    def work():
        processes = here()
        half = Precision("fp16", "cpu", processes).weights
        p = nn.Parameter(torch.ones(2))
        moved = []
        for loss_factor, scale in ((1.0, 1.0), (float("inf"), 1.0), (1.0, float("inf"))):
            p.grad = None
            half.backward((scale if processes.rank else 1.0) * p.sum())
            half.finish([p], 5.0)
            loss = torch.tensor(loss_factor if processes.rank else 1.0)
            half.move([p], loss, lambda: moved.append(len(moved)))
        return moved, half.scaling.state_dict()

    first, second = together(2, work, tmp_path)
    assert first == second
    moved, scaling = first
    assert moved == [0]
    assert (scaling["skipped"], scaling["lost"], scaling["scale"]) == (2, 1, 2.0**14)


# ---- networks of one's own


def network():
    torch.manual_seed(0)

    def candidates():
        wide = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        return {"skip": nn.Identity(), "linear": nn.Linear(4, 4), "wide": wide}

    choices = [Choice(candidates(), mixing="softmax"), Choice(candidates(), mixing="gdas")]
    return nn.Sequential(nn.Linear(3, 4), *choices, nn.Linear(4, 2)).double()


def pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x.sum(1) > 0).long())


class InTurn(torch.utils.data.Sampler):
    """Gives each process its part of every batch, so that together they have whole ones."""

    def __init__(self, count, batch, share):
        self.count, self.batch, self.share = count, batch, share

    def __iter__(self):
        for start in range(0, self.count, self.batch):
            yield from self.share.of(torch.arange(start, start + self.batch)).tolist()

    def __len__(self):
        return self.count // self.share.size


def searched(**options):
    def work():
        share = here().share
        loaders = [
            DataLoader(pairs(seed), batch_size=8 // share.size, sampler=InTurn(16, 8, share))
            for seed in (1, 2)
        ]
        torch.manual_seed(3)
        run = ChoiceSearch(network(), *loaders, epochs=3, samples=2, tau=(5, 1), **options)
        history = run.run()
        kept = [{k: v for k, v in row.items() if k != "seconds"} for row in history]
        return kept, list(run.network.state_dict().values()), torch.get_rng_state()

    return work


@pytest.mark.parametrize("size", [2, 4])
def test_choices_of_a_joined_batch(size, tmp_path):
    """Without batch norms it is one process on the whole batch, to rounding."""
    found = together(size, searched(), tmp_path)
    assert_alike(found)
    (alone,) = together(1, searched(), tmp_path)
    assert_close(found[0][1], alone[1])
    for given, expected in zip(found[0][0], alone[0], strict=True):
        assert given["derived"] == expected["derived"]
        assert given["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-12)


def test_a_callback_in_one_process_ends_all(tmp_path):
    class Ends(Callback):
        def on_step(self, search, figures):
            if here().rank == 1 and search.epoch == 1:
                raise StopSearch

    for kept, *_ in together(2, searched(callbacks=[Ends()]), tmp_path):
        assert len(kept) == 1


def draws_more(*_):
    torch.rand(1 + here().rank)


def wrong(kind):
    def work():
        sampler = DistributedSampler(pairs(1)) if kind != "data" else None
        loaders = [DataLoader(pairs(s), batch_size=4, sampler=sampler) for s in (1, 2)]
        model = network()
        torch.manual_seed(here().rank if kind == "seed" else 3)
        if kind == "network":
            torch.nn.init.constant_(model[0].bias, here().rank)
        if kind == "draws":
            model[0].register_forward_hook(draws_more)
        ChoiceSearch(model, *loaders, epochs=2, order=1).run()

    return work


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("data", "all 2 processes have the same batch of train; each needs its share"),
        ("seed", "process 1 has another random state than process 0"),
        ("network", "process 1 has another network than process 0"),
        ("draws", "the processes have drawn other random numbers"),
    ],
)
def test_processes_that_are_not_in_step(kind, text, tmp_path):
    for told in together(2, wrong(kind), tmp_path):
        assert told.startswith(f"ProcessesError: {text}"), told


def test_a_sampler_is_told_of_the_epoch(tmp_path):
    def work():
        sampler = DistributedSampler(pairs(1))
        loader = DataLoader(pairs(1), batch_size=4, sampler=sampler)
        run = ChoiceSearch(network(), loader, loader, epochs=2)
        run.run()
        return sampler.epoch

    assert together(2, work, tmp_path) == [1, 1]


def test_a_network_that_reduces_by_itself_is_refused(tmp_path):
    def work():
        loader = DataLoader(pairs(1), batch_size=4, sampler=DistributedSampler(pairs(1)))
        ChoiceSearch(nn.parallel.DistributedDataParallel(network()), loader, loader, epochs=1)

    for told in together(2, work, tmp_path):
        assert told.startswith("TypeError: network is a DistributedDataParallel; its module is")


class Drawn(torch.utils.data.Sampler):
    """Draws from a generator of its own, whose state a checkpoint holds."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        yield from torch.randperm(16, generator=self.generator)[:8].tolist()

    def __len__(self):
        return 8


class Stateful:
    """A loader with a state, as torchdata's: each process has its own."""

    def __init__(self, seed):
        self.sampler = Drawn(seed)
        self.loader = DataLoader(pairs(1), batch_size=4, sampler=self.sampler)

    def __iter__(self):
        return iter(self.loader)

    def state_dict(self):
        return {"generator": self.sampler.generator.get_state()}

    def load_state_dict(self, state):
        self.sampler.generator.set_state(state["generator"])


def test_each_process_goes_on_with_its_own_loaders(tmp_path):
    def searched(name, seeds, resume=False, callbacks=()):
        def work():
            torch.manual_seed(3)
            loaders = [Stateful(seed + here().rank) for seed in seeds]
            run = ChoiceSearch(network(), *loaders, epochs=3, samples=2, callbacks=callbacks)
            history = run.run(tmp_path / name, resume=resume)
            return [row["train_loss"] for row in history], list(run.network.state_dict().values())

        return together(2, work, tmp_path)

    whole = searched("whole.pt", (10, 20))
    ends = Callback()
    ends.on_epoch = stop_after_the_first
    assert len(searched("run.pt", (10, 20), callbacks=[ends])[0][0]) == 1
    for again, expected in zip(searched("run.pt", (50, 60), resume=True), whole, strict=True):
        assert again[0] == expected[0]
        assert all(a.equal(b) for a, b in zip(again[1], expected[1], strict=True))


def stop_after_the_first(search, figures):
    raise StopSearch


def test_batches_without_tensors_are_not_compared(tmp_path):
    class Row:
        def __init__(self, x):
            self.x = x

    def work():
        rows = [[Row(pairs(1).tensors[0][4 * here().rank :][:4])]]
        torch.manual_seed(3)
        run = ChoiceSearch(
            network(), rows, rows, epochs=1,
            loss=lambda model, batch: model(batch[0].x).square().mean(),
        )  # fmt: skip
        return len(run.run())

    assert together(2, work, tmp_path) == [1, 1]
