"""Deterministic serving: the bits of an engine's answers, and what they cost.

The modes are those of SGLang's own test (sglang.test.test_deterministic): a prompt alone and in
company, prefixes of one prompt in a batch, a prompt found in the prefix cache, and decode against
prefill. Every setting of chunks, pages and prefix cache is asked the same; settings are compared
with each other, too. Log-probabilities are compared as they are: one bit is a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flashcore.bench.rows import Row
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.pool import Job, Survey
from flashcore.bench.serve.report import OURS, speed
from flashcore.bench.serve.shapes import SHAPES, ModelShape
from flashcore.bench.serve.workloads import RESERVED_IDS

if TYPE_CHECKING:
    from flashcore.bench.serve.answers import Answer
    from flashcore.bench.serve.running import RunningEngine

SHAPE = ModelShape("llama-3.1-8b-3l", 3, 4096, 4096, 32, 8, 128, 32000, context=16384)
DOCUMENT = 5123  # tokens of the prompt that is asked about
PREFIXES = (10, 511, 2048, 4097)  # of it, in tokens
OUTPUT = 16
COPIES = 3
POOL = 65536  # tokens
MODES = ("single", "prefix", "radix_cache", "p_vs_d")
ACROSS = "across settings"


@dataclass(frozen=True)
class Setting:
    """New tokens of a prefill at most, tokens of a page, prefix cache."""

    chunk: int
    page: int
    radix: bool = True

    @property
    def name(self) -> str:
        return f"chunk {self.chunk}, page {self.page}, prefix cache {'on' if self.radix else 'off'}"


SETTINGS = {
    "sglang": (Setting(8192, 64), Setting(256, 64), Setting(8192, 1), Setting(256, 1, False)),
    "vllm": (Setting(8192, 64), Setting(256, 64), Setting(8192, 16), Setting(256, 16, False)),
}
"""vLLM's pages have 16 tokens or more."""


def engine_options(base: EngineOptions, backend: str, setting: Setting) -> EngineOptions:
    """A deterministic engine with few layers, whose weights make attention matter."""
    small = base.device == "cpu"
    off = {"sglang": ("disable_radix_cache", True), "vllm": ("enable_prefix_caching", False)}
    return replace(
        base,
        backend=backend,
        shape=SHAPES["tiny"] if small else SHAPE,
        deterministic=True,
        score_deviation=1.0,
        decode_batches=(1, 4, 8),
        chunked_prefill=setting.chunk,
        page_size=setting.page,
        mem_fraction=min(base.mem_fraction, 0.7),
        max_total_tokens=POOL,
        extra=(*base.extra, *(() if setting.radix else (off[base.engine],))),
    )


# In the process of an engine


def bits(engine: RunningEngine) -> dict[str, Any]:
    """Differences of each mode, and the answers that settings are compared by.

    `differences`: tokens and log-probabilities that are not equal, by mode. `compared`: how many
    there were. `kv`: tokens of the longest prompt. `cached`: of the prompt that was asked again.
    """
    shape = engine.options.shape
    rng = np.random.default_rng(11)
    tokens = min(DOCUMENT, shape.longest - OUTPUT - 1)
    document = _random(rng, shape.vocab, tokens)
    parts = [document[:n] for n in PREFIXES if n < tokens]
    others = [_random(rng, shape.vocab, n) for n in (tokens // 7, tokens // 3, 40)]

    def ask(prompts: Sequence[list[int]], flush: bool = True) -> list[tuple[int, Answer]]:
        """Each answer with the length of its prompt, of which no two are alike."""
        if flush:
            engine.flush()
        return list(zip(map(len, prompts), engine.answers(prompts, OUTPUT), strict=True))

    alone = dict(pair for prompt in (document, *parts) for pair in ask([prompt]))
    first = alone[tokens]
    ((_, before),) = ask([document])
    ((_, again),) = ask([document], flush=False)
    company = [
        *ask([document] * COPIES),
        *ask([*others, document, *others[:2]]),
        *ask([document, *others[::-1]], flush=False),
    ]
    prefixes = [
        *ask([*parts, document]),
        *ask([document, *parts[::-1]], flush=False),
        *ask([*parts[:1] * COPIES, *parts]),
    ]
    engine.flush()
    whole = engine.answers([document + first["tokens"]], 1, prompt=True)[0]["prompt"]
    pairs = {
        "single": [(answer, first) for n, answer in company if n == tokens],
        "radix_cache": [(before, first), (again, first)],
        "prefix": [(answer, alone[n]) for n, answer in prefixes],
    }
    found = {m: sum(_different(*map(_output, pair)) for pair in of) for m, of in pairs.items()}
    # The prompt's first token has no log-probability.
    found["p_vs_d"] = _unequal(whole[tokens - 1 : tokens - 1 + OUTPUT], first["output"])
    return {
        "kv": tokens,
        "differences": found,
        "compared": {**{m: 2 * OUTPUT * len(of) for m, of in pairs.items()}, "p_vs_d": OUTPUT},
        "cached": again["cached"],
        "outputs": [_output(answer) for answer in alone.values()],
    }


def _random(rng: np.random.Generator, vocab: int, tokens: int) -> list[int]:
    return [int(token) for token in rng.integers(RESERVED_IDS, vocab, tokens)]


def _output(answer: Answer) -> tuple[list[int], list[float]]:
    return answer["tokens"], answer["output"]


def _different(a: Any, b: Any) -> int:
    """Of two answers' tokens and log-probabilities."""
    return sum(_unequal(*pair) for pair in zip(a, b, strict=True))


def _unequal(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Places where they differ, and those that one of them lacks."""
    return sum(bool(x != y) for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))


# In the process of the benchmark


def run_bits(base: EngineOptions, backends: Sequence[str], survey: Survey) -> dict[str, Any]:
    """`bits`: a row for each backend, setting and mode; `passed`: none of ours has a difference.

    Of the settings the first is what the others are compared with.
    """
    settings = SETTINGS[base.engine]
    jobs = {
        (backend, setting): Job(
            f"deterministic-{backend}-{setting.chunk}-{setting.page}-{setting.radix}",
            engine_options(base, backend, setting),
            {"do": "bits"},
        )
        for backend in backends
        for setting in settings
    }

    def result() -> dict[str, Any]:
        rows: list[Row] = []
        for (backend, setting), job in jobs.items():
            answer = survey.answers.get(job.name)
            if answer is not None:
                reference = survey.answers.get(jobs[backend, settings[0]].name, {})
                rows += _rows(base.engine, backend, setting, answer, reference.get("outputs"))
        ours = [row["differences"] for row in rows if row["backend"] == OURS]
        return {"bits": rows, "passed": bool(ours) and not any(n != 0 for n in ours)}

    return survey.ask(list(jobs.values()), _told, result)


def _told(answer: dict[str, Any]) -> str:
    return f"{sum(answer['differences'].values())} differences"


def _rows(
    engine: str, backend: str, setting: Setting, answer: dict[str, Any], reference: Any
) -> list[Row]:
    row: Row = {"engine": engine, "backend": backend, "setting": setting.name}
    if "error" in answer:
        return [{**row, "mode": None, "kv": None, "differences": None, "error": answer["error"]}]
    row["kv"] = answer["kv"]
    rows = [
        {**row, "mode": m, "differences": answer["differences"][m], "of": answer["compared"][m]}
        for m in MODES
    ]
    if reference is not None and setting != SETTINGS[engine][0]:
        pairs = list(zip(answer["outputs"], reference, strict=True))
        found = sum(_different(*pair) for pair in pairs)
        rows.append({**row, "mode": ACROSS, "differences": found, "of": 2 * OUTPUT * len(pairs)})
    return rows


def summarise_cost(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each workload: our deterministic speed over every other's."""
    summary = []
    for name in dict.fromkeys(row["workload"] for row in rows):
        of = {
            (row["backend"], row["deterministic"]): row for row in rows if row["workload"] == name
        }
        if (OURS, True) in of:
            ours = speed(of[OURS, True])
            over = {
                f"{backend}{', deterministic' * deterministic}": ours / speed(row)
                for (backend, deterministic), row in of.items()
                if (backend, deterministic) != (OURS, True)
            }
            summary.append({"workload": name, "flashcore_deterministic_over": over})
    return summary


def format_deterministic(result: dict[str, Any]) -> str:
    """Bits by backend and setting, speeds by workload, and the verdict."""
    modes = (*MODES, ACROSS)
    lines = [f"{'differences':<13}{'setting':<44}" + "".join(f"{m:>17}" for m in modes)]
    of: dict[tuple[str, str], dict[str | None, Any]] = {}
    for row in result["bits"]:
        of.setdefault((row["backend"], row["setting"]), {})[row["mode"]] = row
    for (backend, setting), cells in of.items():
        head = f"{backend:<13}{setting:<44}"
        if None in cells:
            lines.append(f"{head}did not run: {cells[None]['error']}")
            continue
        found = [cells.get(mode) for mode in modes]
        lines.append(head + "".join(f"{'-' if c is None else c['differences']:>17}" for c in found))
    for entry in result.get("summary", []):
        over = entry["flashcore_deterministic_over"]
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in over.items())
        lines.append(f"{entry['workload']}: flashcore, deterministic, over {told}")
    return "\n".join([*lines, "passed" if result["passed"] else "FAILED"])
