"""SGLang's deterministic inference: prefill, decode and a prefix of the cache give the same bits.

Its lists of backends are extended by its own functions; plans are then batch-invariant
(docs/determinism.md). What would break the promise is refused when the server starts.
"""

from __future__ import annotations

import logging
from typing import Any

from flashcore.integrations.sglang.names import NAME
from flashcore.integrations.sglang.speculation import drafts_are_trees
from flashcore.serving.shapes import NotServed

logger = logging.getLogger(__name__)

_SETTING = "enable_deterministic_inference"

# Of sglang.srt.server_args: functions that extend the lists of backends that the mode accepts, and
# of those whose results are the same with a prefix cache, which it switches off for others.
ADDERS = (
    "add_deterministic_attention_backend_choices",
    "add_radix_supported_deterministic_attention_backend_choices",
)


def add_names() -> None:
    """Into SGLang's lists, once in a process: the caller sees to it."""
    from sglang.srt import server_args

    for adder in ADDERS:
        getattr(server_args, adder)([NAME])


def wanted(runner: Any) -> bool:
    """Whether a ModelRunner's server is deterministic, as its arguments were resolved: in a context
    since SGLang 0.5.23."""
    from sglang.srt import runtime_context

    get = getattr(runtime_context, "get_exec", None)
    resolved = None if get is None else getattr(get(), "deterministic", None)
    return any(getattr(x, _SETTING, False) for x in (resolved, runner.server_args))


def check(runner: Any) -> None:
    """Raise NotServed for what would give a token other bits in prefill and in decode."""
    if not wanted(runner):
        return
    args = runner.server_args
    target = getattr(args, "rl_on_policy_target", None)
    if target is not None:
        logger.warning(
            "flashcore attention: --rl-on-policy-target %s makes rollouts deterministic; the "
            "trainer's attention is another kernel with other bits, so log-probabilities of the "
            "two stay apart",
            target,
        )
    name = getattr(args, "attention_backend", None)
    of_prefill = getattr(args, "prefill_attention_backend", None) or name
    of_decode = getattr(args, "decode_attention_backend", None) or name
    if of_prefill != of_decode:
        raise NotServed(
            f"deterministic inference with {of_prefill} for prefill and {of_decode} for decode, "
            "whose bits differ",
            f"use --attention-backend {NAME} for both",
        )
    if drafts_are_trees(runner):
        raise NotServed(
            "deterministic inference with trees of drafts, whose tokens do not lie where they lie "
            "in their sequence",
            "use chains: EAGLE with --speculative-eagle-topk 1",
        )
