"""Specifies every op in eager torch, slow and safe in fp64. Imports only fastnas.spaces."""

from fastnas.reference.mixed_edges import mixed_edges
from fastnas.reference.mixed_norm_sum import (
    batch_norms,
    mixed_norm_sum,
    mixed_norm_sum_grads,
    terms_read,
)
from fastnas.reference.mixed_sum import (
    mixed_sum,
    mixed_sum_grads,
    standard_deviations,
    weighted_sum,
)
from fastnas.reference.nb201_search import (
    SEARCH_NETWORKS,
    SINGLE_PATH_NETWORKS,
    NB201Cell,
    NB201SearchNetwork,
    NB201SinglePathNetwork,
)
from fastnas.reference.relu_conv_bn import relu_conv_bn
from fastnas.reference.sample_paths import (
    TOPOLOGIES,
    logits_per_node,
    sample_paths,
    sample_paths_grads,
)
from fastnas.reference.search_network import (
    Cell,
    Dag,
    MixedOp,
    SearchNetwork,
    Weights,
    search_step,
)
from fastnas.reference.single_path import (
    HardWeights,
    SinglePathNetwork,
    gdas_sample,
    rome_sample,
    single_path_step,
)
from fastnas.reference.skip_noise import SkipNoise, cosine_decay, skip_noise

__all__ = [
    "SEARCH_NETWORKS",
    "SINGLE_PATH_NETWORKS",
    "TOPOLOGIES",
    "Cell",
    "Dag",
    "HardWeights",
    "MixedOp",
    "NB201Cell",
    "NB201SearchNetwork",
    "NB201SinglePathNetwork",
    "SearchNetwork",
    "SinglePathNetwork",
    "SkipNoise",
    "Weights",
    "batch_norms",
    "cosine_decay",
    "gdas_sample",
    "logits_per_node",
    "mixed_edges",
    "mixed_norm_sum",
    "mixed_norm_sum_grads",
    "mixed_sum",
    "mixed_sum_grads",
    "relu_conv_bn",
    "rome_sample",
    "sample_paths",
    "sample_paths_grads",
    "search_step",
    "single_path_step",
    "skip_noise",
    "standard_deviations",
    "terms_read",
    "weighted_sum",
]
