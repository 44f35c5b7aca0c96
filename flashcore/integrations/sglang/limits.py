"""The most that a forward of an SGLang server can have, as its scheduler and runners bound it."""

from __future__ import annotations

import math
from typing import Any

from flashcore.integrations.sglang import deterministic
from flashcore.integrations.sglang.support import parallel_ranks
from flashcore.serving.shapes import Limits, Model


def limits_of(runner: Any, model: Model) -> Limits:
    """Of one model runner.

    Sequences: one for each row of the request pool. Data parallelism and two-batch overlap pad
    graphs to a multiple of twice the ranks that share attention, and eager batches to less.
    """
    tokens = int(runner.req_to_token_pool.req_to_token.shape[1])
    step = padding_step(runner)
    batch = _padded(int(runner.req_to_token_pool.size) * _rows_of_request(runner), step)
    config = getattr(runner.server_args, "cuda_graph_config", None)
    graphs = getattr(getattr(config, "decode", None), "bs", None) or [batch]
    return Limits(
        batch=batch,
        tokens=tokens,
        queries=_padded(_prefill_tokens(runner, tokens), step) + batch * max(1, model.draft_tokens),
        graph_batch=min(batch, max(graphs)),
        step=step,
        batch_invariant=deterministic.wanted(runner),
    )


def padding_step(runner: Any) -> int:
    """Of what SGLang may pad batches of sequences, and new tokens, to a multiple."""
    return 2 * max(1, int(parallel_ranks(runner).attn_tp_size))


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step


def _rows_of_request(runner: Any) -> int:
    """A draft worker that drafts by trees from the target's cache has a row for each branch."""
    frozen = getattr(getattr(runner, "spec_algorithm", None), "is_frozen_kv_mtp", None)
    if not runner.is_draft_worker or frozen is None or not frozen():
        return 1
    return max(1, int(_setting(runner, "speculative_eagle_topk", "get_spec") or 1))


def _prefill_tokens(runner: Any, tokens: int) -> int:
    """New tokens of a prefill: a chunk, or where prompts are not cut the first prompt whatever its
    length, or shorter ones up to max_prefill_tokens. Decode steps mixed in are not counted.

    With dynamic chunks (pipeline parallelism) a chunk may grow; prefill graphs have sizes of their
    own.
    """
    chunk = int(_setting(runner, "chunked_prefill_size") or 0)
    most = int(_setting(runner, "max_prefill_tokens") or 0)
    if chunk <= 0:
        chunk = max(most, tokens)
    elif _setting(runner, "enable_dynamic_chunking"):
        chunk = max(most, math.ceil(1.25 * chunk))
    config = getattr(runner.server_args, "cuda_graph_config", None)
    graphs = getattr(getattr(config, "prefill", None), "bs", None) or [0]
    return max(chunk, *map(int, graphs))


def _setting(runner: Any, name: str, context: str = "get_schedule") -> Any:
    """A setting of the server as it was resolved: in a context since SGLang 0.5.23."""
    from sglang.srt import runtime_context

    get = getattr(runtime_context, context, None)
    bag = None if get is None else get()
    found = getattr(bag, name, None)
    return getattr(runner.server_args, name, None) if found is None else found
