"""The SGLang attention backend `flashcore`; see docs/sglang.md.

    register.py     the plugin: SGLang's entry point group `sglang.srt.plugins`
    backend.py      SGLang's AttentionBackend: forward modes, K/V writes, one call per layer
    support.py      what the model asks for, and whether the kernels serve it
    views.py        per forward: page tables from SGLang's slots, and the plan of them
    page_tables.py  slots to page tables, on the CPU and (page_table_kernel.py) on the GPU
    planners.py     the plan: kernels on Hopper, torch operators elsewhere
    padding.py      which sequences of a batch are real
    speculation.py  tree masks of speculative decoding
    compiled.py     the call of a layer as torch.compile sees it
    counters.py     what was read once and what per sequence, for SGLang's log
    kernels.py      the kernels that a model needs, to compile ahead of time
    warmup.py       each of them launched once, before the server serves

Nothing here is imported by `import flashcore`.
"""
