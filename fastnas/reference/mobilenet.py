"""Computes the supernet of the MobileNet-like space in eager torch, and a step of its search.

Names in the state dict are those of `fastnas.nn.MobileNetSearchNetwork`. FairNAS and NoisyDARTS
have published no code of their search; steps are written as those of DARTS and GDAS are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas.checks import check_choice, check_int, check_type
from fastnas.layers.inverted_residual import InvertedResidual, mobile_head, mobile_stem
from fastnas.reference.amp import Amp
from fastnas.reference.arguments import check_clip, check_images
from fastnas.reference.mixed_sum import weighted_sum
from fastnas.reference.single_path import gdas_sample
from fastnas.reference.skip_noise import SkipNoise, skip_noise
from fastnas.spaces import MobileSpace
from fastnas.spaces.mobile import Block, MobileLayer, block_name

MIXINGS = ("softmax", "sigmoid", "gdas")


class MobileMixture(nn.Module):
    """y = sum_k w_k o_k(x) of a layer, w = softmax(alpha) or sigmoid(alpha); or h_k o_k(x).

    Args:
        layer: channels and stride.
        candidates: of the layer.
        mixing: "softmax", "sigmoid" or, of one sampled candidate, "gdas".
        noise: by candidate's name what is drawn on its output in training, from torch's generator.
    """

    def __init__(
        self,
        layer: MobileLayer,
        candidates: tuple[Block, ...],
        mixing: str,
        noise: Mapping[str, SkipNoise],
    ) -> None:
        super().__init__()
        C_in, C_out, stride = layer
        self.logits = nn.Parameter(1e-3 * torch.randn(len(candidates)))
        self.candidates = nn.ModuleDict(
            {
                block_name(block): nn.Identity()
                if isinstance(block, str)
                else InvertedResidual(C_in, C_out, *block, stride)
                for block in candidates
            }
        )
        self.mixing, self.noise = mixing, dict(noise)
        self.noise_amplitude, self.tau = 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        alpha, names = self.logits, list(self.candidates)
        if self.mixing == "gdas":
            (h,), (choice,) = gdas_sample(alpha[None], self.tau)
            # The host waits for the device in every layer, as in public code of the method.
            k = int(choice)
            return h[k] * self._output(names[k], x)
        w = alpha.softmax(-1) if self.mixing == "softmax" else alpha.sigmoid()
        return weighted_sum([self._output(name, x) for name in names], w)

    def _output(self, name: str, x: Tensor) -> Tensor:
        o: Tensor = self.candidates[name](x)
        noise = self.noise.get(name) if self.training else None
        return o if noise is None else skip_noise(o, noise, self.noise_amplitude)


class MobileNetSearchNetwork(nn.Module):
    """Computes the supernet: stem, layers, head, classifier.

    Args:
        classes: outputs.
        space: the column.
        mixing, noise: as in `MobileMixture`.
        in_channels: of the images.
    """

    def __init__(
        self,
        classes: int,
        *,
        space: MobileSpace,
        mixing: str = "softmax",
        noise: Mapping[str, SkipNoise] | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_int("classes", classes, 1)
        check_int("in_channels", in_channels, 1)
        check_type("space", space, MobileSpace)
        check_choice("mixing", mixing, MIXINGS)
        self.in_channels = in_channels
        self.stem = mobile_stem(in_channels, space.stem, space.first, space.stem_stride, "relu6")
        self.layers = nn.ModuleList(
            MobileMixture(layer, space.candidates(layer), mixing, noise or {})
            for layer in space.layers
        )
        self.head = mobile_head(space.last, space.head, "relu6")
        self.classifier = nn.Linear(space.head, classes)

    def set_schedules(self, amplitude: float, tau: float) -> None:
        """Sets what the noise of all layers is multiplied with, and their temperature."""
        for layer in self.layers:
            assert isinstance(layer, MobileMixture)
            layer.noise_amplitude, layer.tau = amplitude, tau

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to logits [N, classes]."""
        check_images("x", x, self.in_channels)
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.classifier(self.head(x))
        return y


def mobile_search_step(
    network: MobileNetSearchNetwork,
    weight_optimizer: torch.optim.Optimizer,
    logit_optimizer: torch.optim.Optimizer,
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    samples: int = 1,
    grad_clip: float = 5.0,
    amp: Amp | None = None,
) -> Tensor:
    """Makes one first-order step as public code writes it; returns the training loss.

    Each half computes all gradients, those of the weights in the half of the logits included. With
    several samples their gradients are averaged for the logits and added for the weights.

    Args:
        amp: the precision of both halves; None: fp32.
    """
    check_int("samples", samples, 1)
    check_clip(grad_clip)

    amp = Amp() if amp is None else amp

    def accumulate(batch: tuple[Tensor, Tensor], scale: float) -> Tensor:
        for _ in range(samples):
            with amp.autocast():
                loss = F.cross_entropy(network(batch[0]), batch[1])
            amp.backward(scale * loss)
        return loss.detach()

    logit_optimizer.zero_grad()
    accumulate(valid, 1.0 / samples)
    amp.step(logit_optimizer)

    weight_optimizer.zero_grad()
    loss = accumulate(train, 1.0)
    held = [p for group in weight_optimizer.param_groups for p in group["params"]]
    amp.step(weight_optimizer, held, grad_clip)
    return loss
