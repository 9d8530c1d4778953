"""Counts the parameters and the work of each layer of a MobileNet-like network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastnas.nn import MobileNetEvalNetwork, count_parameters
from fastnas.spaces.mobile import block_name


def column_layers(network: MobileNetEvalNetwork, image: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the layers from the stem to the classifier, as a report has them.

    Multiply-adds are those of convolutions and of the classifier, of one image, as papers count
    them. The network is followed on the device "meta", which computes nothing.

    Args:
        image: its shape, [C, H, W].

    Returns:
        name, channels, side (of the output, in pixels; None after the mean), parameters and
        macs of each.
    """
    # In evaluation mode a batch norm takes one value per channel, which a single image may have.
    on_meta = copy.deepcopy(network).to("meta").eval()
    rows, x = [], torch.empty(1, *image, device="meta")
    named = [
        ("stem", on_meta.stem),
        *zip(map(block_name, on_meta.architecture), on_meta.layers),
        ("head", on_meta.head),
        ("classifier", on_meta.classifier),
    ]
    for name, module in named:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y: Tensor = module(x)
        rows.append(
            {
                "name": name,
                "channels": y.shape[1],
                "side": y.shape[2] if y.dim() == 4 else None,
                "parameters": count_parameters(module),
                # Two flops are a product and its sum.
                "macs": counter.get_total_flops() // 2,
            }
        )
        x = y
    return rows


def layer_table(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the layers of a report as a Markdown table, with the sums last."""
    lines = [
        "| layer | block | channels | side | parameters | multiply-adds |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for number, row in enumerate(layers):
        side = "" if row["side"] is None else row["side"]
        lines.append(
            f"| {number} | {row['name']} | {row['channels']} | {side} | {row['parameters']:,}"
            f" | {row['macs']:,} |"
        )
    sums = (f"{sum(row[key] for row in layers):,}" for key in ("parameters", "macs"))
    return [*lines, f"| | all | | | {' | '.join(sums)} |"]
