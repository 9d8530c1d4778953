"""Holds choices, mixed op, cell and search network on fused ops, and the network of a genotype."""

from fastnas.nn.arch_parameters import ArchParameters
from fastnas.nn.cell import Cell, SearchNetwork
from fastnas.nn.choice import Choice
from fastnas.nn.derive import derived_network
from fastnas.nn.eval_network import EvalNetwork, count_parameters
from fastnas.nn.input_choice import InputChoice
from fastnas.nn.logits import split_parameters
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.mobilenet import MobileNetEvalNetwork, MobileNetSearchNetwork
from fastnas.nn.nb201 import NB201Cell, NB201SearchNetwork
from fastnas.nn.nb201_eval import NB201EvalNetwork
from fastnas.nn.networks import EVAL_NETWORKS, SEARCH_NETWORKS
from fastnas.nn.paths import Paths
from fastnas.nn.run import NoiseDraw

__all__ = [
    "EVAL_NETWORKS",
    "SEARCH_NETWORKS",
    "ArchParameters",
    "Cell",
    "Choice",
    "EvalNetwork",
    "InputChoice",
    "MixedOp",
    "MobileNetEvalNetwork",
    "MobileNetSearchNetwork",
    "NB201Cell",
    "NB201EvalNetwork",
    "NB201SearchNetwork",
    "NoiseDraw",
    "Paths",
    "SearchNetwork",
    "count_parameters",
    "derived_network",
    "split_parameters",
]
