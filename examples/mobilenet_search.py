"""Searches a small MobileNet-like column by NoisyDARTS on the bundled digits, then trains it."""

import torch
from torch.nn import functional as F

from fastnas.data.load import load_images
from fastnas.nn import MobileNetEvalNetwork, MobileNetSearchNetwork, split_parameters
from fastnas.reference import SkipNoise
from fastnas.spaces import MobileSpace, format_column

torch.manual_seed(0)
digits = load_images("digits")
images, labels = digits.train[:512].float() / 255, digits.train_labels[:512]

# MobileSpace() is the space of FairNAS and NoisyDARTS: 19 layers, for images of 224x224.
space = MobileSpace(
    stages=((16, 1, 2), (24, 2, 3), (32, 1, 1)), stem=16, stem_stride=1, first=8, head=64
)
network = MobileNetSearchNetwork(
    10, space=space, memory="recompute", noise={"skip": SkipNoise()}, in_channels=1
)
weights, logits = split_parameters(network)
weights_optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
logits_optimizer = torch.optim.Adam(logits, lr=0.05, betas=(0.5, 0.999))


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    return loss.item()


EPOCHS = 3
for epoch in range(EPOCHS):
    network.set_noise_amplitude(1 - epoch / EPOCHS)
    # Logits learn from one half, weights from the other.
    halves = torch.randperm(256).split(128), (256 + torch.randperm(256)).split(128)
    for valid, train in zip(*halves):
        step(network, logits_optimizer, valid)
        loss = step(network, weights_optimizer, train)
    print(f"epoch {epoch}: loss {loss:.3f}")

architecture = network.derive()
print("derived:", format_column(architecture))
found = MobileNetEvalNetwork(
    architecture, 10, space=space, squeeze=True, activation="swish", in_channels=1
)
optimizer = torch.optim.SGD(found.parameters(), lr=0.1, momentum=0.9)
losses = [step(found, optimizer, batch) for batch in torch.arange(512).split(64)]
print(f"evaluation network: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
