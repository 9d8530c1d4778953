"""The capturable optimizers compute what torch's others do, and share their checkpoints."""

import copy

import pytest
import torch

from fastnas.search.optimizers import (
    adam,
    is_capturable,
    set_learning_rate,
    sgd,
    state_tensors,
    step_where,
)

KINDS = {
    "sgd": (sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 3e-4}),
    "adam": (adam, {"lr": 0.01, "betas": (0.5, 0.999), "weight_decay": 1e-3}),
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((3, 4), (5,))]


def move(optimizer, steps, start=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + i)
        set_learning_rate(optimizer, 0.1 / (1 + i))
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params


@pytest.mark.parametrize("name", KINDS)
def test_the_same_steps(name):
    build, settings = KINDS[name]
    plain = build(parameters(), capturable=False, **settings)
    capturable = build(parameters(), capturable=True, **settings)
    assert is_capturable(capturable) and not is_capturable(plain)
    for a, b in zip(move(plain, 5), move(capturable, 5)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_the_state_is_there_from_the_start_and_stays(name):
    build, settings = KINDS[name]
    optimizer = build(parameters(), capturable=True, **settings)
    before = {t.data_ptr() for t in state_tensors(optimizer)}
    assert len(before) == (2 if name == "sgd" else 6)
    rate = optimizer.param_groups[0]["lr"]
    move(optimizer, 2)
    assert {t.data_ptr() for t in state_tensors(optimizer)} == before
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("way", [(False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_checkpoints_are_shared(tmp_path, name, way, after):
    """Written by the one kind, also before its first step, and gone on with by the other."""
    build, settings = KINDS[name]
    source, target = (build(parameters(), capturable=c, **settings) for c in way)
    params = move(source, after)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert is_capturable(target) == way[1]
    assert bool(target.param_groups[0]["fused"]) == way[1]
    with torch.no_grad():
        for mine, theirs in zip(target.param_groups[0]["params"], params):
            mine.copy_(theirs)
    expected = move(source, 3, start=after)
    for a, b in zip(move(target, 3, start=after), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_of_torchs_own(name):
    """Written before there were two kinds."""
    build, settings = KINDS[name]
    plain = (torch.optim.SGD if name == "sgd" else torch.optim.Adam)(parameters(), **settings)
    params = move(plain, 2)
    target = build(parameters(), capturable=True, **settings)
    target.load_state_dict(copy.deepcopy(plain.state_dict()))
    with torch.no_grad():
        for mine, theirs in zip(target.param_groups[0]["params"], params):
            mine.copy_(theirs)
    for a, b in zip(move(target, 2, start=2), move(plain, 2, start=2)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_network_is_refused():
    build, settings = KINDS["sgd"]
    optimizer = build(parameters(), capturable=True, **settings)
    other = build(parameters()[:1], capturable=True, **settings)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other.state_dict())


def test_what_stands_still_stands_as_without_a_gradient():
    """A parameter whose flag is off keeps its bits and its momentum; the others move as ever."""
    results = []
    for masked in (False, True):
        torch.manual_seed(3)
        params = parameters()
        optimizer = sgd(params, lr=0.1, capturable=True, momentum=0.9, weight_decay=3e-4)
        for step in range(4):
            still = {step % len(params)}
            for i, p in enumerate(params):
                off = i in still
                p.grad = torch.zeros_like(p) if off else torch.randn_like(p)
                if off and not masked:
                    p.grad = None
            if masked:
                flags = [([p], torch.tensor(i not in still)) for i, p in enumerate(params[:-1])]
                if len(params) - 1 in still:
                    params[-1].grad = None
                step_where(optimizer, flags)
                assert all(p.grad is not None for p in params[:-1])
            else:
                optimizer.step()
        results.append([*(p.detach() for p in params), *state_tensors(optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
