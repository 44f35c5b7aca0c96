"""A long run of mixed load on one engine: nothing may fail, grow, or cease to be finite.

Requests arrive at random. Most share one of a few prefixes, which are replaced as time goes by, so
that the cache evicts them; others are samples of one prompt, unrelated prompts, later turns of a
conversation, and now and then one that fills the context. Some are aborted on the way. A fixed
prompt comes again and again: its log-probabilities must stay what they were at the start.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.hicache import read_counts
from flashcore.bench.serve.running import RunningEngine
from flashcore.bench.serve.workloads import RESERVED_IDS

GRAPH_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MAX_HOST_GROWTH_MIB = 256
MAX_DEVICE_GROWTH_MIB = 64
MAX_CANARY_DRIFT = 0.5  # of a log-probability; logits have a deviation of about 3
# With a hierarchical cache: so many prefixes that most are on the host when they are asked for.
HICACHE_PREFIXES = 48
HICACHE_RATIO = 4.0  # of the host's pool to the GPU's
HICACHE_LAYOUTS = {
    "kernel": ("page_first", "layer_first"),
    "direct": ("page_first_direct", "layer_first"),
}
HICACHE_BAR = 1000  # evictions and loads each that make a soak worth its name
_OUTSTANDING = 96  # requests at a time, half as many again as may run
_SAMPLE_EVERY_S = 5.0
_TOLD_EVERY_S = 60.0
_CANARY_EVERY_S = 10.0
_CANARY_TOKENS = 16
_LONG_EVERY_S = 120.0
_NEW_PREFIX_EVERY_S = 10.0
_DRAIN_S = 240.0  # for what is running when the time is up
_KINDS = {"shared": 60, "samples": 15, "unrelated": 15, "turn": 10}


@dataclass
class Record:
    """What a soak has seen so far."""

    requests: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    canary_drift: float = 0.0
    memory: list[tuple[float, float, float | None]] = field(default_factory=list)  # s, MiB, MiB

    def line(self) -> str:
        """Where it stands, for the engine's log."""
        seconds, host, device = self.memory[-1]
        last = f"; the last: {self.errors[-1]}" if self.errors else ""
        return (
            f"soak: {seconds / 60:.0f} min, {sum(self.requests.values())} requests, "
            f"{self.tokens} tokens, {host:.0f} MiB on the host, {device} on the GPU, "
            f"{len(self.errors)} errors{last}"
        )


class Traffic:
    """Draws requests: (kind, prompts, output tokens). The same for the same seed.

    Prefixes are at most an eighth of the longest sequence; `prefixes` of them live at a time.
    """

    def __init__(self, vocab: int, longest: int, seed: int, prefixes: int = 4) -> None:
        self._random = random.Random(seed)
        self._vocab, self._longest = vocab, longest
        self._prefixes: list[list[int]] = []
        self._turns: list[list[int]] = []
        self._living = prefixes
        for _ in range(prefixes):
            self.renew_prefix()

    def ids(self, count: int) -> list[int]:
        return self._random.choices(range(RESERVED_IDS, self._vocab), k=count)

    def renew_prefix(self) -> None:
        """A new prefix in place of the oldest; half of them continue another one."""
        room = self._longest // 8
        stem = self._random.choice(self._prefixes) if self._prefixes else []
        stem = stem if self._random.random() < 0.5 and len(stem) < room else []
        self._prefixes = [
            *self._prefixes[1 - self._living :],
            stem + self.ids(self._random.randint(1, room)),
        ]

    def draw(self) -> tuple[str, list[list[int]], int]:
        pick = self._random
        kind = pick.choices(list(_KINDS), weights=list(_KINDS.values()))[0]
        output = min(pick.choice((1, 2, 16, 64, 64, 200, 400)), self._longest // 8)
        if kind == "shared":
            return kind, [pick.choice(self._prefixes) + self.ids(pick.randint(1, 600))], output
        if kind == "samples":
            return kind, [pick.choice(self._prefixes)] * 8, output
        if kind == "turn" and self._turns:
            return kind, [pick.choice(self._turns) + self.ids(pick.randint(1, 200))], output
        return "unrelated", [self.ids(pick.randint(1, self._longest // 16))], output

    def longest(self) -> tuple[str, list[list[int]], int]:
        """A request as long as both engines take them."""
        output = min(64, self._longest // 8)
        return "context limit", [self.ids(self._longest - output)], output

    def answered(self, prompt: list[int], answer: list[int]) -> None:
        """Remember a conversation that a later request may continue."""
        if len(prompt) + len(answer) < self._longest // 4:
            self._turns = [*self._turns[-7:], prompt + answer]

    def pause(self) -> float:
        """Seconds to the next arrival: bursts, and gaps between them."""
        return self._random.expovariate(20.0) if self._random.random() < 0.9 else 0.5

    def abort_after(self) -> int | None:
        """Arrivals of tokens after which a request is aborted; None: never."""
        return self._random.randint(0, 6) if self._random.random() < 0.1 else None


def soak(engine: RunningEngine, *, minutes: float, seed: int) -> dict[str, Any]:
    """Load the engine for so long; the result without its verdict."""
    record = Record()
    engine.loop.run_until_complete(_Soak(engine, record, seed).run(60 * minutes))
    counts = read_counts(engine.counts) if engine.counts is not None else None
    try:
        engine.flush()  # refused while anything is held by a request
    except RuntimeError as error:
        record.errors.append(str(error))
    return {
        **({} if engine.counts is None else {"hicache": counts}),
        "minutes": minutes,
        "requests": dict(record.requests),
        "tokens": record.tokens,
        "errors": record.errors[:20],
        "canary_drift": record.canary_drift,
        "memory": record.memory,
        "arguments": engine.about(),
    }


class _Soak:
    def __init__(self, engine: RunningEngine, record: Record, seed: int) -> None:
        self._engine, self._record = engine, record
        shape = engine.options.shape
        self._vocab = shape.vocab
        prefixes = HICACHE_PREFIXES if engine.counts is not None else 4
        self._traffic = Traffic(shape.vocab, shape.longest, seed, prefixes)
        self._canary = Traffic(shape.vocab, shape.longest, 0).ids(min(1500, shape.longest // 4))
        self._expected: list[tuple[float, int]] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._serial = 0

    async def run(self, seconds: float) -> None:
        await self._ask_canary()
        started = time.monotonic()
        due = {"sample": 0.0, "told": 0.0, "canary": 0.0, "long": seconds / 4, "prefix": 0.0}
        while (now := time.monotonic() - started) < seconds:
            if now >= due["sample"]:
                due["sample"] = now + _SAMPLE_EVERY_S
                pids = self._engine.processes()
                self._record.memory.append((now, host_mib(pids), device_mib(self._engine)))
                if now >= due["told"]:
                    due["told"] = now + _TOLD_EVERY_S
                    print(self._record.line(), file=sys.stderr, flush=True)
            if now >= due["prefix"]:
                due["prefix"] = now + _NEW_PREFIX_EVERY_S
                self._traffic.renew_prefix()
            if now >= due["canary"]:
                due["canary"] = now + _CANARY_EVERY_S
                self._start(self._ask_canary())
            if now >= due["long"]:
                due["long"] = now + _LONG_EVERY_S
                self._send(*self._traffic.longest())
            if len(self._running) < _OUTSTANDING:
                self._send(*self._traffic.draw())
            await asyncio.sleep(self._traffic.pause())
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=_DRAIN_S)
            if late:
                self._record.errors.append(f"{len(late)} requests unanswered {_DRAIN_S:g} s later")

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(self._guard(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _guard(self, work: Any) -> None:
        try:
            await work
        except Exception as error:
            self._record.errors.append(f"{type(error).__name__}: {error}"[:300])

    def _send(self, kind: str, prompts: list[list[int]], output: int) -> None:
        for prompt in prompts:
            self._start(self._request(kind, prompt, output))

    async def _request(self, kind: str, prompt: list[int], output: int) -> None:
        self._serial += 1
        # SGLang aborts every request whose id begins with the given one: all are equally long.
        name, abort_after = f"soak-{self._serial:09d}", self._traffic.abort_after()
        if abort_after == 0:  # while it waits, or in its prefill
            asyncio.get_running_loop().call_later(0.02, self._engine.abort, name)
        arrivals, answer = 0, dict[str, Any]()
        async for part in self._engine.follow(prompt, output, temperature=1.0, name=name):
            answer = part
            arrivals += 1
            if arrivals == abort_after:
                self._engine.abort(name)
        reason, tokens = answer["ended"], answer["tokens"]
        if reason == "abort" and abort_after is not None:
            self._record.requests["aborted"] += 1
            return
        logprobs = [float(value) for value in answer["output"]]
        problem = fault(reason, logprobs, tokens, output, self._vocab)
        if problem:
            self._record.errors.append(f"{kind}, prompt of {len(prompt)} tokens: {problem}")
        self._record.requests[kind] += 1
        self._record.tokens += len(tokens)
        self._traffic.answered(prompt, tokens)

    async def _ask_canary(self) -> None:
        """The same prompt again, greedily; compared as far as the tokens are the same."""
        answer: dict[str, Any] = {}
        async for part in self._engine.follow(self._canary, _CANARY_TOKENS):
            answer = part
        found = list(zip(map(float, answer["output"]), answer["tokens"], strict=True))
        if self._expected is None:
            self._expected = found
        self._record.requests["canary"] += 1
        self._record.canary_drift = max(
            self._record.canary_drift, canary_drift(self._expected, found)
        )


def fault(
    reason: str | None, logprobs: Sequence[float], tokens: Sequence[int], output: int, vocab: int
) -> str | None:
    """What is wrong with an answer of `output` tokens; None if nothing is."""
    if reason != "length":
        return f"it ended with {reason!r}"
    if len(tokens) != output:
        return f"{len(tokens)} tokens instead of {output}"
    if len(logprobs) != output or not all(math.isfinite(value) for value in logprobs):
        return "a log-probability is missing or not finite"
    if not all(0 <= token < vocab for token in tokens):
        return "a token outside the vocabulary"
    return None


def canary_drift(
    expected: Sequence[tuple[float, int]], found: Sequence[tuple[float, int]]
) -> float:
    """Largest difference of log-probabilities up to and with the first token that differs.

    At that token each side gives its own favourite's; near a tie they are close. NaN counts as
    infinite.
    """
    drift = 0.0
    for (a, first), (b, second) in zip(expected, found, strict=True):
        difference = abs(a - b)
        drift = max(drift, math.inf if math.isnan(difference) else difference)
        if first != second:
            break
    return drift


def host_mib(processes: Sequence[int]) -> float:
    """Resident memory of the processes, in MiB; those that are gone count nothing."""
    total = 0
    for process in processes:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        total += sum(int(line.split()[1]) for line in lines)
    return total / 1024


def device_mib(engine: RunningEngine) -> float | None:
    """Memory of the engine's processes on all GPUs, in MiB; None where there are none."""
    if engine.options.device != "cuda":
        return None
    query = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    command = ["nvidia-smi", *query]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return memory_of(engine.processes(), told)


def memory_of(processes: Sequence[int], told: str) -> float | None:
    """Sum over the processes in lines of `pid, MiB`; None if none of them is there."""
    lines = [line.split(", ") for line in told.splitlines() if line.count(", ") == 1]
    found = [mib for pid, mib in lines if int(pid) in processes and mib.isdigit()]
    return float(sum(map(int, found))) if found else None


def growth(memory: Sequence[Sequence[float | None]], column: int) -> float | None:
    """Median of the last quarter of the samples less that of the second, in their unit.

    The first quarter is the engine warming up. None without figures or with fewer than eight.
    """
    values = [sample[column] for sample in memory if sample[column] is not None]
    numbers = [value for value in values if value is not None]
    if len(numbers) < 8:
        return None
    quarter = len(numbers) // 4
    return statistics.median(numbers[-quarter:]) - statistics.median(numbers[quarter : 2 * quarter])


def run_soak(
    options: EngineOptions,
    *,
    minutes: float,
    seed: int = 0,
    log_dir: Path | None = None,
    hicache: str | None = None,
) -> dict[str, Any]:
    """Soak an engine that has less cache than the load would fill; result and verdict.

    `hicache`: IO[:LAYOUT] of a hierarchical cache, such as `direct` or `kernel:layer_first`.
    """
    from flashcore.bench.serve.suite import Worker, log_file

    context = options.shape.context
    ready = replace(
        options,
        score_deviation=2.5,
        decode_batches=GRAPH_BATCHES,
        max_total_tokens=options.max_total_tokens or (9 * context // 8 if hicache else 2 * context),
    )
    if hicache is not None:
        ready = replace(ready, counts=True, extra=(*hicache_arguments(hicache), *options.extra))
    with log_file(log_dir, ready) as log, Worker(ready, log) as worker:
        worker.ready()
        command = {"do": "soak", "minutes": minutes, "seed": seed}
        result = worker.ask(command, 60 * minutes + 600)
    return judged({"backend": options.backend, "model": options.shape.name, **result})


def hicache_arguments(text: str) -> tuple[tuple[str, Any], ...]:
    """Arguments of an engine with a hierarchical cache, from IO[:LAYOUT].

    Raises ValueError for an I/O backend or a pair that SGLang would change by itself.
    """
    io, _, layout = text.partition(":")
    layouts = HICACHE_LAYOUTS.get(io)
    if layouts is None:
        raise ValueError(f"--hicache {text}: {io!r} is not one of {', '.join(HICACHE_LAYOUTS)}")
    layout = layout or layouts[0]
    if layout not in layouts:
        raise ValueError(f"--hicache {text}: with {io}, {layout!r} is not one of {layouts}")
    return (
        ("enable_hierarchical_cache", True),
        ("hicache_ratio", HICACHE_RATIO),
        ("hicache_io_backend", io),
        ("hicache_mem_layout", layout),
    )


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """The result with `host_growth_mib`, `device_growth_mib`, `failures` and `passed`."""
    host, device = growth(result["memory"], 1), growth(result["memory"], 2)
    failures = list(result["errors"])
    if host is not None and host > MAX_HOST_GROWTH_MIB:
        failures.append(f"host memory grew by {host:.0f} MiB, limit {MAX_HOST_GROWTH_MIB}")
    unread = [sample for sample in result["memory"] if sample[2] is None]
    if result["arguments"]["device"] == "cuda" and unread:
        failures.append(f"the GPU memory could not be read {len(unread)} times")
    if device is not None and device > MAX_DEVICE_GROWTH_MIB:
        failures.append(f"GPU memory grew by {device:.0f} MiB, limit {MAX_DEVICE_GROWTH_MIB}")
    drift = result["canary_drift"]
    if not drift <= MAX_CANARY_DRIFT:
        failures.append(f"the fixed prompt drifted by {drift:.3f}, limit {MAX_CANARY_DRIFT}")
    if not result["requests"].get("aborted") or not result["tokens"]:
        failures.append("too short: no request was answered, or none aborted")
    if "hicache" in result:
        counts = result["hicache"] or {}
        for name in ("evictions", "loads"):
            if not counts.get(name):
                failures.append(f"the hierarchical cache made no {name}")
        enough = all(counts.get(name, 0) > HICACHE_BAR for name in ("evictions", "loads"))
        result = {**result, "hicache_bar": HICACHE_BAR, "hicache_enough": enough}
    return {
        **result,
        "host_growth_mib": host,
        "device_growth_mib": device,
        "failures": failures,
        "passed": not failures,
    }


def format_soak(result: dict[str, Any]) -> str:
    """What ran, what grew, and the verdict."""
    counts = ", ".join(f"{count} {kind}" for kind, count in result["requests"].items())
    lines = [
        f"{result['minutes']:g} minutes of {result['model']} with {result['backend']}: "
        f"{result['tokens']} tokens; requests: {counts}",
        f"largest drift of the fixed prompt's log-probabilities: {result['canary_drift']:.3f}",
    ]
    if result.get("hicache"):
        told = ", ".join(f"{count} {name}" for name, count in result["hicache"].items())
        lines.append(f"hierarchical cache: {told}")
    for name in ("host", "device"):
        grown = result[f"{name}_growth_mib"]
        if grown is not None:
            lines.append(f"{name} memory grew by {grown:.1f} MiB")
    lines += [f"failed: {text}" for text in result["failures"]]
    return "\n".join([*lines, "passed" if result["passed"] else "FAILED"])
