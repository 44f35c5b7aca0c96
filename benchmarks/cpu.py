"""The CPU figures of docs/results.md: python benchmarks/cpu.py [--trace TRACE] [--out FILE]

Measures, on an idle machine, what the torch path promises: decode with and without a shared prefix
beside torch's scaled_dot_product_attention, the time of layout and plan, errors against float64,
and with --trace the time and memory of `flashcore replay` over the first 2,000 requests of a trace
in Mooncake's format. Writes one JSON file; `benchmarks/report.py` turns it into the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import flashcore
from flashcore.bench.shared_prefix import Problem, interleaved_ms, make
from flashcore.cli.info import collect

HERE = Path(__file__).parent
ROUNDS = 101
PROCESSES = 15  # memory lies differently in each, which moves the times of both by up to a half


def decode(shared: float) -> dict[str, Any]:
    """One decode problem, deduplicated beside torch per sequence; medians over fresh processes."""
    problem = Problem(shared=shared)
    stats = make(problem).plan().stats()
    runs = []
    for _ in range(PROCESSES):  # one at a time
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            runs.append(pool.submit(time_decode, problem).result())
    ratios = [run["sdpa"] / run["flashcore"] for run in runs]
    return {
        "sequences": problem.sequences,
        "tokens": problem.tokens,
        "heads": [problem.num_q_heads, problem.num_kv_heads, problem.head_dim],
        "unique_share": stats.tokens_unique / stats.tokens_per_sequence,
        "sdpa_ms": statistics.median(run["sdpa"] for run in runs),
        "flashcore_ms": statistics.median(run["flashcore"] for run in runs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def time_decode(problem: Problem) -> dict[str, float]:
    """Median milliseconds of both ways, interleaved in this process."""
    with torch.inference_mode():
        instance = make(problem)
        # Also leaves the allocator as in a process that has been at work for a while: with fresh
        # memory for each gathered copy, torch per sequence takes half as long again.
        exact = instance.reference()
        functions = {"sdpa": instance.per_sequence(), "flashcore": instance.deduplicated()}
        for function in functions.values():
            torch.testing.assert_close(function().double(), exact, rtol=1e-4, atol=1e-6)
        return interleaved_ms(functions, ROUNDS)


def errors() -> dict[str, Any]:
    """Relative Frobenius errors against float64 beside torch's own, per dtype."""
    result = {}
    for name in ("float32", "bfloat16", "float16"):
        problem = replace(Problem(), tokens=2048, dtype=getattr(torch, name))
        instance = make(problem)
        exact = instance.reference()
        pair = {"flashcore": instance.deduplicated()(), "sdpa": instance.per_sequence()()}
        result[name] = {
            key: float((out.double() - exact).norm() / exact.norm()) for key, out in pair.items()
        }
    return result


def median_seconds(function: Any, rounds: int = 11) -> float:
    """Median wall seconds after one warm-up."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def pager_and_planner(sequences: int = 64, tokens: int = 131072) -> dict[str, float]:
    """Seconds for layout and plan of a large batch, 70 % of its tokens shared, pages of 128."""
    instance = make(Problem(sequences, tokens, 0.7, num_q_heads=1, num_kv_heads=1, head_dim=1))
    token_to_page = instance.page_table.repeat_interleave(128, 1).flatten()
    starts = torch.arange(sequences) * tokens
    lens = torch.full((sequences,), tokens)
    layout = instance.layout
    shape = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    return {
        "build_layout": median_seconds(
            lambda: flashcore.build_layout(token_to_page, starts, starts + tokens)
        ),
        "layout_from_page_table": median_seconds(
            lambda: flashcore.layout_from_page_table(instance.page_table, lens, page_tokens=128)
        ),
        "plan": median_seconds(lambda: flashcore.plan(layout, **shape)),
        "plan_split_for_132": median_seconds(
            lambda: flashcore.plan(layout, **shape, num_workers=132)
        ),
    }


def replay(trace: Path) -> dict[str, Any]:
    """Wall seconds and peak memory of the command as a process of its own."""
    command = [sys.executable, "-m", "flashcore", "replay", str(trace), "--requests", "2000"]
    begin = time.perf_counter()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": seconds, "peak_mib": kib / 1024, "report": json.loads(done.stdout)}


def head(argv: list[str]) -> dict[str, Any]:
    """Where, when and with what the figures were taken."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    words = [Path(word).name if os.path.sep in word else word for word in argv]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": collect()["versions"],
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/cpu.py", *words]),
        "rounds": ROUNDS,
        "processes": PROCESSES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="a trace in Mooncake's format")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        result = {
            **head(sys.argv[1:]),
            "decode_shared": decode(0.7),
            "decode_nothing_shared": decode(0.0),
            "seconds_64x131072": pager_and_planner(),
            "relative_error": errors(),
        }
    if args.trace:
        result["replay_2000"] = replay(args.trace)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
