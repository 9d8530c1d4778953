"""Benchmarks fastnas: harness, op cases, search cases. Installed as fastnas.benchmarks."""
