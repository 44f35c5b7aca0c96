"""vLLM's engine on a Hopper GPU with flashcore beside its own backends; needs vLLM and no network.

    python tests/gpu/vllm_smoke.py [CASE ...] [--log-dir FOLDER] [--json FILE]

Weights are made up and of unit gain, so that an error in attention shows. An engine for each
backend, one after the other in processes of their own; the first decodes greedily, and the others'
log-probabilities are compared for as long as they chose the same tokens. Passed: flashcore is no
further from the nearest of vLLM's backends than these are from each other, and a half of that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests/data/models"
STEPS = 32
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are replaced in this process
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOG_STATS_INTERVAL": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
PEERS = ("FLASH_ATTN", "TRITON_ATTN")


@dataclass(frozen=True)
class Case:
    """A model and how it is served. kind: what is compared, see `run_engine`. options: of
    `vllm.LLM`. compiled: with torch.compile, and with the graphs that vLLM then has by default."""

    model: str
    kind: str = "peers"
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    compiled: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)  # in place of the model's


NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
CASES = {
    "llama": Case("llama", compiled=True),
    "one-kv-head": Case("llama", sizes={"num_key_value_heads": 1, "head_dim": 64}),
    "block-16": Case("llama", options={"block_size": 16}),
    "qwen3": Case("qwen3"),
    "phi4": Case("phi4"),
    "gemma2": Case("gemma2"),
    "gemma3": Case("gemma3", sizes={"sliding_window": 256}),
    "eager": Case("llama", options={"enforce_eager": True}),
    "fp8": Case("llama", options={"kv_cache_dtype": "fp8"}),
    "fp8-gemma3": Case("gemma3", options={"kv_cache_dtype": "fp8"}),
    "v1-runner": Case("llama", environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "ngram": Case("llama", options={"speculative_config": NGRAM}),
    "sleep": Case("llama", kind="sleep", options={"enable_sleep_mode": True}),
    "sleep-gemma3": Case("gemma3", kind="sleep", options={"enable_sleep_mode": True}),
    "invariant": Case("llama", kind="invariant", environment={"VLLM_BATCH_INVARIANT": "1"}),
}


def prompts(vocab: int, longest: int) -> list[list[int]]:
    """A large group with a common prefix, a pair, equal prompts, prompts alone, one of a token."""
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(10, vocab - 10) for _ in range(min(count, longest))]

    many, pair, same = tokens(1024), tokens(448), tokens(700)
    repeated = tokens(40)
    return [
        *(many + tokens(100) for _ in range(6)),
        *(pair + tokens(1) for _ in range(2)),
        *(list(same) for _ in range(3)),
        *(tokens(333) for _ in range(2)),
        repeated * 6,
        tokens(1),
    ]


# In an engine's own process


def run_engine(name: str, backend: str, out: Path) -> None:
    """Start one engine, decode, and write what came out of it."""
    case = CASES[name]
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.warmup import kernel_warmup

    from flashcore.bench.serve import weights

    # Where the CuTe DSL can be imported this compiles kernels of other models for minutes.
    kernel_warmup._warmup_ll_bf16_router_gemm = lambda: None
    weights.install_in_vllm(2.5)
    folder = tempfile.mkdtemp()
    config = json.loads((MODELS / case.model / "config.json").read_text()) | case.sizes
    Path(folder, "config.json").write_text(json.dumps(config))
    began = time.perf_counter()
    llm = LLM(**engine_options(case, backend, folder))
    started = time.perf_counter() - began
    params = SamplingParams(
        temperature=0.0, max_tokens=STEPS, ignore_eos=True, logprobs=8, detokenize=False
    )
    texts = [{"prompt_token_ids": p} for p in prompts(config["vocab_size"], 4000)]

    def decode(batch: list[Any]) -> list[list[Any]]:
        """Of each prompt: token and log-probabilities, step by step."""
        answers = llm.generate(batch, params, use_tqdm=False)
        return [
            [
                [int(token), {str(t): float(p.logprob) for t, p in step.items()}]
                for token, step in zip(a.outputs[0].token_ids, a.outputs[0].logprobs, strict=True)
            ]
            for a in answers
        ]

    decode(texts)  # fills the prefix cache
    result: dict[str, Any] = {"started_s": started, "answers": decode(texts)}
    result["seen"] = seen()
    if case.kind == "sleep":
        result["same"] = []
        for level in (1, 1, 1, 1):
            llm.sleep(level)
            llm.wake_up()
            llm.reset_prefix_cache()
            again = decode(texts)
            again = decode(texts)
            result["same"].append(again == result["answers"])
    if case.kind == "invariant":
        result["alone"] = [decode([text])[0] for text in texts]
    result["memory_mib"] = torch.cuda.memory_allocated() / 2**20
    out.write_text(json.dumps(result))
    print(f"{name} {backend}: started in {started:.1f} s, {result['seen']}", flush=True)
    sys.stdout.flush()
    os._exit(0)  # an engine takes a while to come down, and has nothing to save


def engine_options(case: Case, backend: str, folder: str) -> dict[str, Any]:
    options = {
        "model": folder,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "attention_backend": backend,
        "enable_prefix_caching": True,
        "max_model_len": 4096,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,  # prompts come in chunks, and beside decode steps
        # Given, not measured: engines that share the GPU would be taken for this one's memory.
        "kv_cache_memory_bytes": 6 << 30,
        "gpu_memory_utilization": 0.1,
        "kernel_config": {"enable_cutedsl_warmup": False},
        "disable_log_stats": False,
    }
    if not case.compiled and not case.options.get("enforce_eager"):
        options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return {**options, **case.options}


def seen() -> dict[str, Any]:
    """What flashcore's last plans shared, and their faults; empty with another backend."""
    from flashcore.contract.counts import Seen, Stat

    if "flashcore.integrations.vllm.memory" not in sys.modules:
        return {}
    from flashcore.integrations.vllm.memory import _engines

    found: dict[str, Any] = {"reuse": [], "faults": 0}
    for engine in list(_engines.values()):
        for view in engine.views:
            stats = view.planner.stats().tolist()
            once = max(1, stats[Stat.TOKENS_ONCE])
            found["reuse"].append(round(stats[Stat.TOKENS_PER_SEQUENCE] / once, 2))
            found["faults"] += sum(updates[Seen.UPDATES] for _, updates in view.seen)
    return found


# In the process that was started


def run_case(name: str, ours: str, log_dir: Path) -> dict[str, Any]:
    """Every engine of a case; what came of comparing them."""
    case = CASES[name]
    backends = (ours,) if case.kind == "invariant" else (*PEERS, ours)
    if case.kind == "sleep":
        backends = (PEERS[0], ours)
    found: dict[str, Any] = {}
    for backend in backends:
        out = log_dir / f"{name}-{backend}.json"
        log = log_dir / f"{name}-{backend}.log"
        command = [sys.executable, __file__, name, "--engine", backend, "--out", str(out)]
        with log.open("w") as file:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **case.environment},
                timeout=420,
                check=False,
            )
        if done.returncode or not out.exists():
            tail = "\n".join(log.read_text().splitlines()[-25:])
            return {"passed": False, "error": f"{backend} ended with {done.returncode}\n{tail}"}
        found[backend] = json.loads(out.read_text())
        if backend == ours:
            lines = [x for x in log.read_text().splitlines() if "flashcore" in x]
            (log_dir / f"{name}-flashcore.txt").write_text("\n".join(lines))
    return verdict(case, ours, found)


def verdict(case: Case, ours: str, found: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"passed": True, "seen": found[ours]["seen"]}
    if result["seen"].get("faults") or max(result["seen"].get("reuse") or [0]) <= 1.0:
        result["passed"] = False
    if case.kind == "invariant":
        batch, alone = found[ours]["answers"], found[ours]["alone"]
        result["same_bits"] = sum(a == b for a, b in zip(batch, alone, strict=True)) / len(batch)
        result["passed"] &= result["same_bits"] == 1.0
        return result
    if case.kind == "sleep":
        result["same"] = {name: one["same"] for name, one in found.items()}
        result["passed"] &= all(result["same"][ours]) or not all(result["same"][PEERS[0]])
        return result
    names = [*PEERS, ours]
    result["pairs"] = {
        f"{a} - {b}": distance(found[a]["answers"], found[b]["answers"])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    spread = result["pairs"][f"{PEERS[0]} - {PEERS[1]}"]
    for measure in ("median", "mean", "largest"):
        nearest = min(result["pairs"][f"{peer} - {ours}"][measure] for peer in PEERS)
        result["passed"] &= nearest <= 1.5 * spread[measure]
    return result


def distance(a: list[Any], b: list[Any]) -> dict[str, float]:
    """Differences of the log-probabilities of common candidates, up to the first other token."""
    differences, compared, steps = [], 0, 0
    for one, other in zip(a, b, strict=True):
        steps += len(one)
        for (token, first), (other_token, second) in zip(one, other, strict=True):
            differences += [abs(first[t] - second[t]) for t in first if t in second]
            if token != other_token:
                break
            compared += 1
    return {
        "median": statistics.median(differences),
        "mean": statistics.fmean(differences),
        "largest": max(differences),
        "same_tokens": compared / steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--log-dir", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run_engine(args.cases[0], args.engine, args.out)
    from flashcore.integrations.vllm.versions import backend_name

    log_dir = args.log_dir or Path(tempfile.mkdtemp())
    log_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.cases or CASES:
        began = time.perf_counter()
        results[name] = run_case(name, backend_name(), log_dir)
        word = "passed" if results[name]["passed"] else "FAILED"
        print(f"{name}: {word} in {time.perf_counter() - began:.0f} s", flush=True)
        print(json.dumps(results[name], indent=1).replace("\\n", "\n"), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    failed = [name for name, result in results.items() if not result["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} passed", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
