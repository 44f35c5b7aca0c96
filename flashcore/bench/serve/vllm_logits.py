"""Logits of vLLM's greedy steps, a part of the vocabulary of each, on tokens that are given.

vLLM has no way to force a request's tokens, but tells the log-probabilities of up to 128 tokens of
our choice beside the one that it took. So an engine decodes until it takes another token than the
one given, and is asked again with the given ones in its prompt: all but the first of the steps that
follow are decode steps again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flashcore.bench.serve.vllm_engine import VllmEngine

COLUMNS = 128  # vLLM's limit


def columns(vocab: int) -> list[int]:
    """The tokens whose logits are told: COLUMNS of them, or all, evenly over the vocabulary."""
    count = min(COLUMNS, vocab)
    return [place * vocab // count for place in range(count)]


def record_rows(
    engine: VllmEngine, prompts: Sequence[list[int]], steps: int, forced: list[list[int]] | None
) -> tuple[list[list[int]], np.ndarray[Any, Any]]:
    """Tokens of each prompt, and logits float32 [prompts, steps, columns] up to a constant a row:
    log-probabilities less their mean. forced: the tokens to continue with; None: the engine's."""
    from flashcore.bench.serve.vllm_engine import sampling_of

    wanted = columns(engine.options.shape.vocab)
    values = np.full((len(prompts), steps, len(wanted)), np.nan, dtype=np.float32)
    tokens: list[list[int]] = [[] for _ in prompts]
    while rows := [row for row, taken in enumerate(tokens) if len(taken) < steps]:
        found = engine.last_of(
            [prompts[row] + tokens[row] for row in rows],
            [
                sampling_of(steps - len(tokens[row]), streamed=False, logprob_token_ids=wanted)
                for row in rows
            ],
        )
        for row, answer in zip(rows, found, strict=True):
            output = answer.outputs[0]
            for token, told in zip(output.token_ids, output.logprobs, strict=True):
                place = len(tokens[row])
                values[row, place] = [told[column].logprob for column in wanted]
                tokens[row].append(token if forced is None else forced[row][place])
                if tokens[row][-1] != token:
                    break
    return tokens, values - values.mean(axis=-1, keepdims=True)
