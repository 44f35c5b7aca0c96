"""`attn_implementation="flashcore"` for models of Hugging Face transformers.

    import flashcore.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flashcore")

Importing this package registers the name; `register()` may be called again, and does nothing then.

    mask function ─► rules.py: what it allows ─► spans.py: which rows of which sequence ─┐
    attention call ─► attention.py ──────────────────────────────────────────────────────┴─► kernels

A mask that is not causal or bidirectional attention, perhaps with a window, over padded or packed
sequences raises one error: nothing is computed through a dense mask.
"""

from flashcore.integrations.transformers.register import NAME, register

__all__ = ["NAME", "register"]

register()
