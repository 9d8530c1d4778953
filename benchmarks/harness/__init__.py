"""Holds what all benchmarks share: verification, timing, memory, tables and pictures."""
