"""The planner's and the pager's kernels step by step in numpy, in place of the GPU.

They prove the algorithm: that these steps, on this scratch, in any order that the kernels allow,
make the plan that the host makes. They do not prove the kernels, which are other code: that is what
tests/gpu does. Whoever changes a step of a kernel changes it here too.
"""
