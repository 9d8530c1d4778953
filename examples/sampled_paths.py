"""Takes steps on sampled paths (ROME) in a loop of one's own: what is not sampled costs nothing."""

import torch
from torch.nn import functional as F

from fastnas.nn import ArchParameters, Paths, SearchNetwork
from fastnas.ops import sample_paths
from fastnas.spaces import get_space

torch.manual_seed(0)
space = get_space("S0").without("none")
network = SearchNetwork(space, C=8, num_classes=10, layers=3)
arch = ArchParameters(space, topology="top2")
params_optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
arch_optimizer = torch.optim.Adam(arch.parameters(), lr=3e-4, betas=(0.5, 0.999))


def loss_on(images, labels, tau, paths=2):
    """Samples paths, an operation an edge and two edges a node, and runs them in one pass."""
    alpha, beta = (torch.stack(list(some.values())) for some in (arch.alphas(), arch.betas()))
    op, weight = sample_paths(alpha, beta, nodes=arch.nodes, tau=tau, topology="top2", paths=paths)
    sampled = {cell: Paths(op[:, i], weight[:, i]) for i, cell in enumerate(arch.alphas())}
    logits = network(images, sampled)  # [paths, N, classes]
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(paths)), op


images, labels = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
for epoch in range(3):
    tau = 10 - 4.95 * epoch  # towards 0.1, at which a sample is almost the likeliest path
    loss, _ = loss_on(images, labels, tau)
    gradients = torch.autograd.grad(loss, list(arch.parameters()))
    for logits, gradient in zip(arch.parameters(), gradients):
        logits.grad = gradient
    arch_optimizer.step()

    params_optimizer.zero_grad()
    loss, op = loss_on(images, labels, tau)
    loss.backward()
    params_optimizer.step()

    params = list(network.parameters())
    moved = sum(p.numel() for p in params if p.grad is not None)
    edges = int((op >= 0).sum())
    print(
        f"step {epoch}: loss {loss.item():.3f}, {edges} of {op.numel()} edges ran,"
        f" {moved:,} of {sum(p.numel() for p in params):,} parameters moved"
    )
