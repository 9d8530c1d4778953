"""Searches a graph network: which layers stand on the edges of its cell, with noise on its skip.

The nodes are scikit-learn's digits, joined to their nearest neighbours. Nothing in fastnas knows of
graphs. The layers are those of SGAS (Li et al., CVPR 2020), in plain torch.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import fastnas
from fastnas import SkipNoise
from fastnas.nn import Choice

GATHERS = {
    "linear": lambda x, near: x,
    "sage": lambda x, near: near.mean(1),
    "gin": lambda x, near: near.sum(1),
    "max_relative": lambda x, near: (near - x[:, None]).amax(1),
}
data = load_digits()
FEATURES, LABELS = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
NEAR = torch.cdist(FEATURES, FEATURES).topk(9, largest=False).indices[:, 1:]  # without itself


class Layer(nn.Module):
    """y_i = relu(norm(W [x_i, m_i])), m_i what `gather` makes of the neighbours of node i."""

    def __init__(self, C, gather):
        super().__init__()
        self.gather, self.linear, self.norm = gather, nn.Linear(2 * C, C), nn.LayerNorm(C)

    def forward(self, x):
        return F.relu(self.norm(self.linear(torch.cat([x, self.gather(x, x[NEAR])], dim=1))))


class GraphNetwork(nn.Module):
    """A cell of two nodes, each the sum of a choice from every state before it; classified."""

    def __init__(self, C=16):
        super().__init__()
        self.stem, self.out = nn.Linear(64, C), nn.Linear(2 * C, 10)
        self.edges = nn.ModuleList(self.edge(C) for _ in range(3))

    def edge(self, C):
        layers = {name: Layer(C, gather) for name, gather in GATHERS.items()}
        layers["skip"] = nn.Identity()
        return Choice(layers, mixing="softmax", memory="recompute", noise={"skip": SkipNoise()})

    def forward(self, index):
        x = self.stem(FEATURES)
        y = self.edges[0](x)
        z = self.edges[1](x) + self.edges[2](y)
        return self.out(torch.cat([y, z], dim=1))[index]


torch.manual_seed(0)
train, valid, test = torch.randperm(len(LABELS)).split([300, 300, len(LABELS) - 600])
loaders = [[(part, LABELS[part])] * 10 for part in (train, valid)]  # the graph is one batch
search = fastnas.ChoiceSearch(GraphNetwork(), *loaders, epochs=8)
for row in search.run():
    losses = f"train {row['train_loss']:.3f}, valid {row['valid_loss']:.3f}"
    print(f"epoch {row['epoch']}: {losses}; {', '.join(row['derived'].values())}")
found = search.derived_network().eval()
right = (found(test).argmax(1) == LABELS[test]).float().mean()
print(f"derived: accuracy {float(right):.3f} on {len(test)} nodes whose labels it has not seen")
