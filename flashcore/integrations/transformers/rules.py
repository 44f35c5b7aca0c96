"""What a mask function of transformers allows, read from the function instead of evaluated.

transformers builds the mask of a layer from small functions of (batch, head, query, key) positions:
causal, a window, packed sequences, and what a model or a user adds. Evaluating them takes a dense
[batch, queries, keys] mask. They are closures with names of their own, so their meaning is found
from name and captured values; a function that is not known here is refused. `check_meanings` makes
sure, once, that the names mean what they are taken for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

_MODULE = "transformers.masking_utils"
_INNER = ".<locals>.inner_mask"


@dataclass(frozen=True)
class Rules:
    """Which keys a query may see; positions count from the start of the sequence."""

    causal: bool = False  # none after the query
    left: int = -1  # none further before the query than this; -1: no bound
    right: int = -1  # nor further behind it
    chunk: int | None = None  # only keys of the query's own chunk of so many positions
    segments: torch.Tensor | None = None  # int [batch, queries]: only keys of the query's segment


def read_rules(mask_function: Callable[..., Any]) -> Rules:
    """The rules that `mask_function` states, or a NotImplementedError that says what it is."""
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__)
    if getattr(mask_function, "__module__", None) != _MODULE:
        raise _unknown(f"a function of its own, {name}")
    captured = _captured(mask_function)
    if name == "causal_mask_function":
        return Rules(causal=True)
    if name == "bidirectional_mask_function":
        return Rules()
    if name == "and_masks.<locals>.and_mask":
        found = Rules()
        for part in captured["mask_functions"]:
            found = _both(found, read_rules(part))
        return found
    if name == f"sliding_window_overlay{_INNER}":
        return Rules(left=_window(captured) - 1)
    if name == f"sliding_window_bidirectional_overlay{_INNER}":
        return Rules(left=_window(captured), right=_window(captured))
    if name in (f"chunked_overlay{_INNER}", f"_legacy_chunked_overlay{_INNER}"):
        return Rules(chunk=int(captured["chunk_size"]))
    if name == f"packed_sequence_mask_function{_INNER}":
        return Rules(segments=captured["packed_sequence_mask"])
    if name == f"remap_positions_for_packed_sequence{_INNER}":
        # Positions that restart with each segment, and grow by one within it: the distance of two
        # tokens of a segment stays what it is, and tokens of others are masked elsewhere.
        return read_rules(captured["mask_function"])
    if name == "or_masks.<locals>.or_mask":
        raise _unknown("a union of masks, as for prefixes or images whose tokens see each other")
    raise _unknown(name)


def check_meanings(masking_utils: ModuleType) -> None:
    """Raises RuntimeError where a mask function of this transformers means something else."""
    packed = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    makers: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("sliding_window_causal_mask_function", (3,)),
        ("sliding_window_bidirectional_mask_function", (2,)),
        ("chunked_causal_mask_function", (3, torch.zeros(1, dtype=torch.int64))),
        ("packed_sequence_mask_function", (packed,)),
    )
    functions = [masking_utils.causal_mask_function]
    for name in ("bidirectional_mask_function",):
        if hasattr(masking_utils, name):
            functions.append(getattr(masking_utils, name))
    for name, arguments in makers:
        if hasattr(masking_utils, name):
            functions.append(getattr(masking_utils, name)(*arguments))
    functions.append(masking_utils.and_masks(*functions[::3]))
    positions = torch.arange(packed.shape[1])
    zero = torch.zeros((), dtype=torch.int64)
    for function in functions:
        allowed = function(zero, zero, positions[:, None], positions[None, :])
        expected = _evaluate(read_rules(function), positions)
        if not torch.equal(allowed.expand_as(expected), expected):
            raise RuntimeError(
                f"transformers' {function.__qualname__} does not mean what flashcore takes it for; "
                "use the versions of transformers that docs/transformers.md names"
            )


def _evaluate(rules: Rules, positions: torch.Tensor) -> torch.Tensor:
    """bool [queries, keys]: the rules for one sequence whose queries are its keys."""
    query, key = positions[:, None], positions[None, :]
    allowed = torch.ones(len(positions), len(positions), dtype=torch.bool)
    if rules.causal:
        allowed &= key <= query
    if rules.left >= 0:
        allowed &= key >= query - rules.left
    if rules.right >= 0:
        allowed &= key <= query + rules.right
    if rules.chunk is not None:
        allowed &= key // rules.chunk == query // rules.chunk
    if rules.segments is not None:
        allowed &= rules.segments[0][:, None] == rules.segments[0][None, :]
    return allowed


def _both(a: Rules, b: Rules) -> Rules:
    """What both allow."""
    if a.segments is not None and b.segments is not None:
        raise _unknown("two packings at once")
    chunks = {rules.chunk for rules in (a, b)} - {None}
    if len(chunks) > 1:
        raise _unknown("two sizes of chunks at once")
    return replace(
        a,
        causal=a.causal or b.causal,
        left=_closer(a.left, b.left),
        right=_closer(a.right, b.right),
        chunk=chunks.pop() if chunks else None,
        segments=b.segments if a.segments is None else a.segments,
    )


def _closer(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _window(captured: dict[str, Any]) -> int:
    window = int(captured["sliding_window"])
    if window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {window}")
    return window


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure captured, by name."""
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return dict(
        zip(code.co_freevars if code else (), (c.cell_contents for c in cells), strict=True)
    )


def _unknown(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"attention mask: {what} is not among the masks of attn_implementation='flashcore', which "
        "are causal or bidirectional attention, windows, padding and packed sequences; use "
        "attn_implementation='sdpa'"
    )
