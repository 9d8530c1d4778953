"""Replays the two halves of a search step, each captured once as a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastnas.nn import NoiseDraw
from fastnas.ops.device_choice import choice_on_device
from fastnas.search.bilevel import Bilevel
from fastnas.search.optimizers import being_captured, is_capturable, state_tensors
from fastnas.strategies.single_path import SinglePath
from fastnas.strategies.steps import Batch, Inputs
from fastnas.transfer import staged, to_device

logger = logging.getLogger("fastnas")

Result = TypeVar("Result")
WARM_UPS = 3
NEVER_WAITING = ("cuda", "triton")
"""Backends whose ops read nothing from the device on the host."""


class Recorder(Protocol):
    """Does what `GraphedBilevel` needs of CUDA graphs; the tests have one that runs on the CPU."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` until all that it makes at its first call is made."""

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Records `work` without running it.

        Returns:
            A function that runs the recording and returns the tensors that `work` returned, which
            are the same at every call: a call overwrites the results of the one before.

        Raises:
            RuntimeError: the work cannot be recorded.
        """


class CudaRecorder:
    """Records CUDA graphs in one memory pool, to be run on one stream in any order.

    The pool is shared because nothing in it outlives a replay but the results, which are held: a
    graph's intermediates may lie where another's lay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            # A capture on the default stream is refused by CUDA.
            self._stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` three times, as torch's documentation has it.

        On the stream of the capture: cuBLAS makes its workspace there, Triton its kernels.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            # Puts the stream back; torch.cuda.graph does not where the capture fails.
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            result = work()

        def replay() -> Result:
            graph.replay()
            return result

        return replay


def why_not_graphed(bilevel: Bilevel, backend: str) -> str | None:
    """Tells why the steps of `bilevel` cannot be CUDA graphs, or None.

    Args:
        backend: the one that computes `mixed_sum`.
    """
    device, strategy = bilevel.params[0].device, bilevel.strategy
    if device.type != "cuda":
        return f"the search is on {device}; a CUDA device is needed"
    if backend not in NEVER_WAITING:
        # A kernel that reads the device on the host would wait for it, which a capture forbids.
        return f"the backend is {backend}; {' or '.join(NEVER_WAITING)} is needed"
    if isinstance(strategy, SinglePath) and backend != "cuda":
        return f"the backend is {backend}; the kernels that read sampled paths are cuda's"
    layout = bilevel.network.space.cell_layout
    if isinstance(strategy, SinglePath) and not layout.has_device_paths:
        return f"a cell of {layout.name} reads its sampled path on the host"
    if bilevel.precision.processes.size > 1:
        return "several processes bring their gradients together on the host"
    if bilevel.precision.scales:
        return "precision is fp16; whether a step is skipped is decided on the host"
    reason = strategy.not_capturable()
    if reason is not None:
        return reason
    for optimizer in (bilevel.params_optimizer, bilevel.arch_optimizer):
        if not is_capturable(optimizer):
            return f"the learning rate of {type(optimizer).__name__} is a number, not a tensor"
    return None


class CaptureError(RuntimeError):
    """Says why a step could not be captured."""


class GraphedBilevel:
    """Replays each half of `Bilevel` from a CUDA graph: the same steps, bit for bit.

    The first call of a half warms it up, captures it and puts back what that changed. Before each
    replay the batches, and noise drawn as `Bilevel` draws it, are copied into buffers that the
    graph reads. Nothing waits for the device. The learning rate is read from the device, the
    amplitude of the noise comes with the noise.

    The network must stay in training mode, parameters and the optimizers' states where they are;
    after loading a checkpoint call `forget`.

    A batch unlike the first, and every batch after a capture has failed, takes the eager step; the
    first time, the reason is logged.

    Args:
        bilevel: for which `why_not_graphed` is None.
        recorder: captures and replays.

    Attributes:
        failure: why no capture is tried any more, or None.
    """

    def __init__(self, bilevel: Bilevel, recorder: Recorder) -> None:
        self.bilevel = bilevel
        self._recorder = recorder
        self._buffers: dict[str, _Buffers] = {}
        self._replays: dict[Callable[..., Any], Callable[[], Any]] = {}
        self.failure: str | None = None
        self._logged = False

    def arch_step(self, valid: Batch, train: Batch) -> Tensor:
        """Does as `Bilevel.arch_step`; the next call overwrites what it returns."""
        return self._step(self.bilevel.move_alphas, valid=valid, train=train)

    def weight_step(self, train: Batch) -> tuple[Tensor, Tensor]:
        """Does as `Bilevel.weight_step`; the next call overwrites what it returns."""
        return self._step(self.bilevel.move_params, train=train)

    def forget(self) -> None:
        """Drops what was captured; the next call of each half captures anew."""
        self._buffers.clear()
        self._replays.clear()

    def _step(self, half: Callable[..., Result], **batches: Batch) -> Result:
        # Everything is drawn before anything can fail, so the eager step below runs on the numbers
        # that the graph would have had.
        fresh = {role: self._drawn(batch) for role, batch in batches.items()}
        reason = self.failure or self._misfit(fresh)
        if reason is None:
            try:
                return self._replayed(half, fresh)
            except CaptureError as error:
                reason = self.failure = str(error)
        if not self._logged:
            self._logged = True
            logger.warning("fastnas: an eager search step, not a CUDA graph: %s", reason)
        return half(*(_on_device(inputs) for inputs in fresh.values()))

    def _drawn(self, batch: Batch) -> Inputs:
        """Returns the batch with its noise on the host, drawn in `Bilevel`'s order."""
        sample = self.bilevel.strategy.draw()
        return Inputs(*batch, self.bilevel.network.draw(), sample)

    def _misfit(self, fresh: dict[str, Inputs]) -> str | None:
        for role, inputs in fresh.items():
            for name in ("images", "labels") if role in self._buffers else ():
                captured, given = (
                    _kind(getattr(i, name)) for i in (self._buffers[role].inputs, inputs)
                )
                if captured != given:
                    return f"the {name} of a {role} batch are {given}; captured are {captured}"
        return None

    def _replayed(self, half: Callable[..., Result], fresh: dict[str, Inputs]) -> Result:
        for role, inputs in fresh.items():
            if role not in self._buffers:
                self._buffers[role] = _Buffers(inputs)
            # The warm-up before a capture computes on these buffers as well, so they are filled
            # first.
            self._buffers[role].fill(inputs)
        if half not in self._replays:
            inputs_in_place = [self._buffers[role].inputs for role in fresh]
            self._replays[half] = self._captured(lambda: half(*inputs_in_place))
        return self._replays[half]()

    def _captured(self, work: Callable[[], Result]) -> Callable[[], Result]:
        # `choice_on_device` has the kernels read a sampled path from memory; read on the host, the
        # path of the first step would be part of the graph for good.
        with self._put_back(), choice_on_device():
            self._recorder.warm_up(work)
            try:
                with being_captured(self.bilevel.arch_optimizer):
                    return self._recorder.record(work)
            except RuntimeError as error:
                raise CaptureError(f"capture failed: {_cause(error)}") from error

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """Undoes what a step changes: parameters, logits, statistics, optimizers, generators."""
        step = self.bilevel
        tensors = [*step.params, *step.alphas, *step.network.buffers()]
        for optimizer in (step.params_optimizer, step.arch_optimizer):
            tensors += state_tensors(optimizer)
        before = [tensor.detach().clone() for tensor in tensors]
        device = step.params[0].device
        try:
            # Candidates of one's own may draw from the global generators while they warm up.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before):
                    # It is copied in place: the graph has recorded the addresses of these tensors.
                    tensor.copy_(value)


class _Buffers:
    """Keeps the inputs that a captured pass reads where they are."""

    def __init__(self, like: Inputs) -> None:
        images, labels, draw, sample = like
        self._noise: Tensor | None = None
        if draw is not None:
            # Level and streams lie in one tensor, so that a step has one copy from the host and not
            # two.
            self._noise = draw.packed().to(images.device)
        self.inputs = Inputs(
            torch.empty_like(images),
            torch.empty_like(labels),
            None if self._noise is None else NoiseDraw.unpacked(self._noise),
            None if sample is None else sample.to(images.device),
        )

    def fill(self, fresh: Inputs) -> None:
        # The graph reads these addresses at every replay, so new values are copied in and no tensor
        # is ever replaced. All copies are queued on the stream of the replay, which thus sees them.
        self.inputs.images.copy_(fresh.images)
        self.inputs.labels.copy_(fresh.labels)
        if self._noise is not None:
            assert fresh.draw is not None
            packed = staged(fresh.draw.packed(), self._noise.device)
            self._noise.copy_(packed, non_blocking=True)
        if self.inputs.sample is not None:
            assert fresh.sample is not None
            sample = staged(fresh.sample, self.inputs.sample.device)
            self.inputs.sample.copy_(sample, non_blocking=True)


def _on_device(inputs: Inputs) -> Inputs:
    device = inputs.images.device
    return inputs._replace(
        draw=None if inputs.draw is None else inputs.draw.to(device),
        sample=None if inputs.sample is None else to_device(inputs.sample, device),
    )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _cause(error: BaseException) -> str:
    """Tells what went wrong first: ending a broken capture raises again."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split()) or type(error).__name__
