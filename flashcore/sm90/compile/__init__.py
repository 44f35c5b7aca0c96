"""Compile functions, one for each family: config in, compiled kernel out, no tensors."""
