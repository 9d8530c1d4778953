"""Holds the Triton kernels, one file per op, installed as fastnas.kernels."""
