"""The path of devices without kernels of our own: the same plan, run with torch operators."""
