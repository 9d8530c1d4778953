"""Every test: a fixed seed, two threads at most, poisoned torch.empty. Op tests: `backend`."""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda import HostCudaBackend, load_host_cuda
from poison import poison_fresh_memory
from targets import TARGETS, Target, registered

from fastnas.ops import OPS

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, at first use
if "PYTEST_XDIST_WORKER" in os.environ:
    # For the processes that tests start: one of two threads, with a worker on each core, took five
    # times the CPU time. What is about threads sets their number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def fixed_seed_and_threads() -> Iterator[None]:
    """Two threads; one where each core has a worker, and what is about threads sets their number.

    Threads of two workers wait for one another: tests of the CPU kernels took three times the CPU
    time, eager's small ops twice.
    """
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - for what draws from the legacy generator
    random.seed(0)
    threads = torch.get_num_threads()
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(min(threads, 2 if alone else 1))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(fixed_seed_and_threads: None) -> None:
    """For thousands of small ops: on busy cores most of the time would be waiting for a thread."""
    torch.set_num_threads(1)


def _let_torch_see_torch() -> None:
    """Dynamo, and torch.device as a context, list torch's functions once, at their first use: they
    must see the real torch.empty.

    Dynamo imports Triton, which reads TRITON_INTERPRET then; so here, not with the imports above.
    """
    from torch._dynamo.trace_rules import get_torch_obj_rule_map
    from torch.utils._device import _device_constructors

    get_torch_obj_rule_map()
    _device_constructors()


_let_torch_see_torch()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that no kernel writes is NaN, not what the memory held before."""
    poison_fresh_memory(monkeypatch.setattr)


@pytest.fixture
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave empty files where they would draw, which is a quarter of what a tiny run takes.

    `@pytest.mark.pictures` names the tests of such a file that look at what is drawn.
    """
    if request.node.get_closest_marker("pictures"):
        return

    def leave_empty(*drawn_and_path: Any) -> None:
        Path(drawn_and_path[-1]).touch()

    for name in ("whole_search.draw_history", "genotype.save_figure",
                 "study.draw_best_so_far", "study.draw_simplex"):  # fmt: skip
        monkeypatch.setattr(f"fastnas.runs.{name}", leave_empty)
    monkeypatch.setattr("fastnas.runs.genotype.architecture_figure", lambda genotype, title: None)


@pytest.fixture(scope="session")
def kept_folder(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A folder by name that outlasts the session, where pytest keeps a cache."""
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp if cache is None else cache.mkdir


@pytest.fixture(scope="session")
def cuda_host(kept_folder: Callable[[str], Path]) -> Iterator[HostCudaBackend]:
    """The CUDA kernels on the host, as backend "cuda-host"; `make simt` sets checks."""
    checks = os.environ.get("FASTNAS_HOST_CHECKS", "")
    backend = load_host_cuda(kept_folder("fastnas_host_simt"), checks)
    if isinstance(backend, str):
        pytest.skip(backend)
    with registered(backend, backend.kernels, table="cuda"):
        yield backend


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Target:
    """Each target in turn; `@pytest.mark.backends("cpu", ...)` names the ones that apply."""
    target: Target = request.param
    reason = target.why_not()
    if reason is not None:
        pytest.skip(reason)
    if target.name == "cuda-host":
        request.getfixturevalue("cuda_host")
    return target


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): the backends that a test applies to")
    config.addinivalue_line("markers", "pictures: looks at what a run draws, beside `no_pictures`")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`, or `backend` and `dtype` as the op table pairs them for the module's OP."""
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("backends")
    targets = [t for t in TARGETS if marker is None or t.name in marker.args]
    marks = {target: [pytest.mark.gpu] if target.device == "cuda" else [] for target in targets}
    if "dtype" not in metafunc.fixturenames:
        params = [pytest.param(t, id=t.id, marks=marks[t]) for t in targets]
        metafunc.parametrize("backend", params, indirect=True)
        return
    op = metafunc.module.OP
    assert op in OPS
    pairs = [
        pytest.param(t, dtype, id=f"{t.id}-{str(dtype).removeprefix('torch.')}", marks=marks[t])
        for t in targets
        for dtype in t.dtypes(op)
    ]
    metafunc.parametrize(("backend", "dtype"), pairs, indirect=["backend"])


def pytest_itemcollected(item: pytest.Item) -> None:
    callspec = getattr(item, "callspec", None)
    target = callspec.params.get("backend") if callspec else None
    if isinstance(target, Target):
        item.user_properties.append(("backend", target.id))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests ran on each backend, so that a backend that never ran is seen."""
    ran: Counter[str] = Counter()
    reasons: defaultdict[str, set[str]] = defaultdict(set)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            target = dict(report.user_properties).get("backend")
            if target is None:
                continue
            if outcome != "skipped":
                ran[target] += 1
                continue
            where = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            reasons[target].add(str(where).removeprefix("Skipped: "))
    if not ran and not reasons:
        return
    parts = []
    for target in (t.id for t in TARGETS):
        why = f" (skipped: {'; '.join(sorted(reasons[target]))})" if reasons[target] else ""
        parts.append(f"{target} {ran[target]}{why}")
    terminalreporter.write_line(f"fastnas backends: {', '.join(parts)}")
