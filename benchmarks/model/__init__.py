"""Counts what the CUDA kernels cost on a GPU, from their machine code, without one."""
