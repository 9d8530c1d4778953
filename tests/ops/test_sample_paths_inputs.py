"""Bad input to sample_paths: errors that name the argument, what was given and is allowed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from fastnas import BackendError, sample_paths

OP = "sample_paths"
A = torch.zeros(5, 3)
GOOD: dict[str, Any] = {"alpha": A, "nodes": (2, 3), "tau": 1.0}
TOP2: dict[str, Any] = {"topology": "top2", "beta": torch.zeros(5)}
PAIRS: dict[str, Any] = {"topology": "pairs", "beta": torch.zeros(4)}
RNG = torch.tensor([1, 2])

BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "alpha is a list; a Tensor is needed", {"alpha": [[1.0]]}),
    (TypeError, "alpha is torch.int64; allowed: float32, float64", {"alpha": A.long()}),
    (TypeError, "alpha is torch.bfloat16; allowed: float32, float64", {"alpha": A.bfloat16()}),
    (ValueError, "alpha has shape [5, 3]; [..., 6, O] with O >= 1 is needed for nodes (3, 3)",
     {"nodes": (3, 3)}),
    (ValueError, "alpha has shape [5]; [..., 5, O]", {"alpha": A[:, 0]}),
    (ValueError, "alpha has shape [5, 0]; [..., 5, O] with O >= 1", {"alpha": A[:, :0]}),
    (ValueError, "nodes is (); 1 to 64 integers >= 1 are allowed where topology is 'none'",
     {"nodes": ()}),
    (ValueError, "nodes is (2, 3, 0); 1 to 64 integers >= 1", {"nodes": (2, 3, 0)}),
    (ValueError, "nodes is (2.0, 3); 1 to 64 integers", {"nodes": (2.0, 3)}),
    (ValueError, "1 to 64 integers", {"nodes": (1,) * 65, "alpha": torch.zeros(65, 3)}),
    (ValueError, "nodes is (1, 4); 1 to 64 integers >= 2 are allowed where topology is 'top2'",
     {"nodes": (1, 4), **TOP2}),
    (ValueError, "nodes is (1, 4); 1 to 64 integers >= 2 are allowed where topology is 'pairs'",
     {"nodes": (1, 4), **PAIRS}),
    (ValueError, "topology is 'top3'; allowed: none, top2, pairs", {"topology": "top3"}),
    (ValueError, "no beta is given, but topology is 'top2'; one is needed", {"topology": "top2"}),
    (ValueError, "a beta is given, but topology is 'none'; none is needed",
     {"beta": torch.zeros(5)}),
    (TypeError, "beta is a list; a Tensor is needed", {**TOP2, "beta": [0.0]}),
    (TypeError, "beta is torch.float64, alpha is torch.float32; one dtype is needed",
     {**TOP2, "beta": torch.zeros(5).double()}),
    (ValueError, "beta is on meta, alpha on cpu", {**TOP2, "beta": torch.zeros(5, device="meta")}),
    (ValueError, "beta has shape [4]; [5] is needed for alpha [5, 3], nodes (2, 3) and topology"
     " 'top2'", {**TOP2, "beta": torch.zeros(4)}),
    (ValueError, "beta has shape [5]; [4] is needed", {**PAIRS, "beta": torch.zeros(5)}),
    (ValueError, "beta has shape [5]; [2, 5] is needed for alpha [2, 5, 3]",
     {**TOP2, "alpha": A.expand(2, 5, 3)}),
    (ValueError, "paths is 0; an integer from 1 to 2147483647 is allowed", {"paths": 0}),
    (ValueError, "paths is 1.5; an integer", {"paths": 1.5}),
    (ValueError, "tau is 0.0; a finite number > 0 or a 0-d tensor is allowed", {"tau": 0.0}),
    (ValueError, "tau is -1; a finite number > 0", {"tau": -1}),
    (ValueError, "tau is inf; a finite number", {"tau": math.inf}),
    (ValueError, "tau is nan; a finite number", {"tau": math.nan}),
    (ValueError, "tau is '1'; a finite number", {"tau": "1"}),
    (ValueError, "tau is torch.float32 [1]; a floating point tensor [] is needed",
     {"tau": torch.ones(1)}),
    (ValueError, "tau is torch.int64 []; a floating point", {"tau": torch.tensor(1)}),
    (ValueError, "tau is on meta, alpha on cpu", {"tau": torch.ones((), device="meta")}),
    (ValueError, "tau requires a gradient; it has none here, detach it",
     {"tau": torch.ones((), requires_grad=True)}),
    (ValueError, "rng is torch.int32 [2]; torch.int64 [2] is needed", {"rng": RNG.int()}),
    (ValueError, "rng is torch.int64 [1, 2]; torch.int64 [2]", {"rng": RNG[None]}),
    (ValueError, "rng is on meta", {"rng": RNG.to("meta")}),
    (BackendError, "backend is 'cdua'; allowed: eager, cpu", {"backend": "cdua"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given"), BAD, ids=[case[1] for case in BAD])
def test_bad_input(error: type[Exception], message: str, given: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        sample_paths(**{**GOOD, **given})


def test_the_good_input_is_good() -> None:
    for given in ({}, TOP2, PAIRS):
        assert sample_paths(**{**GOOD, **given}).op.shape == (1, 5)


@pytest.mark.backends("cpu", "cuda", "triton")
@pytest.mark.parametrize(("nodes", "O", "longest"), [((2,), 129, 129), ((17,), 3, 136)])
def test_longer_rows_than_a_kernel_takes(
    backend: Any, nodes: tuple[int, ...], O: int, longest: int
) -> None:
    n = nodes[0]
    alpha = torch.zeros(n, O, device=backend.device)
    beta = torch.zeros(n * (n - 1) // 2, device=backend.device)
    given = {"nodes": nodes, "topology": "pairs", "tau": 1.0}
    message = f"{longest} terms; the {backend.name} kernel takes 128"
    with pytest.raises(BackendError, match=message):
        sample_paths(alpha, beta, backend=backend.name, **given)
    assert int((sample_paths(alpha, beta, **given).op >= 0).sum()) == 2


def test_meta_tensors_give_the_shape() -> None:
    sample = sample_paths(A.to("meta"), nodes=(2, 3), tau=1.0, paths=4, rng=RNG.to("meta"))
    assert sample.op.shape == sample.weight.shape == (4, 5)
    assert sample.op.dtype == torch.int64
