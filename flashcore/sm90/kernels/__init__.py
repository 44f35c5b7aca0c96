"""The kernels. They import the CuTe DSL and never torch."""
