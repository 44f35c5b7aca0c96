"""Paged attention over a work list: the kernel, and the parts that it alone has."""
