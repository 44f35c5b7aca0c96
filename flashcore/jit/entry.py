"""The file format of a cache entry: a shared object with a checked footer behind it.

    ELF shared object | JSON facts | length of the JSON (8 bytes) | sha256 of all before | magic

The dynamic loader ignores what stands behind the ELF image, so one file holds code and facts and is
published by one rename. The digest matters more than it seems: opening a truncated shared object
does not fail, it kills the process when a missing page is touched.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAGIC = b"flshcor1"
_TAIL_BYTES = 8 + 32 + len(_MAGIC)


class CorruptEntryError(ValueError):
    """A cache entry that is truncated, altered or of another format."""


@dataclass(frozen=True)
class Entry:
    """A decoded cache entry."""

    shared_object: bytes
    facts: dict[str, Any]  # symbol, key, target, dynamic_smem_bytes


def pack(shared_object: bytes, facts: dict[str, Any]) -> bytes:
    """Bytes of a cache entry."""
    text = json.dumps(facts, sort_keys=True).encode()
    body = shared_object + text + len(text).to_bytes(8, "little")
    return body + hashlib.sha256(body).digest() + _MAGIC


def unpack(data: bytes) -> Entry:
    """Check and decode. Raises CorruptEntryError for anything `pack` did not write."""
    if len(data) < _TAIL_BYTES or not data.endswith(_MAGIC):
        raise CorruptEntryError("no footer")
    body, digest = data[: -len(_MAGIC) - 32], data[-len(_MAGIC) - 32 : -len(_MAGIC)]
    if hashlib.sha256(body).digest() != digest:
        raise CorruptEntryError("the checksum does not match")
    length = int.from_bytes(body[-8:], "little")
    facts: dict[str, Any] = json.loads(body[-8 - length : -8])
    return Entry(body[: -8 - length], facts)


def read_entry(path: Path) -> Entry | None:
    """The valid entry at `path`, None when it is missing, corrupt or another kernel's."""
    try:
        found = unpack(path.read_bytes())
    except (FileNotFoundError, CorruptEntryError):
        return None
    # A file renamed by hand has a valid checksum and the wrong code.
    return found if found.facts.get("key") == path.stem else None
