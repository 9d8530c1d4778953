"""Decides where an op runs, and what computes a call that is more than one pass of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastnas.backends import OPS, BackendError, choose
from fastnas.backends.transforms import is_transformed
from fastnas.ops.flops import serve_counters


def choose_backend(
    op: str, like: Tensor, backend: str | None, terms: int = 1, dtype: torch.dtype | None = None
) -> str:
    """Returns the name of the backend that runs `op` on so many tensors like this one.

    Kernels know nothing of `torch.func` and of forward-mode differentiation. There it is "eager":
    the reference is made of torch's own operations, which every transform knows.
    """
    # A choice that cannot run is refused under a transform, too.
    name = choose(OPS[op], like.device, dtype or like.dtype, terms, backend)
    return "eager" if is_transformed() else name


def has_kernel(op: str, like: Tensor, terms: int) -> bool:
    """Tells whether a call with so many terms like this one runs on a kernel, not eagerly.

    Supposed while torch.compile traces, which cannot follow the choice; the call makes it then.
    """
    if torch.compiler.is_compiling():
        return True
    try:
        return choose_backend(op, like, None, terms) != "eager"
    except BackendError:
        return False


def is_plain_call() -> bool:
    """Tells whether nothing watches the dispatcher, so that the op's body can be called without it.

    That is half of the call's overhead: 0.1 of 0.2 ms forward, as much backward.
    """
    if torch.compiler.is_compiling():
        return False
    # Modes see what goes through the dispatcher only: FakeTensorMode and flop counters among them.
    if is_in_torch_dispatch_mode():
        serve_counters()
        return False
    return True


def wanted(needs: Sequence[bool], leaves: Sequence[Tensor | None]) -> list[bool]:
    """Drops gradients that the backward pass that runs has no use for.

    `autograd.grad(loss, alphas)`, of which an unrolled step makes two, asks for none of the
    parameters that require one; torch's own convolutions are not computed for them either.

    Args:
        needs: of each leaf, whether it requires a gradient.
        leaves: the tensors, as far as they were saved.
    """
    found = list(needs)
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return found
    for i in range(len(found) - 1, -1, -1):
        leaf = leaves[i]
        if found[i] and leaf is not None and leaf.is_leaf:
            found[i] = _is_asked_for(leaf)
            # Parameters come last. If this one is asked for, so are the others, most likely: each
            # look-up takes a microsecond, of a hundred in a cell.
            if found[i]:
                break
    return found


def _is_asked_for(leaf: Tensor) -> bool:
    node = get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it is what `autograd.grad` was asked for
        return True


def own_output(t: Tensor) -> Tensor:
    """Returns `t`, copied where it is empty.

    Backends return one shared empty tensor. An output of an op has to be its own, because autograd
    attaches a history to it.
    """
    return t if t.numel() else t.clone()


def needs_graph(leaves: Iterable[Tensor | None]) -> bool:
    """Tells whether autograd is to record the call as one `autograd.Function`.

    Where no gradient is needed none is entered: that is cheaper, and dynamo fails on a Function
    none of whose inputs needs one.
    """
    if not torch.is_grad_enabled():
        return False
    # A list is faster here, since a generator is entered anew for each of some 170 leaves.
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return bool(wanted) and not is_transformed()


def wants_graph_of_backward(grad: Tensor) -> bool:
    """Tells whether a backward pass is to be differentiated again, or has many gradients at once.

    The kernels serve neither; `reference_grads` does. A gradient that stands for many (`vmap`,
    `is_grads_batched`) has no storage of its own. A backward that torch.compile traces runs once:
    there torch itself refuses a second derivative.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or not torch._C._has_storage(grad)


def reference_grads(
    forward: Callable[[Sequence[Tensor]], Tensor],
    leaves: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Computes an op's gradients by its reference, so that autograd can differentiate them again.

    They hang on the saved inputs and on `grad`, so derivatives of every order are the reference's.
    As slow as the reference: only for what `wants_graph_of_backward` tells.

    Args:
        forward: the reference as a function of the leaves.
        leaves: what the op is differentiated by; None where it was not saved, because the
            gradients that are needed do not depend on its value.
        needs: whether the gradient of each leaf is wanted.
        grad: the gradient of the output; a leaf that was not saved has its shape and dtype.
    """
    # Grad mode is off in the backward of an ordinary pass, and on under create_graph.
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # These are views, since one tensor may stand in several places and has a gradient for each.
        own = [_stand_in(grad) if t is None else t.view_as(t) for t in leaves]
        wanted = [t for t, need in zip(own, needs) if need]
        found = iter(
            torch.autograd.grad(
                forward(own),
                wanted,
                grad,
                create_graph=again,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return [next(found) if need else None for need in needs]


def _stand_in(grad: Tensor) -> Tensor:
    # One number is expanded: nothing of the size of a term is allocated for what is not read.
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    return zero.expand(grad.shape).requires_grad_()
