"""Attention: `dense`, `paged`, and the parts that both are put together from."""
