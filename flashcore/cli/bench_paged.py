"""`flashcore bench paged`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashcore.cli.results import choose, deliver, head, positive, read_result, refuse

if TYPE_CHECKING:
    from flashcore.bench.paged import Machine
    from flashcore.bench.paged_problems import PagedProblem
    from flashcore.bench.paged_providers import PagedProvider

_COUNTED_KERNELS = ("flashcore", "fa3", "flashinfer", "cascade_fa2")
_RANDOM_ROUNDS = 25  # at least: batches of 20 us are compared to a few percent
_DTYPES = {"bf16": "bfloat16", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_NEEDED = {
    *("device", "driver", "commit", "date", "rows", "summary", "skipped"),
    *("read_bandwidth", "empty_graph_ms", "method"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore bench paged` that are its own."""
    parser.description = (
        "Time one layer's attention over paged KV caches with shared prefixes: flashcore and each "
        "installed peer (FlashAttention-3 of sglang-kernel, FlashAttention-4, FlashInfer's "
        "tensor-core decode and its cascade given the true levels), in turns, each in a CUDA "
        "graph, the L2 flushed before every replay. Prints milliseconds, and times the bound: "
        "distinct KV bytes over the rate at which this GPU streams, measured in the same run."
    )
    parser.add_argument(
        "--workload", default="", metavar="A,B", help="workloads whose name has one of these"
    )
    parser.add_argument(
        "--kernels",
        metavar="A,B",
        help="only these of flashcore, fa3, fa4, flashinfer, flashinfer_fa3, cascade_fa2, "
        "cascade_fa3, and with --latency flashinfer_xqa",
    )
    parser.add_argument(
        "--flush",
        choices=["read", "write"],
        default="read",
        help="the L2 before each replay: read 256 MiB, or write them, so that the kernel also pays "
        "for putting the written lines into DRAM (default: read)",
    )
    parser.add_argument(
        "--random",
        type=positive,
        metavar="N",
        help="also time N random batches with sharing found and with sharing ignored",
    )
    parser.add_argument(
        "--latency",
        action="store_true",
        help="other workloads, which read little, and plans: how much longer each takes than an "
        "empty graph and the longer of two bounds, by DRAM and by arithmetic",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=list(_DTYPES),
        default="bf16",
        help="of the pages; with fp8 flashcore in bf16 on the same values stands beside it, in "
        "prefill both of its ways (flashcore_converting, flashcore_expanding), and of the peers "
        "those that take fp8: FlashAttention-3 with q in fp8 too, FlashInfer",
    )
    parser.add_argument("--plan", action="store_true", help="also time the plan on the GPU")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="also time batch-invariant plans beside the default ones, and compare their bits with "
        "sharing ignored and for a sequence alone",
    )
    parser.add_argument(
        "--dram",
        nargs="?",
        const="",
        metavar="A,B",
        help="also count the DRAM bytes read with ncu, on these workloads (default: the longest "
        f"three), by {', '.join(_COUNTED_KERNELS)}",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="time nothing: run each kernel once inside a profiler range and print which",
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out: 0 done, 1 nothing was timed, 2 it cannot run here."""
    from flashcore.bench.latency import latency_problems
    from flashcore.bench.paged_problems import paged_problems

    if args.from_json is not None:
        try:
            result = read_result(args.from_json, _NEEDED)
        except ValueError as error:
            return refuse(str(error))
        return _deliver(args, result)
    if args.latency:
        for name, given in (
            ("--random", args.random),
            ("--plan", args.plan),
            ("--batch-invariant", args.batch_invariant),
            ("--dram", args.dram is not None),
            ("--once", args.once),
            ("--plot", args.plot is not None),
        ):
            if given:
                return refuse(f"{name} does not go with --latency")

    fp8 = args.kv_dtype != "bf16"
    if args.random and fp8:
        return refuse("--random has batches of bf16 alone; leave --kv-dtype out")

    import torch

    wanted = args.workload.split(",")
    known_problems = latency_problems() if args.latency else paged_problems()
    kv_dtype = getattr(torch, _DTYPES[args.kv_dtype])
    problems = [
        replace(p, kv_dtype=kv_dtype)
        for p in known_problems
        if any(text in p.name for text in wanted)
    ]
    if not problems:
        names = ", ".join(p.name for p in known_problems)
        return refuse(f"no workload has {args.workload!r} in its name; there are {names}")
    if not torch.cuda.is_available():
        return refuse("torch sees no CUDA device to time on")
    from flashcore.bench.paged_providers import paged_providers

    providers, missing = paged_providers(xqa=args.latency, fp8=fp8)
    if args.kernels:
        known = sorted({*missing, *(p.name for p in providers)})
        try:
            providers, missing = choose(args.kernels, providers, missing)
        except KeyError as unknown:
            return refuse(f"unknown kernel {unknown}; there are {', '.join(known)}")
    if not providers:
        return refuse(f"no kernel can be used: {missing}")
    with torch.inference_mode():
        if args.once:
            from flashcore.bench.dram import run_once

            print(json.dumps(run_once(problems, providers)))
            return 0
        result = _measure(args, problems, providers, missing)
    return _deliver(args, result)


def _deliver(args: argparse.Namespace, result: dict[str, Any]) -> int:
    from flashcore.bench.latency import format_latency
    from flashcore.bench.paged_report import format_table, plot

    if "arithmetic" not in result:
        return deliver(args, result, format_table, plot)
    if args.plot is not None:
        return refuse("--plot does not go with a result of --latency")
    return deliver(args, result, format_latency, plot)


def _measure(
    args: argparse.Namespace,
    problems: list[PagedProblem],
    providers: list[PagedProvider],
    missing: dict[str, str],
) -> dict[str, Any]:
    import torch

    from flashcore.bench.bandwidth import TORCH_SUM, read_bandwidth
    from flashcore.bench.machine import read_clocks
    from flashcore.bench.paged import add_bounds, cuda_machine, empty_graph_ms, run_paged
    from flashcore.bench.paged_report import summarise

    idle = read_clocks()
    machine = cuda_machine(write=args.flush == "write")
    _say("streaming read")
    before = read_bandwidth(machine.device)
    torch.cuda.empty_cache()
    measured = run_paged(
        problems,
        providers,
        machine,
        rounds=args.rounds,
        on_problem=lambda name: _say(f"timing {name}"),
    )
    after = read_bandwidth(machine.device)
    torch.cuda.empty_cache()
    rates = {name: max(rate, after[name]) for name, rate in before.items()}
    fastest = max(rates, key=lambda name: rates[name])
    rows, skipped = measured["rows"], measured["skipped"]
    add_bounds(rows, rates[TORCH_SUM], rates[fastest])
    empty = empty_graph_ms(machine, args.rounds)
    extra = _extras(args, problems, machine)
    if args.latency:
        extra = _latency(args, rows, [idle, *measured["clocks"]], empty, machine)
    if args.dram is not None:
        _add_dram(args, rows, skipped)
    return {
        **head(args.commit),
        "kv_dtype": args.kv_dtype,
        "clocks": {"before": idle, "during": measured["clocks"]},
        "method": (
            "each a CUDA graph of one layer's attention, replayed once between two events, L2 "
            f"flushed before by a {args.flush} of 256 MiB, in turns, medians; nothing subtracted"
        ),
        "read_bandwidth": {
            "bytes_per_second": rates[TORCH_SUM],
            "method": TORCH_SUM,
            "fastest_bytes_per_second": rates[fastest],
            "fastest_method": fastest,
            "all_methods": {"before": before, "after": after},
        },
        "streaming_read_gbs": rates[TORCH_SUM] / 1e9,
        "fastest_read_gbs": rates[fastest] / 1e9,
        "empty_graph_ms": empty,
        "skipped": [f"{name}: {why}" for name, why in missing.items()] + skipped,
        "rows": rows,
        "summary": summarise(rows),
        **extra,
    }


def _latency(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    clocks: list[dict[str, Any]],
    empty: float,
    machine: Machine,
) -> dict[str, Any]:
    """What --latency adds to the rows, and to the result."""
    import torch

    from flashcore.bench.latency import PLAN_SHAPES, add_excess, arithmetic_rates
    from flashcore.bench.machine import describe_device
    from flashcore.bench.plan_time import plan_times

    _say("timing plans")
    plans = plan_times(machine, args.rounds, PLAN_SHAPES)
    torch.cuda.empty_cache()
    _say("timing a matrix product")
    sms = describe_device()["sm_count"]
    rates = arithmetic_rates(machine, clocks, sms, args.rounds)
    add_excess(rows, rates, empty)
    return {"arithmetic": rates, "plan": plans}


def _extras(
    args: argparse.Namespace, problems: list[PagedProblem], machine: Machine
) -> dict[str, Any]:
    from flashcore.bench.batch_invariance import run_batch_invariance
    from flashcore.bench.plan_time import plan_times
    from flashcore.bench.random_sharing import run_random

    extra: dict[str, Any] = {}
    if args.plan:
        _say("timing the plan")
        extra["plan"] = plan_times(machine, args.rounds)
    if args.batch_invariant:
        extra["batch_invariant"] = run_batch_invariance(
            problems,
            machine,
            rounds=args.rounds,
            on_problem=lambda name: _say(f"timing batch-invariant plans of {name}"),
        )
    if args.random:
        _say(f"timing {args.random} random batches")
        extra["random"] = run_random(args.random, machine, rounds=max(_RANDOM_ROUNDS, args.rounds))
    return extra


def _add_dram(args: argparse.Namespace, rows: list[dict[str, Any]], skipped: list[str]) -> None:
    from flashcore.bench.dram import COUNTED, CountError, count_bytes

    _say("counting DRAM bytes")
    wanted = args.dram.split(",") if args.dram else COUNTED
    names = [name for name in wanted if any(row["workload"] == name for row in rows)]
    timed = {row["kernel"] for row in rows if row["workload"] in names}
    kernels = [name for name in _COUNTED_KERNELS if name in timed]
    try:
        counted = count_bytes(names, kernels, args.kv_dtype) if names else {}
    except CountError as error:
        skipped.append(f"DRAM bytes: {error}")
        return
    for row in rows:
        found = counted.get((row["workload"], row["kernel"]))
        if found is not None:
            row["dram_read_bytes"] = found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
