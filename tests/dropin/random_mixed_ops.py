"""Random mixed ops: each follows from its seed, and is compared with its own forward.

    python tests/dropin/random_mixed_ops.py --count 300           are all right?
    python tests/dropin/random_mixed_ops.py --count 300 --times   is one slower than by itself?
    python tests/dropin/random_mixed_ops.py --seed 17 --count 1   one, with what it is made of

Exits with 1 where one is wrong, or slower than 0.95 of its own forward.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter

import torch
from compared import MODES, differences, state_after
from random_candidates import (
    DARTS,
    DENSE,
    FOREIGN,
    candidate,
    disturb,
    norms_of_another_kind,
)
from torch import Tensor, nn

import fastnas

SLOWEST = 0.95
SECONDS, LEAST_STEPS = 0.4, 6
NAMES = ("_ops", "m_ops", "ops", "candidate_ops", "paths", "branches")


@dataclass(frozen=True)
class Recipe:
    """What a random mixed op is made of; every field follows from the seed."""

    candidates: list[list[str]]  # of each edge
    C: int
    stride: int
    spelling: str
    container: str
    name: str
    signature: str
    order: str  # of weight and operation
    sum: str
    part: int  # one in so many channels is mixed
    weights: str
    skip_zeros: bool
    edge_weights: bool
    drop_path: str
    noise: str
    norms: str
    disturbed: bool
    chained: bool  # an edge reads the sum of those before it


def recipe(seed: int) -> Recipe:
    rng = random.Random(seed)
    kinds = rng.choices(
        (DARTS, DARTS + DENSE, DARTS + FOREIGN, (*DENSE, "none", "skip_connect"), FOREIGN),
        (45, 15, 25, 10, 5),
    )[0]
    edges = rng.choice((1, 1, 1, 2, 3))
    part = rng.choices((1, 2, 4), (75, 10, 15))[0]
    return Recipe(
        candidates=[rng.choices(kinds, k=rng.randint(2, 9)) for _ in range(edges)],
        C=part * rng.choice((4, 8)),
        stride=rng.choices((1, 2), (70, 30))[0],
        spelling=rng.choices(("darts", "pt.darts", "xautodl"), (70, 20, 10))[0],
        container=rng.choice(("list", "list", "dict", "children", "listed twice")),
        name=rng.choice(NAMES),
        signature=rng.choice(("x, w", "x, w, step", "x, w, drop=0.", "x, *, weights", "x")),
        order=rng.choice(("w * op", "op * w")),
        sum=rng.choice(("sum", "sum", "plus", "in place", "stack", "einsum", "start")),
        part=part,
        weights=rng.choice(("softmax", "softmax", "sigmoid", "list", "floats", "one-hot")),
        skip_zeros=rng.random() < 0.2,
        edge_weights=rng.random() < 0.3,
        drop_path=rng.choices(("", "in place", "copy", "term"), (70, 10, 10, 10))[0],
        noise=rng.choices(("", "output", "input"), (80, 10, 10))[0],
        norms=rng.choices(("plain", "affine", "untracked"), (80, 12, 8))[0],
        disturbed=rng.random() < 0.3,
        chained=rng.random() < 0.6,
    )


def drop_path(x: Tensor, how: str) -> Tensor:
    mask = x.new_empty(x.size(0), 1, 1, 1).bernoulli_(0.7)
    if how == "in place":
        x.div_(0.7)
        x.mul_(mask)
        return x
    return x / 0.7 * mask


class MixedOp(nn.Module):
    """One edge as the recipe says: its container, its signature, its way to add."""

    def __init__(self, made: Recipe, names: list[str], seed: int) -> None:
        super().__init__()
        self.made = made
        ops = [candidate(name, made.C // made.part, made.stride, made.spelling) for name in names]
        if made.norms != "plain":
            ops = [norms_of_another_kind(op, made.norms) for op in ops]
        self.names = [f"{k}-{name}" for k, name in enumerate(names)]
        if made.container == "list":
            setattr(self, made.name, nn.ModuleList(ops))
        elif made.container == "dict":
            setattr(self, made.name, nn.ModuleDict(dict(zip(self.names, ops))))
        else:
            for name, op in zip(self.names, ops):
                self.add_module(name, op)
        if made.container == "listed twice":
            self.primitives = ops
        self.alpha = nn.Parameter(torch.randn(len(ops)))
        self.disturbed = disturb(self, random.Random(seed)) if made.disturbed else []

    def listed(self) -> list[nn.Module]:
        if self.made.container == "list":
            return list(getattr(self, self.made.name))
        if self.made.container == "dict":
            return list(getattr(self, self.made.name).values())
        if self.made.container == "listed twice":
            return self.primitives
        return [getattr(self, name) for name in self.names]

    def term(self, op: nn.Module, x: Tensor, w: Tensor | float) -> Tensor:
        y = op(x)
        if self.made.drop_path == "term" and self.training:
            y = drop_path(y, "copy")
        return w * y if self.made.order == "w * op" else y * w

    def mixed(self, x: Tensor, weights: Tensor | list[Tensor] | list[float]) -> Tensor:
        made = self.made
        if made.sum in ("stack", "einsum"):
            outputs = torch.stack([op(x) for op in self.listed()])
            w = torch.stack([torch.as_tensor(w, dtype=outputs.dtype) for w in weights])
            if made.sum == "einsum":
                return torch.einsum("k,knchw->nchw", w, outputs)
            return (w.view(-1, 1, 1, 1, 1) * outputs).sum(0)
        pairs = [(w, op) for w, op in zip(weights, self.listed()) if not made.skip_zeros or w != 0]
        terms = (self.term(op, x, w) for w, op in pairs)
        if made.sum == "sum":
            return sum(terms)
        total = 0.0 if made.sum == "start" else next(terms)
        for term in terms:
            if made.sum == "in place":
                total += term
            else:
                total = total + term
        return total

    def run(self, x: Tensor, weights: Tensor | list[Tensor] | list[float]) -> Tensor:
        if self.made.part == 1:
            return self.mixed(x, weights)
        C, part = x.shape[1], self.made.part
        y, rest = self.mixed(x[:, : C // part], weights), x[:, C // part :]
        if y.shape[2] != x.shape[2]:
            rest = nn.functional.max_pool2d(rest, 2, 2)
        y = torch.cat([y, rest], dim=1)
        N, _, H, W = y.shape
        return y.view(N, part, C // part, H, W).transpose(1, 2).reshape(N, C, H, W)

    def forward(self, x: Tensor, w=None, step=None, drop=0.0, *, weights=None) -> Tensor:
        if self.made.signature == "x":
            return self.run(x, self.alpha.softmax(0))
        y = self.run(x, weights if w is None else w)
        return y * 0.5 if step == 3 else y


class Node(nn.Module):
    """Adds the edges that enter it, and mixes them as the recipe says."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.made = made = recipe(seed)
        self.stem = nn.Conv2d(3, made.C, 1)
        self.edges = nn.ModuleList(
            MixedOp(made, names, seed + e) for e, names in enumerate(made.candidates)
        )
        self.alphas = nn.ParameterList(
            nn.Parameter(torch.randn(len(names))) for names in made.candidates
        )
        self.beta = nn.Parameter(torch.randn(len(self.edges)))

    def weights(self, alpha: Tensor) -> Tensor | list[Tensor] | list[float]:
        if self.made.weights == "one-hot":
            soft = alpha.softmax(0)
            hard = torch.zeros_like(soft).scatter(0, soft.argmax(0, keepdim=True), 1.0)
            return hard - soft.detach() + soft
        w = alpha.sigmoid() if self.made.weights == "sigmoid" else alpha.softmax(0)
        if self.made.skip_zeros:
            w = w * (torch.arange(len(w), device=w.device) % 3 > 0)
        if self.made.weights == "list":
            return list(w)
        return w.tolist() if self.made.weights == "floats" else w

    def call(self, edge: MixedOp, x: Tensor, alpha: Tensor) -> Tensor:
        w = self.weights(alpha)
        if self.made.signature == "x, w, step":
            return edge(x, w, 3)
        if self.made.signature == "x, w, drop=0.":
            return edge(x, w, drop=0.0)
        if self.made.signature == "x, *, weights":
            return edge(x, weights=w)
        return edge(x) if self.made.signature == "x" else edge(x, w)

    def forward(self, images: Tensor) -> Tensor:
        made, x = self.made, self.stem(images)
        if made.noise == "input" and self.training:
            x = x + 0.1 * torch.randn_like(x)
        terms = []
        for e, (edge, alpha) in enumerate(zip(self.edges, self.alphas)):
            chained = made.chained and made.stride == 1
            y = self.call(
                edge, sum(terms) if e and chained else torch.sin(e * x) if e else x, alpha
            )
            if made.drop_path in ("in place", "copy") and self.training:
                y = drop_path(y, made.drop_path)
            terms.append(self.beta[e] * y if made.edge_weights else y)
        y = sum(terms)
        if made.noise == "output" and self.training:
            y = y + 0.1 * torch.randn_like(y)
        return y


def build(seed: int) -> Node:
    torch.manual_seed(seed)
    return Node(seed).double()


def images(batch: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2)).double()


def accelerated(node: Node) -> Node:
    fused = copy.deepcopy(node)
    try:
        fastnas.accelerate(fused)
    except ValueError as error:  # a network in which nothing looks like candidates
        if "no module with a ModuleList" not in str(error):
            raise
    return fused


def wrong(seed: int) -> list[str]:
    """What an accelerated mixed op does not do as by its own forward."""
    eager = build(seed)
    fused = accelerated(eager)
    found = []
    for mode in ("training", *MODES, "training"):
        given, expected = (state_after(n, n, (), images(), mode) for n in (fused, eager))
        found += [f"{mode}: {text}" for text in differences(given, expected)[:2]]
    return found


def speedup(seed: int, seconds: float) -> float:
    """Time of a training step by its own forward, over that of the accelerated one, in turn.

    The better of two estimates, of the fastest steps and of the median round: on a busy machine
    either alone is up to a tenth off between two networks that are the same.
    """
    eager = build(seed).float()
    fused = accelerated(eager)
    x = images(32, 16).float().requires_grad_()
    times: dict[Node, list[float]] = {eager: [], fused: []}
    end = perf_counter() + seconds
    while len(times[fused]) < LEAST_STEPS or perf_counter() < end:
        for node in (eager, fused) if len(times[fused]) % 2 else (fused, eager):
            start = perf_counter()
            node(x).sum().backward()
            times[node].append(perf_counter() - start)
    rounds = [a / b for a, b in zip(times[eager][1:], times[fused][1:])]
    return max(min(times[eager]) / min(times[fused]), median(rounds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--times", action="store_true", help="measure; do not compare")
    given = parser.parse_args()
    failures, ratios = 0, []
    for seed in range(given.seed, given.seed + given.count):
        try:
            found = [] if given.times else wrong(seed)
        except Exception as error:  # one that raises is one that is wrong
            found = [f"{type(error).__name__}: {error}"]
        if given.times:
            ratios.append(speedup(seed, SECONDS))
            if ratios[-1] < SLOWEST:
                # Once more, and longer: a neighbour on the machine is no reason.
                ratios[-1] = max(ratios[-1], speedup(seed, 5 * SECONDS))
            found = [f"{ratios[-1]:.2f} of its speed"] if ratios[-1] < SLOWEST else []
        if found or given.count == 1:
            print(
                f"seed {seed}: {'; '.join(found) or 'right'}\n  {asdict(recipe(seed))}", flush=True
            )
        failures += bool(found)
    print(f"{failures} of {given.count} fail", end="")
    print(f"; median {median(ratios):.2f} of their own speed" if ratios else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
