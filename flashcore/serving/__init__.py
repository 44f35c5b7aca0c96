"""What serving engines share: page tables, plans within a server's limits, the kernels to prepare.

shapes.py       what a model asks of attention, and whether the kernels serve it
page_tables.py  token slots to page tables, on the CPU and (page_table_kernel.py) on the GPU
capacity.py     the most that a forward can ask, and the memory that plans for it take
planners.py     the plan: kernels on Hopper, torch operators elsewhere
views.py        per forward and kind of layer: page tables and the plan of them
counters.py     what was read once and what per sequence; faults, told at once
kernels.py      the kernels that a model needs, to compile ahead of time
warmup.py       each of them launched once, before the server serves
"""
