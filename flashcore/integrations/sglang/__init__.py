"""The SGLang attention backend `flashcore`; see docs/sglang.md.

    register.py     the plugin: SGLang's entry point group `sglang.srt.plugins`
    adjust.py       defaults and lists of names in SGLang that depend on a backend's name
    hooks.py        puts them into SGLang's steps
    backend.py      SGLang's AttentionBackend: forward modes, K/V writes, one call per layer
    support.py      what the model asks for, as SGLang says it, and what is not served
    padding.py      which sequences of a batch are real
    speculation.py  tree masks of speculative decoding
    compiled.py     the call of a layer as torch.compile sees it

What other engines need too is in `flashcore.serving`.

Nothing here is imported by `import flashcore`. `flashcore.integrations.sglang.register()` is for
launchers that read SGLang's arguments before its plugins are loaded.
"""

from flashcore.integrations.sglang.register import NAME, register

__all__ = ["NAME", "register"]
