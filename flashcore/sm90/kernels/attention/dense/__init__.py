"""Dense attention, batched or packed: the kernel, and the parts that it alone has."""
