"""CUDA graphs on the CPU: what a capture records is fixed, what it reads from memory is not."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class HostReadError(RuntimeError):
    """Under capture a tensor's value was asked for on the host."""


class Tape(TorchDispatchMode):
    """Every call of an operator, with the tensors that it read and those that it returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise HostReadError("the value of a tensor was read on the host")
        result = func(*args, **kwargs)
        if func.namespace != "profiler":
            self.calls.append((func, *tree_map(lambda x: x, (args, kwargs, result))))
        return result

    @torch.no_grad()
    def replay(self):
        """The calls again, with the numbers of then; results land where they did then."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for is_alias, old, new in zip(
                (r.alias_info is not None for r in func._schema.returns), *_returned(result, again)
            ):
                for a, b in zip(tree_leaves(old), tree_leaves(new)):
                    if isinstance(a, torch.Tensor) and not is_alias:
                        a.copy_(b)


def _returned(*results):
    return [r if isinstance(r, tuple) else () if r is None else (r,) for r in results]


class HostRecorder:
    """`CudaRecorder` by a `Tape`; recording here does the work once, which a capture does not."""

    def __init__(self, *_):
        self.warm_ups = 0
        self.tapes = []

    def warm_up(self, work):
        self.warm_ups += 1
        for _ in range(2):
            work()

    def record(self, work):
        tape = Tape()
        with tape:
            result = work()
        self.tapes.append(tape)

        def replay():
            tape.replay()
            return result

        return replay
