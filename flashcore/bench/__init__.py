"""Benchmarks: our kernels and their peers, timed in turn on the same tensors."""
