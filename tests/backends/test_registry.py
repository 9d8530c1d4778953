"""Which backend computes, and what is said where one cannot."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas import BackendError, use_backend
from fastnas.backends import BACKENDS, KERNELS, Request, choose
from fastnas.backends.calls import SumCall
from fastnas.backends.eager import EagerBackend, EagerSum
from fastnas.backends.native import Native, NativeCuda, load_native
from fastnas.backends.registry import PREFERENCE, forget_choices
from fastnas.backends.triton import TritonBackend
from fastnas.ops import OPS

OP = OPS["mixed_sum"]
X, W = [torch.ones(3), torch.ones(3)], torch.ones(2)


class Spy(EagerBackend, EagerSum):
    """Eager, which counts what it is asked and says that it can not run where it is told to.

    It is its own kernel of mixed_sum.
    """

    def __init__(self, name: str, reason: str | None = None) -> None:
        self.name = name
        self.reason = reason
        self.calls: list[str] = []
        self.asked = 0

    def can_run(self, request: Request) -> str | None:
        self.asked += 1
        return self.reason

    def forward(self, call: SumCall) -> tuple[Tensor, list[Tensor]]:
        self.calls.append("fwd")
        return super().forward(call)

    def backward(self, *given: Any) -> list[Tensor]:
        self.calls.append("bwd")
        return super().backward(*given)


@pytest.fixture(autouse=True)
def nothing_chosen_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTNAS_BACKEND", raising=False)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Spy]:
    """Four backends that run anything; auto prefers "first"."""
    made = {name: Spy(name) for name in ("first", "argued", "wished", "set")}
    for name, spy in made.items():
        monkeypatch.setitem(BACKENDS, name, spy)
        monkeypatch.setitem(KERNELS, ("mixed_sum", name), spy)
    monkeypatch.setitem(PREFERENCE, "cpu", ("first", "eager"))
    return made


def chosen(
    explicit: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    terms: int = 2,
) -> str:
    return choose(OP, torch.device(device), dtype, terms, explicit)


def set_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a process started with FASTNAS_BACKEND=name finds it."""
    monkeypatch.setenv("FASTNAS_BACKEND", name)
    forget_choices()


def test_argument_over_use_backend_over_environment_over_auto(
    spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen() == "first"
    set_environment(monkeypatch, "set")
    assert chosen() == "set"
    with use_backend("wished"):
        assert chosen() == "wished"
        assert chosen("argued") == "argued"
    assert chosen("argued") == "argued"
    assert chosen() == "set"
    set_environment(monkeypatch, "")
    assert chosen() == "first"


def test_auto_lifts_an_outer_choice(spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, "set")
    assert chosen("auto") == "first"
    with use_backend("wished"):
        with use_backend("auto"):
            assert chosen() == "first"
        assert chosen() == "wished"
        assert chosen("auto") == "first"


def test_use_backend_ends_with_an_error_inside(spies: dict[str, Spy]) -> None:
    def fail_inside() -> None:
        with use_backend("wished"):
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert chosen() == "first"


def in_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_leaving_a_block_takes_no_other_threads_wish(spies: dict[str, Spy]) -> None:
    """Whichever of two blocks in two threads is left first."""
    for leaves_first in ("here", "there"):
        here, there = use_backend("wished"), use_backend("set")
        with ThreadPoolExecutor(1) as other:
            here.__enter__()
            other.submit(there.__enter__).result()
            assert chosen() == "wished"
            assert other.submit(chosen).result() == "set"
            if leaves_first == "here":
                here.__exit__(None, None, None)
                assert other.submit(chosen).result() == "set"
                other.submit(there.__exit__, None, None, None).result()
            else:
                other.submit(there.__exit__, None, None, None).result()
                assert chosen() == "wished"
                here.__exit__(None, None, None)
            assert chosen() == other.submit(chosen).result() == "first"


def test_threads_without_a_block_go_by_the_one_that_is_open(spies: dict[str, Spy]) -> None:
    """Such as those that run backward on CUDA."""
    with use_backend("wished"):
        assert in_another_thread(chosen) == "wished"
        with use_backend("set"):
            assert in_another_thread(chosen) == "set"
        assert in_another_thread(chosen) == "wished"
    assert in_another_thread(chosen) == "first"


def test_many_threads_keep_their_own(spies: dict[str, Spy]) -> None:
    def enter_and_leave(name: str) -> bool:
        for _ in range(200):
            with use_backend(name):
                if chosen() != name:
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(enter_and_leave, ["first", "argued", "wished", "set"] * 2))
    assert chosen() == "first"


@pytest.mark.parametrize("how", ["argument", "use_backend", "environment", "auto"])
def test_forward_and_backward_run_on_the_choice(
    spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Backward too, where the block or the variable is gone by then."""
    names = {"argument": "argued", "use_backend": "wished", "environment": "set", "auto": "first"}
    w = W.clone().requires_grad_()
    if how == "use_backend":
        with use_backend("wished"):
            y = fastnas.mixed_sum(X, w)
    else:
        if how == "environment":
            set_environment(monkeypatch, "set")
        y = fastnas.mixed_sum(X, w, backend="argued" if how == "argument" else None)
        set_environment(monkeypatch, "")
    y.sum().backward()
    for name, spy in spies.items():
        assert spy.calls == (["fwd", "bwd"] if name == names[how] else [])


def test_the_choice_is_made_once_for_each_class_of_request(spies: dict[str, Spy]) -> None:
    first = spies["first"]
    fastnas.mixed_sum(X, W)
    asked = first.asked
    for _ in range(3):
        chosen()
        fastnas.mixed_sum(X, W)
    assert first.asked == asked
    chosen(terms=3)
    chosen(dtype=torch.float64)
    assert first.asked == asked + 2


def test_auto_falls_back_and_says_so_once(
    spies: dict[str, Spy], caplog: pytest.LogCaptureFixture
) -> None:
    spies["first"].reason = "its kernels are on holiday"
    with caplog.at_level(logging.WARNING, logger="fastnas"):
        for terms in (2, 3, 4):
            assert chosen(terms=terms) == "eager"
    assert [record.getMessage() for record in caplog.records] == [
        "fastnas: mixed_sum falls back from first: its kernels are on holiday"
    ]


def test_an_explicit_choice_that_can_not_run_raises(
    spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    for spy in spies.values():
        spy.reason = "no"
    with pytest.raises(BackendError, match=r"^backend='argued' cannot run mixed_sum: no$"):
        fastnas.mixed_sum(X, W, backend="argued")
    with (
        use_backend("wished"),
        pytest.raises(BackendError, match=r"^use_backend='wished' cannot run mixed_sum: no$"),
    ):
        fastnas.mixed_sum(X, W)
    set_environment(monkeypatch, "set")
    with pytest.raises(BackendError, match=r"^FASTNAS_BACKEND='set' cannot run mixed_sum: no$"):
        fastnas.mixed_sum(X, W)
    spies["set"].reason = None
    fastnas.mixed_sum(X, W)  # a refusal is not remembered


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = "allowed: eager, cpu, cuda, triton.*, auto$"
    with pytest.raises(BackendError, match=f"^backend is 'gpu'; {allowed}"):
        fastnas.mixed_sum(X, W, backend="gpu")
    with pytest.raises(BackendError, match=f"^use_backend is 'gpu'; {allowed}"), use_backend("gpu"):
        pass
    for name in (["cpu"], 1, b"cpu", torch.ones(1)):
        with pytest.raises(BackendError, match=f"^backend is .*{allowed}"):
            fastnas.mixed_sum(X, W, backend=name)  # type: ignore[arg-type]
        with pytest.raises(BackendError, match=f"^use_backend is .*{allowed}"):
            use_backend(name).__enter__()  # type: ignore[arg-type]
    set_environment(monkeypatch, "gpu")
    with pytest.raises(BackendError, match=f"^FASTNAS_BACKEND is 'gpu'; {allowed}"):
        fastnas.mixed_sum(X, W)
    assert issubclass(BackendError, ValueError)


def test_a_device_that_no_kernel_is_for_runs_eagerly() -> None:
    assert chosen(device="mps") == "eager"
    assert chosen(device="meta") == "eager"


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_tensors_on_another_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS[name], "unavailable", lambda: None, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    here, there = ("cuda", "cpu") if name == "cpu" else ("cpu", "cuda")
    message = f"the tensors are on {here}, {name} computes on {there}"
    with pytest.raises(BackendError, match=message):
        chosen(name, device=here)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_fp64_off_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS[name], "unavailable", lambda: None, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = f"mixed_sum has no float64 kernel on {name}, only float32, bfloat16, float16"
    with pytest.raises(BackendError, match=message):
        chosen(name, "cuda", torch.float64)


def test_fp64_on_interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="mixed_sum has no float64 kernel on triton, only"):
        fastnas.mixed_sum([x.double() for x in X], W, backend="triton")


def test_auto_never_takes_interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen() in ("cpu", "eager")


def test_what_the_table_leaves_out_is_refused_with_its_reason() -> None:
    op = fastnas.backends.OpInfo("none", "", 128, {"cpu": "it has no such kernel"})
    assert Request(op, "cpu", torch.float32).refusal("cpu", "cpu") == "it has no such kernel"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_module_without_a_device_says_what_is_missing() -> None:
    native = pytest.importorskip("fastnas._cuda")
    problem = native.device_problem()
    assert "driver" in problem or "device" in problem
    with pytest.raises(BackendError, match=f"^backend='cuda' cannot run mixed_sum: {problem}"):
        fastnas.mixed_sum(X, W, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert (
        BACKENDS["triton"].unavailable() == "there is no CUDA device, and TRITON_INTERPRET is not 1"
    )


def test_without_the_native_modules(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, module, kind in (("cpu", "_C", Native), ("cuda", "_cuda", NativeCuda)):
        monkeypatch.setitem(sys.modules, f"fastnas.{module}", None)
        monkeypatch.setitem(BACKENDS, name, kind(name, name, *load_native(module)))
        with pytest.raises(BackendError, match=f"fastnas.{module} does not import.*FASTNAS_BUILD"):
            fastnas.mixed_sum(X, W, backend=name)
    with caplog.at_level(logging.WARNING, logger="fastnas"):
        assert fastnas.mixed_sum(X, W).tolist() == [2, 2, 2]
        assert chosen() == "eager"
    assert len(caplog.records) == 1
    assert "falls back from cpu: fastnas._C does not import" in caplog.text


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert TritonBackend().unavailable() == "triton is not installed"


PURE_PYTHON = """
import sys
for name in ("fastnas._C", "fastnas._cuda", "triton"):
    sys.modules[name] = None
import torch, fastnas
w = torch.ones(2, requires_grad=True)
y = fastnas.mixed_sum([torch.ones(3), torch.ones(3)], w, noise=fastnas.SkipNoise(), noisy=[0])
y.sum().backward()
print(w.grad.shape)
"""


def test_a_fresh_process_without_native_modules_and_triton() -> None:
    result = subprocess.run([sys.executable, "-c", PURE_PYTHON], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2])" in result.stdout


def test_import_leaves_triton_alone() -> None:
    """Triton takes half a second to import, and reads TRITON_INTERPRET as it does."""
    code = "import fastnas, sys; assert 'fastnas.kernels.mixed_sum' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
