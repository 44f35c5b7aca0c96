"""What any family of kernels needs: compiled once a machine, cached, inspected, loaded."""
