"""The trace parser: what it accepts, and one clear line for each thing it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashcore.replay.trace import Request, TraceError, TraceFormat, read_trace

SAMPLE = Path(__file__).parent / "data" / "sample_trace.jsonl"
BAILIAN = Path(__file__).parent / "data" / "sample_trace_16.jsonl"  # made up, in that form
GOOD = {"timestamp": 7, "input_length": 513, "output_length": 2, "hash_ids": [4, 5]}


def write(folder: Path, *lines: str | bytes | dict[str, Any]) -> Path:
    path = folder / "trace.jsonl"
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"\n".join(t if isinstance(t, bytes) else t.encode() for t in texts))
    return path


def test_sample_trace_is_read_whole() -> None:
    trace = read_trace(SAMPLE)
    assert len(trace.requests) == 6
    assert trace.out_of_order == 0
    assert trace.requests[2] == Request(5000.0, 700, 40, (20, 21))


def test_blocks_of_16_seconds_and_further_keys() -> None:
    trace = read_trace(BAILIAN, form=TraceFormat(block_tokens=16, time_unit="s"))
    assert [r.arrival_ms for r in trace.requests] == [0.0, 0.0, 1250.0, 1500.0]
    assert trace.out_of_order == 1
    assert trace.requests[3] == Request(1500.0, 160, 20, (1, 2, 3, 4, 5, 6, 7, 8, 13, 14))


def test_fewer_ids_than_blocks_of_that_size(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="at least 33 are needed, one for each block of 16 tokens"):
        read_trace(write(tmp_path, GOOD), form=TraceFormat(block_tokens=16))
    with pytest.raises(TraceError, match="timestamp is -1; it must be a number of seconds, 0 to"):
        read_trace(write(tmp_path, GOOD | {"timestamp": -1}), form=TraceFormat(time_unit="s"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"block_tokens": 0}, "block_tokens is 0; it must be 1 to 1073741824"),
        ({"time_unit": "us"}, "time_unit is 'us'; it must be 's' or 'ms'"),
    ],
)
def test_forms_that_are_none(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TraceFormat(**options)


def test_blank_lines_and_surplus_ids_are_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, "", GOOD | {"hash_ids": [4, 5, 6]}, "  ", GOOD, "")
    assert read_trace(path).requests == (Request(7.0, 513, 2, (4, 5)),) * 2


def test_lines_after_the_limit_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, GOOD, "no JSON")
    assert len(read_trace(path, limit=2).requests) == 2
    with pytest.raises(TraceError, match="line 3"):
        read_trace(path, limit=3)


def test_backward_timestamps_are_sorted_and_equal_ones_keep_their_order(tmp_path: Path) -> None:
    lines = [
        GOOD | {"timestamp": timestamp, "output_length": place}
        for place, timestamp in enumerate([5, 9, 2, 5.5, 5])
    ]
    trace = read_trace(write(tmp_path, *lines))
    assert [(r.arrival_ms, r.output_tokens) for r in trace.requests] == [
        (2.0, 2),
        (5.0, 0),
        (5.0, 4),
        (5.5, 3),
        (9.0, 1),
    ]
    assert trace.out_of_order == 2


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


BAD_LINES = [
    ("{", "not JSON (", "each line must be one JSON object"),
    (b"\xff\xfe", "not JSON (", "each line must be one JSON object"),
    ("[" * 100_000, "not JSON (", "each line must be one JSON object"),
    ("[1, 2]", "got [1, 2]", "each line must be a JSON object"),
    ("null", "got null", "each line must be a JSON object"),
    (without("timestamp"), "timestamp is missing", "hash_ids are needed"),
    (without("input_length"), "input_length is missing", "hash_ids are needed"),
    (without("output_length"), "output_length is missing", "hash_ids are needed"),
    (without("hash_ids"), "hash_ids is missing", "hash_ids are needed"),
    (GOOD | {"timestamp": -1}, "timestamp is -1", "0 to 2^53"),
    (GOOD | {"timestamp": "7"}, 'timestamp is "7"', "number of milliseconds"),
    (GOOD | {"timestamp": True}, "timestamp is true", "number of milliseconds"),
    (GOOD | {"timestamp": float("nan")}, "timestamp is NaN", "number of milliseconds"),
    (GOOD | {"timestamp": 10**400}, "timestamp is 1000", "0 to 2^53"),
    (GOOD | {"input_length": 0}, "input_length is 0", "integer number of tokens, 1 to"),
    (GOOD | {"input_length": -3}, "input_length is -3", "integer number of tokens, 1 to"),
    (GOOD | {"input_length": 5.0}, "input_length is 5.0", "integer number of tokens, 1 to"),
    (GOOD | {"input_length": None}, "input_length is null", "integer number of tokens, 1 to"),
    (GOOD | {"input_length": 2**31}, "input_length is 2147483648", "1 to 1073741824"),
    (GOOD | {"output_length": -1}, "output_length is -1", "integer number of tokens, 0 to"),
    (GOOD | {"output_length": True}, "output_length is true", "integer number of tokens, 0 to"),
    (GOOD | {"hash_ids": 4}, "hash_ids is 4", "a list of integers"),
    (GOOD | {"hash_ids": [4, "a"]}, 'hash_ids[1] is "a"', "it must be an integer"),
    (GOOD | {"hash_ids": [4]}, "hash_ids has 1 ids for input_length 513", "at least 2"),
]


@pytest.mark.parametrize(("line", "problem", "allowed"), BAD_LINES)
def test_bad_line_is_named(
    tmp_path: Path, line: str | bytes | dict[str, Any], problem: str, allowed: str
) -> None:
    path = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(TraceError) as raised:
        read_trace(path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 2: ")
    assert raised.value.line == 2
    assert problem in message
    assert allowed in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(TraceError, match="cannot read the trace: No such file") as raised:
        read_trace(missing)
    assert str(raised.value).startswith(str(missing))
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match="no request in it"):
        read_trace(write(tmp_path, "", "  "))
