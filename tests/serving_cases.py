"""Requests of an engine for every mode: shared prefixes, private ones, lengths around page ends."""

from __future__ import annotations

from dataclasses import dataclass

PAGE_SIZES = (1, 16, 64, 128)


@dataclass(frozen=True)
class Request:
    """prefix: cached tokens, of which `shared` are those of `group`; new: those of this forward."""

    prefix: int
    new: int
    shared: int = 0
    group: int = 0


def decode() -> list[Request]:
    """Two groups that share, one request that shares less of it, two alone."""
    return [
        Request(300, 1, shared=256),
        Request(259, 1, shared=256),
        Request(256, 1, shared=256),
        Request(200, 1, shared=128),
        Request(140, 1, shared=128, group=1),
        Request(128, 1, shared=128, group=1),
        Request(77, 1),
        Request(0, 1),
    ]


def extend() -> list[Request]:
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
    """Chunks and decode steps side by side."""
    return [*extend()[:3], *decode()[:3], *extend()[4:]]


def verify(draft_tokens: int) -> list[Request]:
    """As many draft tokens for each; drafts that cross a page's end."""
    return [
        Request(256, draft_tokens, shared=256),
        Request(318, draft_tokens, shared=256),
        Request(127, draft_tokens, shared=64),
        Request(13, draft_tokens),
    ]
