"""A small search step, its inputs, and what it leaves."""

import torch
from torch.utils._pytree import tree_leaves

from fastnas import nn
from fastnas.search.bilevel import Bilevel
from fastnas.search.optimizers import adam, set_learning_rate, sgd
from fastnas.spaces import get_space
from fastnas.strategies import get_strategy

METHODS = ("darts", "noisy-darts", "fair-darts")
SINGLE_PATH = ("rome", "rome-v1", "gdas", "single-path-darts")


def build(method="noisy-darts", space="S2", capturable=True, device="cpu", **options):
    torch.manual_seed(3)
    strategy = get_strategy(method, **options)
    space = strategy.space(get_space(space))
    kind, layers = nn.SEARCH_NETWORKS[space.layout], 3 if space.layout == "darts" else 1
    network = kind(strategy.network_space(space), 2, 4, layers, noise=strategy.skip_noise())
    network.to(device).train()
    arch = nn.ArchParameters(space, 0.5, strategy.topology).to(device)
    return Bilevel(
        network,
        arch,
        strategy,
        sgd(network.parameters(), lr=0.1, capturable=capturable, momentum=0.9, weight_decay=3e-4),
        adam(arch.parameters(), lr=0.01, capturable=capturable, betas=(0.5, 0.999)),
    )


def batches(count, device="cpu", size=3):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator).to(device),
            torch.randint(4, (size,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def search(steps, step, device="cpu"):
    """Some steps with a learning rate and a noise amplitude that change; every loss and result."""
    torch.manual_seed(7)
    bilevel = getattr(step, "bilevel", step)
    seen = []
    given = batches(2 * steps, device)
    for i in range(steps):
        set_learning_rate(bilevel.params_optimizer, 0.1 / (1 + i // 2))
        bilevel.network.set_noise_amplitude(1 - 0.3 * (i // 2))
        valid, train = given[2 * i], given[2 * i + 1]
        seen.append(step.arch_step(valid, train).item())
        loss, logits = step.weight_step(train)
        seen += [loss.item(), *logits.flatten().tolist()]
    return seen, state(bilevel)


def state(bilevel):
    parts = [bilevel.network, bilevel.arch, bilevel.params_optimizer, bilevel.arch_optimizer]
    tensors = [t for t in tree_leaves([p.state_dict() for p in parts]) if torch.is_tensor(t)]
    return [t.clone() for t in tensors]


def assert_same(ours, expected):
    assert ours[0] == expected[0]
    assert len(ours[1]) == len(expected[1])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], expected[1]))
