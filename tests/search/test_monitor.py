import gzip
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from fastnas.search.monitor import entropy, has_collapsed, observe
from fastnas.spaces import Genotype

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "robustdarts_traces.json.gz"


def test_entropy_is_a_share_of_its_maximum():
    assert entropy(torch.full((14, 7), 1 / 7)) == pytest.approx(1.0)
    assert entropy(torch.eye(7)[:3]) == pytest.approx(0.0)
    assert entropy(torch.tensor([[0.5, 0.5, 0.0, 0.0]])) == pytest.approx(0.5)
    assert entropy(torch.full((2, 4), 0.9)) == pytest.approx(1.0)
    assert entropy(torch.ones(3, 1)) == 0.0
    assert math.isfinite(entropy(torch.softmax(torch.randn(14, 7) * 100, -1)))


def test_observe():
    cell = (
        (("skip_connect", 0), ("sep_conv_3x3", 1)),
        (("skip_connect", 0), ("max_pool_3x3", 1)),
    )
    plain = ((("sep_conv_3x3", 0), ("dil_conv_3x3", 1)),) * 2
    weights = {name: torch.full((5, 2), 0.5) for name in ("normal", "reduce")}
    figures = observe(weights, Genotype(cell, (2, 3), plain, (2, 3)))
    assert (figures["skips_normal"], figures["skips_reduce"]) == (2, 0)
    assert (figures["parameter_free_normal"], figures["parameter_free_reduce"]) == (3, 0)


def test_collapse_needs_epochs_in_a_row():
    assert has_collapsed([0, 5, 6, 7], 8)
    assert not has_collapsed([5, 6], 8)
    assert not has_collapsed([8, 8, 4], 8)
    assert not has_collapsed([4, 4, 4], 8)


@pytest.mark.skipif(not TRACES.exists(), reason="RobustDARTS traces are not beside this checkout")
def test_on_the_traces_of_real_searches():
    """Second-order searches of RobustDARTS: weak regularisation collapses, strong does not."""
    verdicts = defaultdict(list)
    for trace in json.loads(gzip.decompress(TRACES.read_bytes())):
        skips = [
            sum(op == "skip_connect" for op, _ in epoch["genotype"]["normal"])
            for epoch in trace["epochs"]
            if epoch.get("genotype")
        ]
        if len(skips) >= 45:
            key = trace["space"], trace["dataset"], trace["drop_path"], trace["l2"]
            verdicts[key].append(has_collapsed(skips, 8))
    for collapsing in (("s1", "cifar10", 0.0, 3e-4), ("s3", "svhn", 0.0, 3e-4)):
        assert verdicts[collapsing] and all(verdicts[collapsing])
    for healthy in (("s1", "cifar10", 0.0, 8.1e-3), ("s3", "svhn", 0.0, 8.1e-3)):
        assert verdicts[healthy] and not any(verdicts[healthy])
