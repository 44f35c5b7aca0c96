"""Everything that is Hopper's: kernels in the CuTe DSL, their tuning, compiling and launching.

config/            what each kernel's code depends on, and the choice of it for a problem
kernels/           attention (dense, paged, and the parts they share), merge, planner, pager
compile/           config in, compiled kernel out; no tensors, no GPU
families.py        the families of kernels, as `flashcore.jit` caches them
shipped.py         those that are compiled ahead of time and judged by the static gates
launch/            tensors in, launches out
device_planner.py  plans made by kernels alone
device_pager.py    layouts made by kernels alone
available.py       whether a device runs them
"""
