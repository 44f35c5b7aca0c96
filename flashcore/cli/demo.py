"""`flashcore demo`: what reading shared pages once is worth, on this machine, in a few seconds."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from flashcore.cli.parser import device_name

if TYPE_CHECKING:
    import torch

    from flashcore.bench.shared_prefix import Problem
    from flashcore.planner.stats import PlanStats

_SHARED = 0.7
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; the defaults need no file and no GPU."""
    parser.add_argument("--sequences", type=int, default=8, help="sequences (default %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="KV tokens of each sequence (default %(default)s)"
    )
    parser.add_argument(
        "--shared",
        type=float,
        help="share of all tokens that repeat another sequence's (default: 0.7, or as much as "
        "--sequences allow)",
    )
    parser.add_argument("--q-heads", type=int, default=8, help="default %(default)s")
    parser.add_argument("--kv-heads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="default %(default)s")
    parser.add_argument("--page-tokens", type=int, default=128, help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: bf16 for our kernels, fp32 for torch operators"
    )
    parser.add_argument(
        "--device",
        type=device_name,
        help="cpu, cuda, ... (default: cuda if it runs our kernels)",
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Build, lay out, plan, run both ways, compare with the reference, print."""
    import torch

    from flashcore import validate
    from flashcore.bench.shared_prefix import Problem, interleaved_ms, make

    for name in ("sequences", "tokens", "q_heads", "kv_heads", "head_dim", "page_tokens", "rounds"):
        validate.positive_int("--" + name.replace("_", "-"), getattr(args, name), maximum=2**63 - 1)
    validate.head_counts(args.q_heads, args.kv_heads)
    device = _usable(args.device or _default_device())
    dtype = args.dtype or ("bf16" if _by_kernels(device) else "fp32")
    most = 1 - 1 / args.sequences
    shared = min(_SHARED, most) if args.shared is None else args.shared
    if not 0 <= shared <= most:
        raise ValueError(
            f"--shared must be at least 0 and at most 1 - 1 / sequences = {most:.3f}, got {shared}"
        )
    problem = Problem(
        args.sequences,
        args.tokens,
        shared,
        args.q_heads,
        args.kv_heads,
        args.head_dim,
        args.page_tokens,
        getattr(torch, DTYPES[dtype]),
        device,
        args.seed,
    )
    _check_memory(problem)
    with torch.inference_mode():
        instance = make(problem)
        stats = instance.plan().stats()
        once, alone = instance.deduplicated(), instance.per_sequence()
        exact = instance.reference()
        error = float((once().double() - exact).abs().max())
        times = interleaved_ms({"dense": alone, "sparse": once}, args.rounds, device)
    result = {
        "dense_tokens": stats.tokens_per_sequence,
        "unique_tokens": stats.tokens_once,
        "reuse": round(stats.reuse, 3),
        "dense_ms": round(times["dense"], 3),
        "sparse_ms": round(times["sparse"], 3),
        "speedup": round(times["dense"] / times["sparse"], 2),
        "max_abs_error": error,
        "device": _device_name(device),
    }
    print(json.dumps(result) if args.json else _table(problem, stats, result))
    return 0


def _default_device() -> str:
    """A GPU where attention runs there, be it because torch operators were asked for."""
    import torch

    from flashcore.dispatch import wanted

    asked = torch.cuda.is_available() and wanted(None) == "eager"
    return "cuda" if asked or _by_kernels("cuda") else "cpu"


def _by_kernels(device: str) -> bool:
    import torch

    from flashcore.dispatch import PROVIDERS, device_path, wanted

    return wanted(None) == "auto" and device_path(torch.device(device)).name in PROVIDERS


def _usable(device: str) -> str:
    """The device if torch can put a tensor there, else a ValueError that says why not."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from None
    return device


def _check_memory(problem: Problem) -> None:
    """ValueError where K and V of all sequences, gathered by the one way, do not fit."""
    import torch

    tokens = problem.sequences * problem.tokens
    needed = 2 * tokens * problem.num_kv_heads * problem.head_dim * problem.dtype.itemsize
    if problem.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(problem.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise ValueError(
            f"--sequences {problem.sequences} x --tokens {problem.tokens} take "
            f"{needed / 2**30:.1f} GiB of K and V, {free / 2**30:.1f} GiB are free"
        )


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return device


def _table(problem: Problem, stats: PlanStats, result: dict[str, Any]) -> str:
    dtype: torch.dtype = problem.dtype
    dense_bytes, once_bytes = stats.bytes_per_sequence(dtype), stats.bytes_once(dtype)
    rows = [
        ("KV tokens read", f"{result['dense_tokens']:,}", f"{result['unique_tokens']:,}"),
        ("KV bytes read", _mib(dense_bytes), _mib(once_bytes)),
        ("time", f"{result['dense_ms']:.2f} ms", f"{result['sparse_ms']:.2f} ms"),
    ]
    lines = [
        f"Decode of {problem.sequences} sequences x {problem.tokens} tokens, "
        f"{problem.num_q_heads} query and {problem.num_kv_heads} KV heads of {problem.head_dim}, "
        f"pages of {problem.page_tokens}, {str(dtype).removeprefix('torch.')}, {result['device']}",
        "",
        f"{'':16}{'per sequence':>16}{'once per batch':>16}{'ratio':>9}",
    ]
    ratios = (result["reuse"], dense_bytes / max(once_bytes, 1), result["speedup"])
    for (label, dense, once), ratio in zip(rows, ratios, strict=True):
        lines.append(f"{label:16}{dense:>16}{once:>16}{ratio:>8.2f}x")
    lines += [
        "",
        "per sequence: torch scaled_dot_product_attention on each sequence's gathered K and V",
        f"{stats.num_groups} groups, {stats.num_shared_groups} shared, largest fan-out "
        f"{stats.largest_fan_out}; largest error against float64 {result['max_abs_error']:.1e}",
    ]
    return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
