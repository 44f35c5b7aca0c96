"""Read and check a request trace in Mooncake's format.

One JSON object a line: `timestamp`, `input_length` and `output_length` (tokens) and `hash_ids`, one
id for each block of input tokens. Equal ids mean equal prompts up to and including that block.
Mooncake's timestamps are milliseconds and its blocks 512 tokens; Qwen-Bailian's traces have
seconds, 16 tokens and further keys, which are ignored.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import BinaryIO

HASH_BLOCK_TOKENS = 512  # Mooncake's
MS_PER_UNIT = {"ms": 1.0, "s": 1000.0}
STANDARD_INPUT = "-"
# Lengths travel as int32 in the layout; one page of slack keeps sums of them in range.
MAX_LENGTH_TOKENS = 2**30
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Request:
    """One request: arrival in ms, prompt and output in tokens, one id per block of the prompt."""

    arrival_ms: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, and how many of them stood out of that order in the file."""

    name: str
    requests: tuple[Request, ...]
    out_of_order: int


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """What a trace does not say of itself; a ValueError names the setting that is out of range."""

    block_tokens: int = HASH_BLOCK_TOKENS  # input tokens of one hash id
    time_unit: str = "ms"  # of timestamps

    def __post_init__(self) -> None:
        if not 1 <= self.block_tokens <= MAX_LENGTH_TOKENS:
            raise ValueError(
                f"block_tokens is {self.block_tokens}; it must be 1 to {MAX_LENGTH_TOKENS}"
            )
        if self.time_unit not in MS_PER_UNIT:
            raise ValueError(f"time_unit is {self.time_unit!r}; it must be 's' or 'ms'")


class TraceError(ValueError):
    """A trace that cannot be used; the message names the file, the line and what is allowed."""

    def __init__(self, path: str, line: int | None, problem: str) -> None:
        where = path if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {problem}")
        self.line = line


def read_trace(
    path: str | PathLike[str],
    limit: int | None = None,
    form: TraceFormat = TraceFormat(),
) -> Trace:
    """Read the first `limit` requests of a trace (all of them when None), sorted by arrival.

    A path of "-" is standard input. Blank lines are skipped. Timestamps may go backwards, as in
    logs merged from several front ends: the requests are sorted, equal times staying in file order.
    Lines after the first `limit` requests are not read, so not checked either.

    Raises TraceError for a file that cannot be read, holds no request, or has a bad line.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    requests: list[Request] = []
    try:
        with _opened(path) as lines:
            for number, line in _filled_lines(lines):
                if limit is not None and len(requests) == limit:
                    break
                requests.append(_parse_line(name, number, line, form))
    except OSError as error:
        reason = error.strerror or str(error)
        raise TraceError(name, None, f"cannot read the trace: {reason}") from error
    if not requests:
        raise TraceError(name, None, "no request in it; at least one JSON object is needed")
    backwards = sum(later.arrival_ms < earlier.arrival_ms for earlier, later in pairwise(requests))
    requests.sort(key=lambda request: request.arrival_ms)
    return Trace(name, tuple(requests), backwards)


def _opened(path: str | PathLike[str]) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if path == STANDARD_INPUT else open(path, "rb")


def _filled_lines(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _parse_line(path: str, number: int, line: bytes, form: TraceFormat) -> Request:
    try:
        record = json.loads(line)
    # ValueError covers bad JSON, bad UTF-8 and numbers of too many digits.
    except (ValueError, RecursionError) as error:
        detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise TraceError(
            path, number, f"not JSON ({detail}); each line must be one JSON object"
        ) from error
    if not isinstance(record, dict):
        raise TraceError(path, number, f"got {_shown(record)}; each line must be a JSON object")
    try:
        return _request_from(record, form)
    except _BadField as bad:
        raise TraceError(path, number, str(bad)) from None


class _BadField(ValueError):
    """What is wrong with one field; the caller adds the file and the line."""


def _request_from(record: dict[str, object], form: TraceFormat) -> Request:
    arrival = _field(record, "timestamp")
    if (
        isinstance(arrival, bool)
        or not isinstance(arrival, int | float)
        or not (0 <= arrival < math.inf)
        or arrival > 2**53
    ):
        unit = "seconds" if form.time_unit == "s" else "milliseconds"
        raise _BadField(f"timestamp is {_shown(arrival)}; it must be a number of {unit}, 0 to 2^53")
    input_tokens = _length(record, "input_length", least=1)
    output_tokens = _length(record, "output_length", least=0)
    hash_ids = _hash_ids(record, input_tokens, form.block_tokens)
    return Request(arrival * MS_PER_UNIT[form.time_unit], input_tokens, output_tokens, hash_ids)


def _field(record: dict[str, object], name: str) -> object:
    if name not in record:
        raise _BadField(
            f"{name} is missing; timestamp, input_length, output_length and hash_ids are needed"
        )
    return record[name]


def _length(record: dict[str, object], name: str, least: int) -> int:
    value = _field(record, name)
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not least <= value <= MAX_LENGTH_TOKENS
    ):
        raise _BadField(
            f"{name} is {_shown(value)}; "
            f"it must be an integer number of tokens, {least} to {MAX_LENGTH_TOKENS}"
        )
    return value


def _hash_ids(record: dict[str, object], input_tokens: int, block_tokens: int) -> tuple[int, ...]:
    ids = _field(record, "hash_ids")
    if not isinstance(ids, list):
        raise _BadField(f"hash_ids is {_shown(ids)}; it must be a list of integers")
    for position, value in enumerate(ids):
        if isinstance(value, bool) or not isinstance(value, int):
            raise _BadField(f"hash_ids[{position}] is {_shown(value)}; it must be an integer")
    needed = -(-input_tokens // block_tokens)
    if len(ids) < needed:
        raise _BadField(
            f"hash_ids has {len(ids)} ids for input_length {input_tokens}; at least {needed} "
            f"are needed, one for each block of {block_tokens} tokens"
        )
    return tuple(ids[:needed])


def _shown(value: object) -> str:
    """The value as JSON, cut short so that an error stays one readable line."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
