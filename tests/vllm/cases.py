"""Requests for every kind of forward: shared prefixes, private ones, lengths around block ends."""

from __future__ import annotations

from tests.vllm.batches import Request


def decode() -> list[Request]:
    """Two families that share, one request that shares less of it, two alone."""
    return [
        Request(300, 1, shared=256),
        Request(259, 1, shared=256),
        Request(256, 1, shared=256),
        Request(200, 1, shared=128),
        Request(140, 1, shared=128, family=1),
        Request(128, 1, shared=128, family=1),
        Request(77, 1),
        Request(0, 1),
    ]


def prefill() -> list[Request]:
    """Chunks on a shared cached prefix, on a private one, and from nothing."""
    return [
        Request(256, 40, shared=256),
        Request(260, 3, shared=256),
        Request(130, 129, shared=128),
        Request(63, 2),
        Request(0, 65),
        Request(0, 1),
    ]


def mixed() -> list[Request]:
    """Decode steps first, as vLLM sorts them, and chunks."""
    return [*decode()[:4], *prefill()[:3], *prefill()[4:]]


def verify(new: int) -> list[Request]:
    """As many drafts for each and the token before them; drafts that cross a block's end."""
    return [
        Request(256, new, shared=256),
        Request(318, new, shared=256),
        Request(127, new, shared=64),
        Request(13, new),
    ]
