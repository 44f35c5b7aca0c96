"""SGLang's modes of operation, each backend beside fa3 in the same mode and in the plain one.

What changes how attention is called must not change the answers: they lie as far from fa3's as
fa3's own in another mode. Documents are asked about in three rounds, so that prefixes are shared,
found again, and in a small cache evicted and loaded back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flashcore.bench.rows import Row
from flashcore.bench.serve.answers import distance
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.families import LIMIT
from flashcore.bench.serve.pool import Job, Survey
from flashcore.bench.serve.report import BASELINES, OURS
from flashcore.bench.serve.shapes import SHAPES, ModelShape
from flashcore.bench.serve.workloads import Prompts, Workload

SHAPE = ModelShape("llama-3.1-8b-3l", 3, 4096, 4096, 32, 8, 128, 32000, context=8192)
PEER = BASELINES["sglang"]
OUTPUT = 32
DOCUMENTS, DOCUMENT, ROUNDS, QUESTIONS = 5, 3000, 3, 4
POOL, SMALL_POOL, TIGHT_POOL = 40960, 14016, 4032  # tokens
# Of a cache that is too small for what running sequences grow to: how many, their tokens, answers'.
GROWING, GROWING_PROMPT, GROWING_OUTPUT = 6, 500, 600
_PORT = 31000


@dataclass(frozen=True)
class Mode:
    """Arguments of the engine and what else it needs."""

    arguments: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, int, int] = (1, 1, 1)
    dp_attention: bool = False
    draft: bool = False  # a draft model of one layer
    page_size: int = 64
    pool: int = POOL
    request: dict[str, Any] = field(default_factory=dict)  # arguments of every request
    growing: bool = False  # few prompts with long answers, so that some are retracted


def _hicache(backend: str, layout: str, **more: Any) -> Mode:
    arguments = {
        **more,
        "enable_hierarchical_cache": True,
        "hicache_ratio": 3.0,
        "hicache_io_backend": backend,
        "hicache_mem_layout": layout,
    }
    return Mode(arguments, pool=SMALL_POOL)


def _eagle(topk: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": topk,
        "speculative_num_draft_tokens": tokens,
        "speculative_draft_attention_backend": "fa3",
        **more,
    }


_NGRAM = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 6}
MODES: dict[str, Mode] = {
    "plain": Mode(),
    "compile": Mode({"enable_torch_compile": True, "torch_compile_max_bs": 16}),
    "hicache-kernel": _hicache("kernel", "page_first"),
    "hicache-direct": _hicache("direct", "page_first_direct"),
    "eagle": Mode(_eagle(1, 4), draft=True),
    "eagle-tree": Mode(_eagle(2, 6), draft=True, page_size=1),
    "tp2": Mode(ranks=(2, 1, 1)),
    "dp-attention": Mode(ranks=(2, 1, 2), dp_attention=True),
    "pp2": Mode(ranks=(1, 2, 1)),
    "retract": Mode(pool=TIGHT_POOL, growing=True),
    "mixed": Mode({"enable_mixed_chunk": True, "chunked_prefill_size": 256}),
    "no-graphs": Mode({"disable_decode_cuda_graph": True}),
    "page-1": Mode(page_size=1),
    "ngram": Mode(_NGRAM, page_size=1),
    "hidden": Mode({"enable_return_hidden_states": True}, request={"return_hidden_states": True}),
    "hicache-layer-first": _hicache("kernel", "layer_first"),
    "eagle-tree-64": Mode(_eagle(2, 6), draft=True),
    "single-batch-overlap": Mode({"enable_single_batch_overlap": True}),
    "memory-saver": Mode({"enable_memory_saver": True}),
    "fp8": Mode({"kv_cache_dtype": "fp8_e4m3"}),
    "fp8-hicache": _hicache("kernel", "page_first", kv_cache_dtype="fp8_e4m3"),
    "fp8-eagle": Mode(_eagle(1, 4, kv_cache_dtype="fp8_e4m3"), draft=True),
}


def find_modes(only: Sequence[str] | None, gpus: int) -> dict[str, Mode]:
    """The modes to run, those that need more GPUs than there are left out.

    Raises ValueError for a name that there is not, or one asked for that needs more.
    """
    for name in only or ():
        if name not in MODES:
            raise ValueError(f"--only {name}: not one of {', '.join(MODES)}")
        needed = _gpus(MODES[name])
        if needed > gpus:
            raise ValueError(f"--only {name}: it needs {needed} GPUs, --gpus is {gpus}")
    return {
        name: mode
        for name, mode in MODES.items()
        if (not only or name in only) and _gpus(mode) <= gpus
    }


def _gpus(mode: Mode) -> int:
    tensor, pipeline, data = mode.ranks
    return tensor * pipeline * (1 if mode.dp_attention else data)


def mode_rounds(vocab: int, mode: Mode) -> list[dict[str, Any]]:
    """Each document in turn, QUESTIONS about it at a time, all of them ROUNDS times."""
    if mode.growing:
        part = Workload("growing", GROWING, 0, GROWING_PROMPT, GROWING_OUTPUT)
        prompts = Prompts(part, vocab, 6).batch()
        return [{"prompts": prompts, "output": GROWING_OUTPUT, "flush": True}] * 2
    documents = Prompts(Workload("documents", DOCUMENTS, 0, DOCUMENT, OUTPUT), vocab, 5).batch()
    rounds = []
    for number in range(ROUNDS):
        for document in documents:
            asked = [
                document
                + [100 + number]
                + [7 * question + 11] * 3
                + list(range(200, 200 + 17 * question))
                for question in range(QUESTIONS)
            ]
            rounds.append({"prompts": asked, "output": OUTPUT, "options": mode.request})
    return rounds


def _shape(base: EngineOptions) -> ModelShape:
    return SHAPES["tiny"] if base.device == "cpu" else SHAPE


def mode_options(base: EngineOptions, mode: Mode, backend: str, number: int = 0) -> EngineOptions:
    """The engine of a mode. `number`: of the backend, whose engines may run side by side."""
    draft = {**SHAPE.config(), "architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
    # Data-parallel attention talks over ports counted from this one.
    port = (("port", _PORT + 64 * number),) if mode.dp_attention else ()
    return replace(
        base,
        backend=backend,
        shape=_shape(base),
        score_deviation=1.0,
        decode_batches=(8, 16),
        chunked_prefill=2048,
        mem_fraction=min(base.mem_fraction, 0.7),
        max_total_tokens=mode.pool,
        page_size=mode.page_size,
        ranks=mode.ranks,
        dp_attention=mode.dp_attention,
        draft=json.dumps(draft) if mode.draft else None,
        extra=(*port, *mode.arguments.items(), *base.extra),
    )


def run_modes(
    modes: dict[str, Mode],
    base: EngineOptions,
    backends: Sequence[str],
    sglang: str,
    survey: Survey,
) -> dict[str, Any]:
    """`rows` and `passed` of the JSON object, as of model families."""

    def result() -> dict[str, Any]:
        rows = [row for name in modes for row in _rows(name, backends, survey.answers, sglang)]
        verdicts = [row["passed"] for row in rows if row["backend"] == OURS]
        return {"rows": rows, "passed": True in verdicts and False not in verdicts}

    jobs = [
        Job(
            f"mode-{name}.{backend}",
            mode_options(base, mode, backend, number),
            {"do": "answers", "rounds": mode_rounds(_shape(base).vocab, mode)},
        )
        for name, mode in modes.items()
        for number, backend in enumerate(backends)
    ]
    return survey.ask(jobs, lambda answer: "ran", result)


def _rows(
    name: str, backends: Sequence[str], answers: dict[str, dict[str, Any]], sglang: str
) -> list[Row]:
    """A row for each backend, beside fa3 in this mode, or in the plain one where that fails."""

    def rounds(mode: str, backend: str) -> Any:
        answer = answers.get(f"mode-{mode}.{backend}")
        return None if answer is None or "error" in answer else answer["rounds"]

    same = rounds(name, PEER)
    plain = None if MODES[name].growing else rounds("plain", PEER)  # others are asked the same
    # fa3 against itself in another mode: what a mode changes by rounding alone.
    between = distance(same, plain)["mean_difference"] if same and plain else None
    rows = []
    for backend in backends:
        answer = answers.get(f"mode-{name}.{backend}")
        if answer is None or (backend == PEER and "error" not in answer):
            continue
        row: Row = {"mode": name, "sglang": sglang, "backend": backend}
        ours, peer = rounds(name, backend), same or plain
        if "error" in answer or peer is None:
            nothing = dict.fromkeys(("peer", "mean_difference", "same_tokens", "tokens"))
            # A mode in which fa3 does not run either says nothing of us.
            passed = False if backend == OURS and same is not None else None
            error = answer.get("error", "fa3 did not run")
            rows.append({**row, **nothing, "passed": passed, "error": error})
            continue
        told = distance(ours, peer)
        limit = max(LIMIT, between or 0.0)
        passed = not told["not_finite"] and told["mean_difference"] <= limit
        cached = sum(one["cached"] for one_round in ours for one in one_round)
        accepted = [one["accepted"] for r in ours for one in r if one["accepted"] is not None]
        rows.append(
            {
                **row,
                "peer": PEER if same else f"{PEER}, plain",
                **told,
                "peers_difference": between,
                "cached_tokens": cached,
                "retractions": sum(one["retractions"] for r in ours for one in r),
                "accept_length": sum(accepted) / len(accepted) if accepted else None,
                "passed": passed if backend == OURS else None,
                "start_s": answer["start_s"],
            }
        )
    return rows


def format_modes(result: dict[str, Any]) -> str:
    """A line a row, and the verdict."""
    lines = [f"{'mode':<22}{'backend':<11}{'to':<12}{'mean':>9}{'same tokens':>14}{'cached':>9}"]
    for row in result["rows"]:
        head = f"{row['mode']:<22}{row['backend']:<11}{row['peer'] or '-':<12}"
        if row.get("error"):
            lines.append(f"{head}did not run: {row['error']}")
            continue
        same = f"{row['same_tokens']}/{row['tokens']}"
        verdict = {True: "passed", False: "FAILED", None: ""}[row["passed"]]
        figures = f"{row['mean_difference']:>9.4f}{same:>14}{row['cached_tokens']:>9}"
        lines.append(f"{head}{figures}  {verdict}")
    return "\n".join([*lines, "passed" if result["passed"] else "FAILED"])
