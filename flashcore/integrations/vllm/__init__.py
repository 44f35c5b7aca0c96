"""The vLLM attention backend of flashcore; see docs/vllm.md.

    register.py   the plugin: vLLM's entry point group `vllm.general_plugins`
    versions.py   what differs between the versions of vLLM that are served
    backend.py    vLLM's AttentionBackend: what is served, asked before a model is loaded
    support.py    the model and the server as vLLM says them, and what is not served
    groups.py     the layers that vLLM plans together: their tables, their plan
    memory.py     what all groups of an engine share, taken once and told
    metadata.py   vLLM's metadata of a forward and its builder
    impl.py       vLLM's AttentionImpl: K/V writes, one call per layer

What other engines need too is in `flashcore.serving`.

Nothing here is imported by `import flashcore`.
"""

from flashcore.integrations.vllm.register import register

__all__ = ["register"]
