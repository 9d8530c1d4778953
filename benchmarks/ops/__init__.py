"""Holds the cases of the ops, one module of the op's name each."""
