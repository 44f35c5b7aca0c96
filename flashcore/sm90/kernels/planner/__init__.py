"""The planner as kernels: `kernel` launches the steps, each in a module of its own."""
