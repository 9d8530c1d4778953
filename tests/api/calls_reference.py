"""Valid calls of the functions of fastnas.reference; its modules are those of fastnas.nn."""

from __future__ import annotations

import torch
from wrong_values import Argument, Call, choice, flag, instance, integer, number, one_of, sequence
from wrong_values import tensor as any_tensor

from fastnas import reference
from fastnas.reference import SkipNoise
from fastnas.spaces import Edge, EdgeTable, EdgeTerm

TABLE = EdgeTable(1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("skip", 0),)),))


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Argument:
    """The specification is eager torch, which takes every dtype, layout and device."""
    return any_tensor(*shape, dtype=dtype, any_kind=True)


CHANNELS = 4

terms = sequence(tensor(2, 3), 2).plus(text="abc")
images = sequence(tensor(2, CHANNELS, 4, 4), 2).plus(text="abc")
weights = tensor(2)
noisy = one_of(lambda: (0,), **{"None": None, "a number": 1, "text": "0", "past the end": (2,),
               "negative": (-3,), "halves": (0.5,), "twice": (0, 0)})  # fmt: skip
form = choice("gaussian_additive")
level = tensor(2, dtype=torch.float64)
rng = tensor(2, dtype=torch.int64)
normed = one_of(lambda: (True, False), **{"None": None, "a number": 1, "text": "ab", "one":
                (True,), "three": (True,) * 3, "numbers": (1, 0)})  # fmt: skip
eps = number(1e-5, 0.0)
noise = instance(SkipNoise)
nodes = sequence(integer(2, 1), 2, fixed=True)
topology = choice("top2")
tau = number(1.0, above=0.0)
alpha, beta = tensor(4, 3), tensor(4)
noise_of = {"noisy": noisy, "form": form, "level": level, "rng": rng}
statistics = one_of(
    lambda: (torch.zeros(1, CHANNELS), torch.ones(1, CHANNELS)),
    **{"a number": 1, "text": "ab", "a tensor": torch.zeros(2), "one": (torch.zeros(1, CHANNELS),),
       "lists": ([0.0] * 4, [1.0] * 4), "too few channels": (torch.zeros(1, 2), torch.ones(1, 2))},
)  # fmt: skip
flags = one_of(lambda: (True, True), **{"None": None, "a number": 1, "text": "ab", "one": (True,)})

CALLS = [
    Call("SkipNoise", SkipNoise, {
        "kind": choice("gaussian"), "mixture": choice("additive"),
        "mean": number(0.0, optional=True), "factor": number(0.2, 0.0)}),
    Call("SkipNoise", lambda amplitude: SkipNoise().level(amplitude), {
        "amplitude": number(1.0)}, "SkipNoise.level"),
    Call("cosine_decay", reference.cosine_decay, {
        "epoch": integer(0, 0), "epochs": integer(10, 1)}),
    Call("skip_noise", reference.skip_noise, {
        "x": any_tensor(2, 3, any_shape=True).but("meta", "sparse", "complex"), "noise": noise,
        "amplitude": number(1.0)}),
    Call("standard_deviations", reference.standard_deviations, {
        "x": terms, "noisy": noisy, "form": form}),
    Call("mixed_sum", reference.mixed_sum, {"x": terms, "w": weights, **noise_of}),
    Call("mixed_sum_grads", reference.mixed_sum_grads, {
        "dy": tensor(2, 3), "x": terms.but("empty"), "w": weights}),
    Call("batch_norms", reference.batch_norms, {
        "z": images, "normed": normed, "eps": eps, "statistics": statistics}),
    Call("mixed_norm_sum", reference.mixed_norm_sum, {
        "z": images, "w": weights, "normed": normed, "eps": eps, "statistics": statistics}),
    Call("terms_read", reference.terms_read, {
        "normed": normed, "training": flag(True), "needs_dz": flags, "needs_dw": flag(False)}),
    Call("mixed_norm_sum_grads", reference.mixed_norm_sum_grads, {
        "dy": tensor(2, CHANNELS, 4, 4), "z": images.but("with None"), "w": weights,
        "normed": normed, "statistics": statistics, "eps": eps, "training": flag(True),
        "needs_dz": flags, "needs_dw": flag(True)}),
    Call("relu_conv_bn", reference.relu_conv_bn, {
        "x": tensor(2, CHANNELS, 4, 4).but("a larger first axis"),
        "params": sequence(tensor(CHANNELS, CHANNELS, 1, 1), 1).called("stats"),
        "stats": tensor(2, CHANNELS), "training": flag(True), "eps": eps}),
    Call("mixed_edges", reference.mixed_edges, {
        "x": sequence(tensor(2, CHANNELS, 4, 4).but("a larger first axis"), 1, fixed=True),
        "w": tensor(1, 1),
        "params": one_of(list, **{"None": None, "a number": 1, "one more": [torch.zeros(1)]}),
        "table": instance(lambda: TABLE), "training": flag(True), "eps": eps,
        "stats": tensor(0, 2, CHANNELS).but("a larger first axis")}),
    Call("logits_per_node", reference.logits_per_node, {
        "nodes": nodes.but("one more", "one less", "empty"), "topology": topology}),
    Call("sample_paths", reference.sample_paths, {
        "alpha": alpha, "beta": beta, "nodes": nodes, "topology": topology, "tau": tau, "rng": rng,
        "paths": integer(2, 1)}),
    Call("sample_paths_grads", reference.sample_paths_grads, {
        "alpha": alpha, "beta": beta, "nodes": nodes, "topology": topology, "tau": tau, "rng": rng,
        "op": tensor(1, 4, dtype=torch.int64).called("dweight"), "dweight": tensor(1, 4)}),
    Call("gdas_sample", reference.gdas_sample, {
        "alpha": tensor(4, 3).but("a larger first axis"), "tau": tau}),
    Call("rome_sample", reference.rome_sample, {
        "alpha": alpha, "beta": beta, "nodes": nodes, "tau": tau, "topology": topology}),
]  # fmt: skip
