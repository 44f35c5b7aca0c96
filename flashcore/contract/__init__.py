"""What host, kernels and tests agree on: names and their order, once; no torch, no DSL."""
