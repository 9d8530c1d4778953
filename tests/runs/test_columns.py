"""What a report says of a column's network, layer by layer."""

import pytest

from fastnas.nn import MobileNetEvalNetwork, count_parameters
from fastnas.runs.columns import column_layers, layer_table
from fastnas.spaces import MOBILE_ARCHITECTURES


@pytest.mark.parametrize(
    ("name", "parameters", "millions"),
    [("NoisyDARTS-A", 4_882_184, 446.01), ("FairNAS-B", 4_506_272, 345.30)],
)
def test_the_layers_add_up_to_what_is_published(name, parameters, millions):
    network = MobileNetEvalNetwork(MOBILE_ARCHITECTURES[name], 1000)
    layers = column_layers(network, (3, 224, 224))
    assert sum(row["parameters"] for row in layers) == parameters == count_parameters(network)
    assert round(sum(row["macs"] for row in layers) / 1e6, 2) == millions
    assert [row["side"] for row in layers] == [
        112, *[56] * 2, *[28] * 4, *[14] * 8, *[7] * 5, None, None,
    ]  # fmt: skip
    assert network.training and next(network.parameters()).device.type == "cpu"


def test_the_table_has_a_row_for_each_and_their_sums():
    row = {"name": "k3_e6", "channels": 8, "side": 4, "parameters": 1500, "macs": 20000}
    lines = layer_table([row, {**row, "name": "head", "side": None}])
    assert lines[2:] == [
        "| 0 | k3_e6 | 8 | 4 | 1,500 | 20,000 |",
        "| 1 | head | 8 |  | 1,500 | 20,000 |",
        "| | all | | | 3,000 | 40,000 |",
    ]
