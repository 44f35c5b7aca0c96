"""Model families served by each backend: do they start, and do they answer alike?

Weights are made up, of unit gain; prompts share prefixes and do not, from an empty cache and from a
full one. A backend passes if it is no further from the engine's FlashAttention than its Triton
backend is, or than LIMIT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashcore.bench.rows import Row
from flashcore.bench.serve.answers import Answer, distance
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.pool import Job, Survey
from flashcore.bench.serve.report import OURS, PEERS
from flashcore.bench.serve.shapes import ModelShape, model_shape
from flashcore.bench.serve.workloads import Prompts, Workload

LIMIT = 0.03  # of a log-probability, in the mean
OUTPUT = 24
CONTEXT = 8192
POOL = 40960
BATCH = 16
# Sequences, shared, own: a group, a pair, samples of one prompt, prompts alone on and off page
# boundaries, and a pair beyond the longest window (4096 tokens).
_PARTS = (
    (5, 1024, 100),
    (2, 700, 1),
    (3, 1000, 0),
    (2, 0, 333),
    (1, 0, 1500),
    (1, 0, 1),
    (2, 4400, 90),
)
_HYBRID = {"mamba_ssm_dtype": "float32"}  # the type these models are served in
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "sglang": {
        "qwen3-next": _HYBRID,
        "qwen3.5": {
            **_HYBRID,
            "enable_multimodal": False,
        },  # its image processor is not in a config
        "lfm2": {"page_size": 1},  # all that its prefix cache has
    },
    "vllm": {
        # FlashInfer's kernel for the linear layers would be compiled for minutes.
        "qwen3-next": {"mamba_ssm_cache_dtype": "float32", "gdn_prefill_backend": "triton"},
    },
}
# So that many engines start side by side in vLLM, which wants this much of the GPU to be free; the
# cache is as large as the pool, and these bytes are only more than it takes. Groups of layers of
# different kinds share a pool's blocks.
_VLLM_FRACTION, _VLLM_CACHE_BYTES, _VLLM_POOL = 0.08, 16 * 2**30, 4 * POOL
# Widespread and different ones first, for a run that is cut short.
ORDER = (
    *("llama", "gpt-oss", "gemma3", "qwen3-next", "qwen3-moe", "nemotron-h", "qwen2.5", "phi3"),
    *("exaone4", "starcoder2", "glm4-moe", "minimax-m2", "granite-4-h", "falcon-h1", "lfm2"),
    *("gemma2", "olmo3", "mistral", "qwen3", "phi4", "qwen3.5", "mimo-v2"),
)


@dataclass(frozen=True)
class Family:
    """A config.json, and further arguments of the engine that serves it."""

    name: str
    shape: ModelShape
    arguments: dict[str, Any]


def find_families(
    folder: Path, only: Sequence[str] | None = None, engine: str = "sglang"
) -> list[Family]:
    """The families of `folder`/NAME/config.json, in the order in which they are to run.

    Raises ValueError if there are none, or not one that `only` names.
    """
    paths = {path.parent.name: path for path in folder.glob("*/config.json")}
    if not paths:
        raise ValueError(f"--families {folder}: there is no NAME/config.json in it")
    unknown = sorted(set(only or ()) - set(paths))
    if unknown:
        raise ValueError(f"--only {unknown[0]}: not one of {', '.join(sorted(paths))}")
    names = sorted(paths, key=lambda name: (ORDER.index(name) if name in ORDER else 99, name))
    arguments = ARGUMENTS[engine]
    return [
        Family(name, replace(model_shape(str(paths[name])), name=name), arguments.get(name, {}))
        for name in names
        if not only or name in only
    ]


def family_prompts(vocab: int, longest: int) -> list[list[int]]:
    """The prompts, the same for every backend; those that are too long for the model left out."""
    prompts = []
    for seed, (sequences, prefix, unique) in enumerate(_PARTS):
        if prefix + unique + OUTPUT <= longest:
            part = Workload(f"part {seed}", sequences, prefix, unique, OUTPUT)
            prompts += Prompts(part, vocab, seed + 200).batch()
    return prompts


def family_rounds(shape: ModelShape) -> list[dict[str, Any]]:
    """From an empty cache, with the prompts' log-probabilities; from the cache; one alone."""
    prompts = family_prompts(shape.vocab, shape.longest)
    return [
        {"prompts": prompts, "output": OUTPUT, "flush": True, "prompt": True},
        {"prompts": prompts, "output": OUTPUT},
        {"prompts": prompts[:1], "output": OUTPUT},
    ]


def family_options(base: EngineOptions, family: Family, backend: str) -> EngineOptions:
    """Small enough for many side by side; decode graphs for one sequence and for BATCH."""
    shape = replace(family.shape, context=min(CONTEXT, family.shape.context))
    # States of hybrid models would fill what memory is left.
    small: dict[str, Any] = {"max_mamba_cache_size": 6 * BATCH}
    fraction, pool = 0.8, POOL
    if base.engine == "vllm":
        small, fraction = {"kv_cache_memory_bytes": _VLLM_CACHE_BYTES}, _VLLM_FRACTION
        pool = _VLLM_POOL
        if base.device == "cuda":  # compiling takes longer than all that is asked
            graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, BATCH]}
            small["compilation_config"] = {"mode": 0, **graphs}
    return replace(
        base,
        backend=backend,
        shape=shape,
        score_deviation=1.0,
        decode_batches=(BATCH,),
        chunked_prefill=2048,
        mem_fraction=min(base.mem_fraction, fraction),
        max_total_tokens=base.max_total_tokens or pool,
        extra=(*small.items(), *family.arguments.items(), *base.extra),
    )


def run_families(
    families: Sequence[Family],
    base: EngineOptions,
    backends: Sequence[str],
    version: str,
    survey: Survey,
) -> dict[str, Any]:
    """`rows` and `passed` of the JSON object; a job is called FAMILY.BACKEND. version: of the
    engine, which stands in a row under the engine's name."""
    about = {base.engine: version}

    def result() -> dict[str, Any]:
        names, answers = [family.name for family in families], survey.answers
        rows = [row for name in names for row in _rows(name, backends, answers, about)]
        ours = [row for row in rows if row["backend"] == OURS]
        return {"rows": rows, "passed": bool(ours) and all(row["passed"] for row in ours)}

    jobs = [
        Job(
            f"{family.name}.{backend}",
            family_options(base, family, backend),
            {"do": "answers", "rounds": family_rounds(family_options(base, family, backend).shape)},
        )
        for family in families
        for backend in backends
    ]
    return survey.ask(jobs, lambda answer: f"started in {answer['start_s']:.0f} s", result)


def _rows(
    family: str,
    backends: Sequence[str],
    answers: dict[str, dict[str, Any]],
    about: dict[str, str],
) -> list[Row]:
    """A row for each backend but the peer itself; none until its engine has been asked. about: the
    engine's name and version."""
    first, third = PEERS[next(iter(about))]
    found = {b: answers[f"{family}.{b}"] for b in backends if f"{family}.{b}" in answers}
    ran = {b: answer["rounds"] for b, answer in found.items() if "error" not in answer}
    peers = distance(ran[first], ran[third]) if first in ran and third in ran else None
    rows = []
    for backend, answer in found.items():
        peer = next((b for b in (first, third) if b in ran and b != backend), None)
        if backend == first and "error" not in answer:
            continue
        row: Row = {"family": family, **about, "backend": backend, "peer": peer}
        if "error" in answer:
            nothing = dict.fromkeys(("mean_difference", "same_tokens", "tokens"))
            passed = False if backend == OURS else None
            rows.append({**row, **nothing, "passed": passed, "error": answer["error"]})
            continue
        told = _judged(ran[backend], ran[peer], peers) if peer else _alone(ran[backend])
        if backend != OURS:  # the measure, not what is measured
            told["passed"] = None
        rows.append({**row, **told, "start_s": answer["start_s"]})
    return rows


def _judged(
    ours: Sequence[Sequence[Answer]],
    theirs: Sequence[Sequence[Answer]],
    peers: dict[str, Any] | None,
) -> dict[str, Any]:
    """Distance and verdict: prompts and decoded tokens each within what the peers show of them."""
    told = distance(ours, theirs)
    within = not told["not_finite"] and told["tokens"] > 0
    for part in ("prompt_difference", "decode_difference"):
        between = (peers or {}).get(part) or 0.0
        limit = max(LIMIT, between if math.isfinite(between) else 0.0)
        within = within and told[part] is not None and told[part] <= limit
    return {**told, "peers_difference": (peers or {}).get("mean_difference"), "passed": within}


def _alone(answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """No peer serves it: that it is finite is all there is to say, which does not pass it."""
    told = distance(answers, answers)
    nothing = dict.fromkeys(("mean_difference", "same_tokens"))
    return {**nothing, "tokens": told["tokens"], "not_finite": told["not_finite"], "passed": False}


def format_families(result: dict[str, Any]) -> str:
    """A line a row, and the verdict."""
    titles = (f"{'mean':>9}", f"{'peers':>9}", f"{'same tokens':>14}")
    lines = [f"{'family':<14}{'backend':<13}{'to':<12}" + "".join(titles)]
    for row in result["rows"]:
        head = f"{row['family']:<14}{row['backend']:<13}{row['peer'] or '-':<12}"
        if row.get("error"):
            lines.append(f"{head}did not run: {row['error']}")
            continue
        cells = [row["mean_difference"], row.get("peers_difference")]
        figures = "".join(f"{'-':>9}" if v is None else f"{v:>9.4f}" for v in cells)
        known = row["same_tokens"] is not None
        same = f"{row['same_tokens']}/{row['tokens']}" if known else "-"
        verdict = {True: "passed", False: "FAILED", None: ""}[row["passed"]]
        lines.append(f"{head}{figures}{same:>14}  {verdict}")
    return "\n".join([*lines, "passed" if result["passed"] else "FAILED"])
