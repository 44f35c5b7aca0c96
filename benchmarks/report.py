"""Fills the tables of README.md and docs/ from results/: python benchmarks/report.py

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`, in whichever page has the
markers. A test checks that what stands there is what the files say.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)] if str(HERE.parent) not in sys.path else []

from benchmarks.serve_tables import (  # noqa: E402
    deterministic_table,
    engines_table,
    headline_table,
    serve_small_table,
    serve_table,
)
from flashcore.bench.latency import method_of  # noqa: E402
from flashcore.bench.rows import by_workload  # noqa: E402
from flashcore.bench.serve.report import NAMES, PEERS  # noqa: E402

README = HERE.parent / "README.md"


def cpu_table(data: dict[str, Any]) -> str:
    """Figures of cpu.json as Markdown."""
    shared, alone = data["decode_shared"], data["decode_nothing_shared"]
    seconds, error = data["seconds_64x131072"], data["relative_error"]
    rows = [
        ("", "torch SDPA per sequence", "flashcore", "ratio"),
        ("---", "---", "---", "---"),
        _decode_row("decode, 70 % of the tokens shared", shared),
        _decode_row("decode, nothing shared", alone),
    ]
    for name in error:
        label = f"error against float64, {name}"
        theirs, ours = error[name]["sdpa"], error[name]["flashcore"]
        rows.append((label, f"{theirs:.1e}", f"{ours:.1e}", f"{theirs / ours:.2f}"))
    for name, label in (
        ("build_layout", "layout of 64 x 131072 tokens"),
        ("plan", "plan of the same"),
    ):
        rows.append((label, "", f"{seconds[name] * 1e3:.1f} ms", ""))
    if "replay_2000" in data:
        run = data["replay_2000"]
        label = "replay of 2,000 requests of a real trace"
        rows.append((label, "", f"{run['seconds']:.1f} s, {run['peak_mib']:.0f} MiB", ""))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    versions = data["versions"]
    return (
        f"{table}\n\n{data['cpu']}, {data['threads']} threads, torch {versions['torch']}, "
        f"Python {versions['python']}, {data['date'][:10]}, commit {data['commit']}; "
        f"`{data['command']}`"
    )


def _decode_row(label: str, run: dict[str, Any]) -> tuple[str, str, str, str]:
    q_heads, kv_heads, dim = run["heads"]
    shape = f"{run['sequences']} x {run['tokens']}, {q_heads}/{kv_heads} heads of {dim}, fp32"
    times = (f"{run[key]:.2f} ms" for key in ("sdpa_ms", "flashcore_ms"))
    spread = f"{run['ratio']:.2f} ({min(run['ratios']):.2f} to {max(run['ratios']):.2f})"
    return (f"{label} ({shape})", *times, spread)  # type: ignore[return-value]


def dense_table(data: dict[str, Any]) -> str:
    """Figures of dense_h100.json as Markdown: TFLOP/s, and ours over the better FA3."""
    run = {row["kernel"] for row in data["rows"]}
    shown = [name for name in KERNELS if name in run]
    head = ["shape", "dtype", *(KERNELS[name] for name in shown), "ratio to FA3"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    best: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in data["rows"]:
        keys = ("batch", "heads", "seqlen", "head_dim", "causal", "dtype")
        speeds = best.setdefault(tuple(row[key] for key in keys), {})
        speeds[row["kernel"]] = max(speeds.get(row["kernel"], 0.0), row["tflops"])
    for (batch, heads, seqlen, dim, causal, dtype), speed in best.items():
        shape = f"B{batch} H{heads} S{seqlen} hd {dim} {'causal' if causal else 'full'}"
        figures = (f"{speed[k]:.0f}" if k in speed else "" for k in shown)
        ratio = speed["flashcore"] / speed["fa3"]
        rows.append(f"| {shape} | {dtype} | " + " | ".join(figures) + f" | {ratio:.3f} |")
    for dtype, summary in data["summary"].items():
        mean = math.prod(
            p["speed_over"]["fa3"] ** (1 / len(summary["problems"])) for p in summary["problems"]
        )
        rows.append(f"| geometric mean | {dtype} |{' |' * len(shown)} {mean:.3f} |")
    versions = data["versions"]
    fa4 = f"FA4 {versions['flash-attn-4']}, " if "fa4" in run else ""
    fa3 = f"sgl_kernel {versions['sglang-kernel']}"
    if "fa3-fwd" in versions:
        fa3 = f"the better of fa3-fwd {versions['fa3-fwd']} (bf16) and {fa3}"
    return (
        "\n".join(rows) + f"\n\n{data['device']}, driver {data['driver']}, "
        f"torch {versions['torch']}, CuTe DSL {versions['nvidia-cutlass-dsl']}, FA3: {fa3}, "
        f"{fa4}{data['date'][:10]}, commit {data['commit']}; `{data['command']}`"
    )


def paged_table(data: dict[str, Any]) -> str:
    """Figures of paged_h100.json as Markdown: milliseconds of one layer, and ratios."""
    run = {row["kernel"] for row in data["rows"]}
    shown = [name for name in PAGED_KERNELS if name in run]
    head = ["sequences x tokens", "not unique", "bound", *(PAGED_KERNELS[k] for k in shown)]
    ratios = {
        name: title
        for name, title in (("ratio_to_bound", "x bound"), ("ratio_to_fastest_read", "x read"))
        if all(name in row for row in data["rows"])
    }
    beside = ["x bf16"] if "flashcore_bf16" in run else []
    head += [*ratios.values(), *beside, "FA3 / flashcore", "best peer / flashcore"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kernels in by_workload(data["rows"]).values():
        ours = kernels.get("flashcore")
        if ours is None:
            continue
        times = [f"{kernels[k]['ms']:.3f}" if k in kernels else "" for k in shown]
        decode = ours["q_len"] == 1  # prefill is bound by arithmetic
        bound = f"{ours['bound_ms']:.3f}" if decode else ""
        over = " | ".join(f"{ours[name]:.3f}" if decode else "" for name in ratios)
        fa3 = f"{kernels['fa3']['ms'] / ours['ms']:.3f}" if "fa3" in kernels else ""
        peers = [row["ms"] for name, row in kernels.items() if not name.startswith("flashcore")]
        best = f"{min(peers) / ours['ms']:.3f}" if peers else ""
        if beside and "flashcore_bf16" in kernels:
            over += f" | {ours['ms'] / kernels['flashcore_bf16']['ms']:.3f}"
        rows.append(
            f"| {_paged_label(ours)} | {ours['reuse']:.0%} | {bound} | {' | '.join(times)} | "
            f"{over} | {fa3} | {best} |"
        )
    read, versions = data["read_bandwidth"], data["versions"]
    fastest = ""
    if "fastest_method" in read:
        rate = f"{read['fastest_bytes_per_second'] / 1e9:.0f} GB/s"
        fastest = f"; x read: by the fastest read found, {rate}, {read['fastest_method']}"
    numbers = {row["kernel"]: row["version"] for row in data["rows"]}
    named = [f"sgl_kernel {numbers['fa3']} (FA3)"] if "fa3" in numbers else []
    named += [f"FA4 {numbers['fa4']}"] if "fa4" in numbers else []
    named += [f"FlashInfer {numbers['flashinfer']}"] if "flashinfer" in numbers else []
    return (
        "\n".join(rows) + f"\n\nBound: distinct KV bytes / {read['bytes_per_second'] / 1e9:.0f} "
        f"GB/s, streamed in the same run by {read['method']}{fastest}. {data['device']}, driver "
        f"{data['driver']}, torch {versions['torch']}, {', '.join(named)}, {data['date'][:10]}, "
        f"commit {data['commit']}; `{data['command']}`"
    )


def latency_table(data: dict[str, Any]) -> str:
    """Figures of latency_*.json as Markdown: microseconds of a layer, its bounds, what is above."""
    run = {row["kernel"] for row in data["rows"]}
    shown = [name for name in (*PAGED_KERNELS, "flashinfer_xqa") if name in run]
    shown.sort(key=lambda name: name != "flashcore")
    head = ["batch", "bound, DRAM", "bound, arithmetic", "flashcore's excess"]
    head += [PAGED_KERNELS.get(name, "FlashInfer XQA") for name in shown]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, kernels in by_workload(data["rows"]).items():
        first, ours = next(iter(kernels.values())), kernels.get("flashcore")
        cells = [f"{1e3 * first[bound]:.1f}" for bound in ("bound_ms", "arithmetic_ms")]
        cells.append("" if ours is None else f"{ours['excess_us']:.1f}")
        cells += [f"{1e3 * kernels[k]['ms']:.1f}" if k in kernels else "" for k in shown]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    for plan in data["plan"]:
        blank = " |" * (len(shown) - 1)
        name = f"plan, {plan['sequences']} x {plan['pages']} pages"
        rows.append(f"| {name} | | | | {plan['us']:.1f} |{blank}")
    return (
        "\n".join(rows) + f"\n\nMicroseconds. {method_of(data)}. {data['device']}, driver "
        f"{data['driver']}, torch {data['versions']['torch']}, {data['date'][:10]}, commit "
        f"{data['commit']}; `{data['command']}`"
    )


def _paged_label(row: dict[str, Any]) -> str:
    """As the row of a table names a workload."""
    if row["workload"].startswith("ragged"):
        return f"{row['sequences']} of 1 to {row['tokens']}, three-level tree"
    if row["q_len"] > 1:
        return f"prefill, {row['sequences']} x {row['q_len']} after {row['tokens'] - row['q_len']}"
    notes = [] if row["kv_heads"] == 8 else [f"{row['q_heads']}/{row['kv_heads']} heads"]
    notes += ["64/8 heads"] if row["q_heads"] == 64 else []
    notes += [] if row["page_tokens"] == 128 else [f"pages of {row['page_tokens']}"]
    return ", ".join([f"{row['sequences']} x {row['tokens']}", *notes])


PAGED_KERNELS = {
    "fa3": "FA3",
    "fa4": "FA4",
    "flashinfer": "FlashInfer",
    "cascade_fa2": "its cascade, fa2",
    "cascade_fa3": "its cascade, fa3",
    "flashcore_bf16": "flashcore, bf16",
    "flashcore": "flashcore",
}


def models_table(data: dict[str, Any]) -> str:
    """Rows of models_*.json as Markdown: a line a model family, beside its engine's backends."""
    families: dict[str, dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        families.setdefault(row["family"], {})[row["backend"]] = row
    engine = "vllm" if any("vllm" in row for row in data["rows"]) else "sglang"
    first, third = PEERS[engine]
    head = ["model family", "passed", "from", "mean difference"]
    head += [f"{third} from {first}", "same tokens"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for family, by_backend in families.items():
        ours, between = by_backend.get("flashcore"), _peers(by_backend, third)
        if ours is None:
            continue
        passed = "yes" if ours["passed"] else "no"
        if ours.get("error"):
            why = ours["error"].partition("; its last lines")[0].replace("|", "\\|")
            rows.append(f"| {family} | {passed}: {why} | | | {between} | |")
            continue
        peer = ours["peer"] or "nobody runs it"
        mean = "" if ours["mean_difference"] is None else f"{ours['mean_difference']:.4f}"
        same = "" if ours["same_tokens"] is None else f"{ours['same_tokens']} of {ours['tokens']}"
        rows.append(f"| {family} | {passed} | {peer} | {mean} | {between} | {same} |")
    versions = data["versions"]
    return (
        "\n".join(rows) + "\n\nMean difference of log-probabilities, the larger of prompts' and "
        f"decoded tokens'; made-up weights of unit gain. {data['device']}, driver "
        f"{data['driver']}, {NAMES[engine]} {versions[engine]}, torch {versions['torch']}, "
        f"{data['date'][:10]}, commit {data['commit']}; `{data['command']}`"
    )


def _peers(by_backend: dict[str, dict[str, Any]], third: str) -> str:
    """How far the two peers lie apart, or which of them does not run."""
    idle = [name for name, row in by_backend.items() if name != "flashcore" and row.get("error")]
    if idle:
        return f"{' and '.join(idle)} did not run"
    row = by_backend.get(third)
    known = row is not None and row["mean_difference"] is not None
    return f"{row['mean_difference']:.4f}" if row is not None and known else ""


KERNELS = {
    "flashcore": "flashcore",
    "fa3": "FA3",
    "fa4": "FA4",
    "cudnn": "cuDNN",
    "fa2": "FA2",
}


def fleet_table(data: dict[str, Any]) -> str:
    """Figures of a fleet's JSON as Markdown: a line for each size and routing."""
    head = ("engines", "routing", "requests", "reuse", "hits", "batch", "waiting", "balance")
    rows = [(*head, "step (ms)", "tokens/s"), ("---",) * (len(head) + 2)]
    for row in data["rows"]:
        step, rate = row["step_per_sequence_ms"], row["tokens_per_s_per_sequence"]
        rows.append(
            (
                f"{row['engines']:,}",
                row["routing"],
                f"{row['requests']:,}",
                f"{row['reuse']:.3f}",
                f"{100 * row['cache_hit_rate']:.1f} %",
                f"{row['batch_mean']:.1f}",
                f"{row['waiting_mean']:.2f}",
                f"{row['balance']:.2f}",
                f"{row['step_ms']:.2f} ({step:.2f})",
                f"{row['tokens_per_s']:.0f} ({rate:.0f})",
            )
        )
    runs = data.get("runs", [data])  # joined from several, each whole
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in rows)
        + f"\n\n{data['cpu']}; {'; '.join(map(_fleet_costs, runs))}; {data['date'][:10]}, commit "
        + ", ".join(dict.fromkeys(run["commit"][:7] for run in runs))
        + "; "
        + ", ".join(f"`{run['command']}`" for run in runs)
    )


def _fleet_costs(run: dict[str, Any]) -> str:
    """What a run of fleets took: of which routing, where it had one."""
    wall_s, user_s = (sum(row[name] for row in run["rows"]) for name in ("wall_s", "user_s"))
    routings = {row["routing"] for row in run["rows"]}
    count = run["processes"]
    return (
        (f"{routings.pop()}, " if len(routings) == 1 else "")
        + f"{count} process{'' if count == 1 else 'es'}: {wall_s:,.0f} s, "
        f"{user_s:,.0f} s of user time, {run['peak_mib']:,.0f} MiB at most"
    )


def transformers_table(data: dict[str, Any]) -> str:
    """Figures of benchmarks/transformers_prefill.py as Markdown, and each over sdpa's."""
    head = ("batch", "attention", "all layers, ms", "over sdpa", "one layer's attention, ms")
    rows = [(*head, "over sdpa", "TFLOP/s", "error"), ("---",) * (len(head) + 3)]
    for row in data["rows"]:
        lengths, name = row["lengths"], row["implementation"]
        tokens = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else lengths[0]
        cells = [f"{row['workload']}, {len(lengths)} x {tokens}", name]
        cells.append(f"{row['forward_ms']['median']:.2f}")
        over = row.get("of_sdpa")
        cells.append(f"{1 / over['forward']:.3f}" if over else "")
        if "attention_ms" in row:
            cells += [f"{row['attention_ms']['median']:.3f}"]
            cells += [f"{1 / over['attention']:.2f}" if over else ""]
            cells += [f"{row['tflops']:.0f}", f"{row['error']:.1e}"]
        rows.append((*cells, *[""] * (8 - len(cells))))  # type: ignore[arg-type]
    versions = data["versions"]
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in rows)
        + f"\n\n{data['model']}; {data['device']}, driver {data['driver']}, transformers "
        f"{versions['transformers']}, torch {versions['torch']}, {data['date'][:10]}, commit "
        f"{data['commit']}; `{data['command']}`"
    )


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "headline": ("serve_h100.json", headline_table),
    "cpu": ("cpu.json", cpu_table),
    "dense": ("dense_h100.json", dense_table),
    "paged": ("paged_h100.json", paged_table),
    "serve": ("serve_h100.json", serve_table),
    "serve-h200": ("serve_h200.json", serve_table),
}
# Of measurements that a tree need not have.
LATER: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "dense-h200": ("dense_h200.json", dense_table),
    "paged-h200": ("paged_h200.json", paged_table),
    "latency": ("latency_h200.json", latency_table),
    "serve-small": ("serve_small_h200.json", serve_small_table),
    "serve-small-f5fbf11": ("serve_small_f5fbf11_h200.json", serve_small_table),
    "vllm": ("vllm_h200.json", engines_table),
    "serve-fp8": ("serve_fp8_h200.json", engines_table),
    "serve-tp2": ("serve_tp2.json", engines_table),
    "deterministic": ("deterministic_h200.json", deterministic_table),
    "paged-fp8": ("paged_fp8_h200.json", paged_table),
    "models": ("models_h200.json", models_table),
    "models-vllm": ("models_vllm_h200.json", models_table),
    "transformers": ("transformers_h200.json", transformers_table),
    "fleet": ("fleet.json", fleet_table),
    "fleet-conversations": ("fleet_conversations.json", fleet_table),
    "fleet-few-prompts": ("fleet_few_prompts.json", fleet_table),
    "fleet-million": ("fleet_million.json", fleet_table),
}
PAGES = (README, *sorted((HERE.parent / "docs").rglob("*.md")))


def filled(text: str, results: Path = HERE / "results") -> str:
    """A page's text with every known table made anew; those without a file stay as they are."""
    for name, (file, table) in {**TABLES, **LATER}.items():
        path = results / file
        if not path.exists():
            continue
        body = table(json.loads(path.read_text()))
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.S)
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
