"""Logits of the first greedy steps, compared between backends on the same tokens.

The first backend decodes greedily. The others are made to follow its tokens, so that every step of
every backend continues the same text: without that, one tie broken the other way would end the
comparison.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashcore.bench.serve.engine import Engine, EngineOptions
from flashcore.bench.serve.workloads import Prompts, Workload

if TYPE_CHECKING:
    import torch

STEPS = 32
OURS = "flashcore"
# Prompts (groups, sequences, prefix, unique): a large group, a small one, and prompts alone, with
# lengths on and off page boundaries.
_PARTS = (
    Workload("many", 6, 1024, 100, STEPS),
    Workload("pair", 2, 448, 1, STEPS),
    Workload("samples", 3, 700, 0, STEPS),
    Workload("alone", 2, 0, 333, STEPS),
    Workload("short", 1, 0, 1, STEPS),
)
_TIMEOUT_S = 300.0


class LogitRecorder:
    """A logit processor of SGLang: writes each row to a file, then forces the token it is told to.

    custom_params of a request: `row` (its number), `folder`, and `forced`, its tokens or None.
    """

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]]
    ) -> torch.Tensor:
        for number, params in enumerate(custom_param_list):
            step = len(params["__req__"].output_ids)
            values = logits[number].float().cpu().numpy()
            np.save(Path(params["folder"]) / f"{params['row']}-{step}.npy", values)
            if params["forced"] is not None:
                logits[number] = float("-inf")
                logits[number, params["forced"][step]] = 0.0
        return logits


def comparison_prompts(vocab: int) -> list[list[int]]:
    """The prompts of the comparison, the same for every backend."""
    return [
        prompt
        for seed, part in enumerate(_PARTS)
        for prompt in Prompts(part, vocab, seed + 100).batch()
    ]


def record(engine: Any, file: Path, forced: list[list[int]] | None) -> dict[str, Any]:
    """Decode STEPS tokens of each prompt; logits float32 [prompts, STEPS, vocab] go to `file`, with
    vLLM a part of the vocabulary."""
    prompts = comparison_prompts(engine.options.shape.vocab)
    if engine.options.engine == "vllm":
        from flashcore.bench.serve.vllm_logits import record_rows

        tokens, values = record_rows(engine, prompts, STEPS, forced)
    else:
        tokens, values = _record_rows(engine, prompts, forced)
    if forced is not None and tokens != forced:
        raise RuntimeError("the engine did not follow the tokens it was told to")
    np.save(file, values)
    return {"tokens": tokens}


def _record_rows(
    engine: Engine, prompts: list[list[int]], forced: list[list[int]] | None
) -> tuple[list[list[int]], np.ndarray[Any, Any]]:
    import dill

    with tempfile.TemporaryDirectory() as folder:
        answers = engine.generate(
            input_ids=prompts,
            sampling_params=[
                {
                    "max_new_tokens": STEPS,
                    "ignore_eos": True,
                    "temperature": 0.0,
                    "custom_params": {
                        "row": row,
                        "folder": folder,
                        "forced": None if forced is None else forced[row],
                    },
                }
                for row in range(len(prompts))
            ],
            custom_logit_processor=json.dumps({"callable": dill.dumps(LogitRecorder).hex()}),
        )
        rows = [
            np.stack([np.load(Path(folder) / f"{row}-{step}.npy") for step in range(STEPS)])
            for row in range(len(prompts))
        ]
    return [answer["output_ids"] for answer in answers], np.stack(rows)


def compare_backends(
    options: Sequence[EngineOptions], *, log_dir: Path | None = None
) -> dict[str, Any]:
    """Start an engine for each backend, one after the other; the result of `compare`."""
    from flashcore.bench.serve.suite import Worker, log_file

    tokens: list[list[int]] | None = None
    with tempfile.TemporaryDirectory(prefix="flashcore-logits-") as folder:
        files = {one.backend: Path(folder) / f"{one.backend}.npy" for one in options}
        # A peer leads: its tokens are what the comparison is about.
        ready = [_fitted(one) for one in sorted(options, key=lambda one: one.backend == OURS)]
        with contextlib.ExitStack() as stack:
            logs = [stack.enter_context(log_file(log_dir, one)) for one in ready]
            # All load their engine now; the engines start one after the other.
            workers = [stack.enter_context(Worker(*pair)) for pair in zip(ready, logs, strict=True)]
            for worker in workers:
                with worker:
                    worker.ready()
                    file = str(files[worker.backend])
                    command = {"do": "logits", "file": file, "forced": tokens}
                    tokens = worker.ask(command, _TIMEOUT_S)["tokens"]
        return compare({name: np.load(file) for name, file in files.items()})


def _fitted(options: EngineOptions) -> EngineOptions:
    prompts = comparison_prompts(options.shape.vocab)
    return replace(
        options,
        # Steps are counted by the tokens a request has, which overlap would run behind.
        overlap=options.engine != "sglang",
        score_deviation=2.5,
        logit_processor=options.engine == "sglang",
        decode_batches=(len(prompts),),
        max_total_tokens=options.max_total_tokens or 2 * sum(map(len, prompts)),
    )


def compare(logits: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """How far the backends' logits [prompts, steps, vocab] lie apart, pair by pair.

    `distance` of two rows is the norm of their difference over the norm of the first backend's row;
    `same_token`, how often their largest values are the same token's.
    Passed: all values are finite, and flashcore is no further from the nearest of the others than
    these are from each other, in the median row and in the worst.
    """
    finite = {name: bool(np.isfinite(values).all()) for name, values in logits.items()}
    pairs = {
        f"{a} - {b}": _distance(logits[a], logits[b]) for a, b in itertools.combinations(logits, 2)
    }
    result: dict[str, Any] = {"pairs": pairs, "finite": finite, "passed": all(finite.values())}
    peers = [name for name in logits if name != OURS]
    if OURS in logits and len(peers) > 1:
        spread = [_distance(logits[a], logits[b]) for a, b in itertools.combinations(peers, 2)]
        ours = [_distance(logits[name], logits[OURS]) for name in peers]
        for measure in ("median", "largest"):
            limit = max(pair[measure] for pair in spread)
            nearest = min(pair[measure] for pair in ours)
            result[measure] = {"spread_of_peers": limit, "flashcore_to_nearest": nearest}
            result["passed"] = result["passed"] and nearest <= limit
    return result


def _distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> dict[str, float]:
    distance = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)
    return {
        "median": float(np.median(distance)),
        "largest": float(distance.max()),
        "max_abs_difference": float(np.abs(a - b).max()),
        "same_token": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def format_comparison(result: dict[str, Any]) -> str:
    """A line a pair, and the verdict."""
    head = ("median", "largest", "max abs", "same token")
    lines = [f"{'distance of logits':<24}" + "".join(f"{word:>12}" for word in head)]
    for name, pair in result["pairs"].items():
        cells = (pair["median"], pair["largest"], pair["max_abs_difference"])
        figures = "".join(f"{value:>12.2e}" for value in cells)
        lines.append(f"{name:<24}{figures}{pair['same_token']:>12.4f}")
    lines += [f"{name}: not finite" for name, finite in result["finite"].items() if not finite]
    for measure in ("median", "largest"):
        if measure in result:
            found = result[measure]
            lines.append(
                f"{measure}: flashcore to the nearest {found['flashcore_to_nearest']:.2e}, "
                f"the others among each other {found['spread_of_peers']:.2e}"
            )
    return "\n".join([*lines, "passed" if result["passed"] else "FAILED"])
