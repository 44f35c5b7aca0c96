"""Answers with their log-probabilities, and how far two backends' lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashcore.bench.serve.running import RunningEngine

# One request's answer: `tokens`, `output` their log-probabilities, `prompt` those of the prompt's
# tokens but the first (where asked for), `cached` tokens of the prompt found in the cache, the
# draft's `accepted` tokens a step, `retractions` for want of memory (both None where the engine
# does not tell), `ended`: "length", "abort" or another reason; None while it goes on.
Answer = dict[str, Any]


def ask(engine: RunningEngine, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Answers of each round: `prompts` sent at once, `output` tokens of each, greedily.

    `prompt` asks for the prompts' log-probabilities as well, `flush` empties the cache before.
    """
    found = []
    for one in rounds:
        if one.get("flush"):
            engine.flush()
        wanted = {"prompt": bool(one.get("prompt")), **one.get("options", {})}
        found.append(engine.answers(one["prompts"], one["output"], **wanted))
    return {"rounds": found}


def distance(
    ours: Sequence[Sequence[Answer]], theirs: Sequence[Sequence[Answer]]
) -> dict[str, Any]:
    """How far the answers to the same rounds lie apart.

    `prompt_difference` and `decode_difference` are the means of |log-probability - other's|;
    decoded tokens count up to and with the first that differs, where each side gives its own
    favourite's. `mean_difference` is the larger of the two, so that thousands of prompt tokens do
    not hide a wrong decode. `tokens` were compared, `same_tokens` of them alike; `not_finite`
    counts values that are not, and answers of unequal length.
    """
    prompt: list[float] = []
    decode: list[float] = []
    same = tokens = unequal = 0
    for round_a, round_b in zip(ours, theirs, strict=True):
        for a, b in zip(round_a, round_b, strict=True):
            unequal += any(len(a[key]) != len(b[key]) for key in ("prompt", "tokens", "output"))
            pairs = zip(a["prompt"], b["prompt"], strict=False)
            prompt += [abs(p - q) for p, q in pairs if p is not None and q is not None]
            for place, (first, second) in enumerate(zip(a["tokens"], b["tokens"], strict=False)):
                tokens += 1
                decode.append(abs(a["output"][place] - b["output"][place]))
                if first != second:
                    break
                same += 1
    not_finite = unequal + sum(not math.isfinite(value) for value in (*prompt, *decode))
    parts = {"prompt_difference": _mean(prompt), "decode_difference": _mean(decode)}
    means = [mean for mean in parts.values() if mean is not None]
    return {
        "mean_difference": math.inf if not_finite or not means else max(means),
        **parts,
        "same_tokens": same,
        "tokens": tokens,
        "not_finite": not_finite,
    }


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
