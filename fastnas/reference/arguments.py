"""Checks shapes of the specification's arguments; their types are checked by annotation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.checks import check_choice, check_type, short
from fastnas.reference.skip_noise import KINDS, MIXTURES

FORMS = (
    "none",
    *(f"{kind}_{mixture}" for kind in KINDS[:2] for mixture in MIXTURES),
    "bernoulli_multiplicative",
)


def check_shape(name: str, t: Tensor, shape: Sequence[int | None]) -> None:
    """Refuses a `t` of another shape; None stands for any size."""
    if t.dim() != len(shape) or any(
        size not in (None, given) for size, given in zip(shape, t.shape)
    ):
        needed = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(t.shape)}; [{needed}] is needed")


def check_floating(name: str, t: object) -> None:
    """Refuses what is no dense tensor of a floating point dtype."""
    check_type(name, t, Tensor)
    assert isinstance(t, Tensor)
    if not t.is_floating_point() or t.layout != torch.strided:
        kind = str(t.dtype if t.layout == torch.strided else t.layout)
        raise TypeError(f"{name} is {kind}; a dense floating point tensor is needed")


def check_images(name: str, x: object, channels: int | None = None) -> None:
    """Refuses an `x` that is not [N, C, H, W]."""
    check_floating(name, x)
    check_shape(name, x, [None, channels, None, None])  # type: ignore[arg-type]


def check_mixing(name: str, w: object, shape: Sequence[int], x: Tensor) -> None:
    """Refuses a `w` that is no set of mixing weights on the device of x."""
    check_floating(name, w)
    assert isinstance(w, Tensor)
    check_shape(name, w, shape)
    if w.device != x.device:
        raise ValueError(f"{name} is on {w.device}, x on {x.device}; one device is needed")


def check_terms(name: str, terms: Sequence[Tensor | None], w: Tensor) -> None:
    """Refuses no terms, terms that differ in shape or dtype, and terms without a weight each."""
    if not terms:
        raise ValueError(f"{name} is empty; at least one term is needed")
    # Terms are None where backward does not read them; an error names the first that is there.
    known = [(k, t) for k, t in enumerate(terms) if t is not None]
    for k, t in known:
        first = known[0][1]
        if t.shape != first.shape or t.dtype != first.dtype:
            raise ValueError(
                f"{name}[{k}] is {t.dtype} {list(t.shape)}, {name}[{known[0][0]}] {first.dtype}"
                f" {list(first.shape)}; one dtype and shape is needed"
            )
    check_shape("w", w, [len(terms)])


def check_noise(
    terms: int, noisy: Sequence[int], form: str, level: Tensor | None, rng: Tensor | None
) -> None:
    """Refuses `noisy` terms that are not distinct, or have nothing to draw their noise from."""
    check_choice("form", form, FORMS)
    if any(not 0 <= k < terms for k in noisy) or len(set(noisy)) != len(noisy):
        raise ValueError(f"noisy is {list(noisy)}; distinct indices below {terms} are allowed")
    if not noisy:
        return
    for name, t in (("level", level), ("rng", rng)):
        if t is None:
            raise ValueError(f"{name} is None, but noisy is {list(noisy)}; a tensor [2] is needed")
        check_shape(name, t, [2])


def check_clip(grad_clip: float) -> None:
    """Refuses a largest norm of a gradient that is not above 0."""
    if not grad_clip > 0:
        raise ValueError(f"grad_clip is {grad_clip}; a number above 0 is needed")


def check_flags(name: str, flags: Sequence[bool], count: int) -> None:
    """Refuses anything but a flag for each of `count` terms."""
    if len(flags) != count:
        raise ValueError(f"{name} is {short(flags)}; {count} flags are needed, one a term")


def check_paths(
    alpha: Tensor, beta: Tensor | None, nodes: Sequence[int], rows: Sequence[int], tau: object
) -> None:
    """Refuses logits without a row for each edge, and a temperature that is not above 0."""
    if any(n < 1 for n in nodes) or not nodes:
        raise ValueError(f"nodes is {list(nodes)}; one or more predecessors of each are needed")
    if alpha.dim() < 2 or alpha.shape[-2] != sum(nodes):
        raise ValueError(
            f"alpha has shape {list(alpha.shape)}; [..., {sum(nodes)}, O] is needed for nodes"
            f" {list(nodes)}"
        )
    if beta is None and any(rows):
        raise ValueError(f"beta is None; {sum(rows)} logits of the edges are needed")
    needed = (*alpha.shape[:-2], sum(rows))
    if beta is not None and tuple(beta.shape) != needed:
        raise ValueError(
            f"beta has shape {list(beta.shape)}; {list(needed)} is needed beside alpha of shape"
            f" {list(alpha.shape)}"
        )
    # A tensor is not looked at: reading it would wait for the device.
    if not isinstance(tau, Tensor) and not tau > 0:  # type: ignore[operator]
        raise ValueError(f"tau is {tau}; above 0 is needed")
