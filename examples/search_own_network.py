"""Searches a network of your own on a data set of your own, and trains what was found."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastnas
from fastnas import SkipNoise
from fastnas.nn import Choice, split_parameters


def conv(C, kernel):
    depthwise = nn.Conv2d(C, C, kernel, padding=kernel // 2, groups=C, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU())


def block(C):
    """One place of the network: what stands there is searched, with noise on the skip."""
    candidates = {"skip": nn.Identity(), "conv3": conv(C, 3), "conv5": conv(C, 5)}
    return Choice(candidates, mixing="softmax", memory="recompute", noise={"skip": SkipNoise()})


def stripes(count):
    """Images of noise with horizontal, vertical or diagonal stripes, and which of these it is."""
    labels = torch.arange(count) % 3
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = torch.stack([rows, columns, rows + columns])[labels] + 6 * torch.rand(count, 1, 1)
    return TensorDataset((waves.sin() + 0.7 * torch.randn(count, 16, 16))[:, None], labels)


torch.manual_seed(0)
stem = [nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
model = nn.Sequential(*stem, *(block(8) for _ in range(3)), *head)
train, valid = (DataLoader(stripes(240), batch_size=48, shuffle=True) for _ in range(2))
weights, logits = split_parameters(model)
search = fastnas.ChoiceSearch(
    model, train, valid, epochs=8, noise_decay="cosine",
    weight_optimizer=torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    logit_optimizer=torch.optim.Adam(logits, lr=0.02),
)  # fmt: skip
for row in search.run():
    losses = f"train {row['train_loss']:.3f}, valid {row['valid_loss']:.3f}"
    print(f"epoch {row['epoch']}: {losses}; {', '.join(row['derived'].values())}")

found = search.derived_network()  # the choices are gone, the weights are kept
optimizer = torch.optim.SGD(found.parameters(), lr=0.05, momentum=0.9)
for images, labels in [batch for _ in range(4) for batch in train]:
    optimizer.zero_grad()
    nn.functional.cross_entropy(found.train()(images), labels).backward()
    optimizer.step()
images, labels = stripes(300).tensors
right = (found.eval()(images).argmax(1) == labels).float().mean()
print(f"derived: accuracy {float(right):.3f} on images that it has not seen")
