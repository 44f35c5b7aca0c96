"""Launches on torch tensors, on torch's current stream: the hot path on Hopper."""
