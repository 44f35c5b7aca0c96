"""Tables of what serving took: speeds by workload, small steps, deterministic modes.

`report.py` puts them where they belong.
"""

from __future__ import annotations

from typing import Any

from flashcore.bench.rows import by_workload
from flashcore.bench.serve.report import BASELINES, NAMES, OURS, engine_name, engine_of
from flashcore.bench.serve.workloads import parse_workload

BACKENDS = ("flashcore", "fa3", "flashinfer", "triton")


def serve_table(data: dict[str, Any]) -> str:
    """Figures of serve_h100.json as Markdown: tokens/s and decode step, ours over each other's."""
    found = by_workload(data["rows"], "backend")
    backends = [b for b in BACKENDS if any(b in by_backend for by_backend in found.values())]
    others = [b for b in backends if b != "flashcore"]
    head = ["workload", "model", *backends, *(f"flashcore / {b}" for b in others)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, by_backend in found.items():
        first = next(iter(by_backend.values()))
        spec = first["spec"].split("/")[-1]
        label = spec if name == first["spec"] else f"{name}, {spec}"
        cells = [_served(by_backend[b]) if b in by_backend else "" for b in backends]
        ours = by_backend.get("flashcore")
        for other in others:
            both = ours is not None and other in by_backend
            cells.append(f"{_speed(ours) / _speed(by_backend[other]):.2f}" if both else "")
        rows.append(f"| {label} | {first['model']} | " + " | ".join(cells) + " |")
    versions = data["versions"]
    runs = data.get("runs", [data])  # joined from several
    return (
        "\n".join(rows) + f"\n\n{data['device']}, driver {data['driver']}, "
        f"SGLang {versions['sglang']}, torch {versions['torch']}, "
        f"FlashInfer {versions['flashinfer-python']}, sgl_kernel {versions['sglang-kernel']}, "
        f"{data['date'][:10]}, commit {data['commit']}; "
        + ", ".join(f"`{run['command']}`" for run in runs)
    )


def engines_table(data: dict[str, Any]) -> str:
    """A line for each workload and engine: its speed, over FlashAttention-3's in an engine like it,
    and where flashcore has several, over the plain one's."""
    peer = BASELINES[engine_of(data["rows"])]
    several = len({engine_name(row) for row in data["rows"] if row["backend"] == OURS}) > 1
    head = ["workload", "model", "engine", "tokens/s", "step, ms", "first token, ms"]
    head += [f"over {peer}", *["over flashcore"] * several]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    named = [{**row, "name": engine_name(row)} for row in data["rows"]]
    for workload, by_name in by_workload(named, "name").items():
        for name, row in by_name.items():
            spec = row["spec"].split("/")[-1]
            label = spec if workload == row["spec"] else f"{workload}, {spec}"
            cells = [label, row["model"], name]
            for figure, form in (("tokens_per_s", ".0f"), ("step_ms", ".2f"), ("ttft_ms", ".1f")):
                cells.append("" if row[figure] is None else f"{row[figure]:{form}}")
            for other in (name.replace(row["backend"], peer, 1), *[OURS] * several):
                known = other in by_name and other != name
                cells.append(f"{_speed(row) / _speed(by_name[other]):.2f}" if known else "")
            rows.append("| " + " | ".join(cells) + " |")
    versions, engine = data["versions"], engine_of(data["rows"])
    runs = data.get("runs", [data])
    return (
        "\n".join(rows) + f"\n\n{data['device']}, driver {data['driver']}, {NAMES[engine]} "
        f"{versions[engine]}, torch {versions['torch']}, {data['date'][:10]}, commit "
        f"{data['commit']}; " + ", ".join(f"`{run['command']}`" for run in runs)
    )


def headline_table(data: dict[str, Any]) -> str:
    """The same as a visitor reads it: what a workload stands for, and ours over each other's."""
    found = by_workload(data["rows"], "backend")
    backends = [b for b in BACKENDS if any(b in by_backend for by_backend in found.values())]
    others = [b for b in backends if b != "flashcore"]
    head = ["workload", "sequences x tokens", *backends, *(f"over {b}" for b in others)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, by_backend in found.items():
        ours = by_backend.get("flashcore")
        if ours is None:
            continue
        w = parse_workload(ours["spec"])
        prompts = f"{w.groups} prompts x {w.sequences} samples" if w.groups > 1 else w.sequences
        what = f"{prompts} x ({w.prefix} shared + {w.unique} own)"
        cells = [_brief(by_backend[b]) if b in by_backend else "" for b in backends]
        ratios = [
            f"{_speed(ours) / _speed(by_backend[b]):.2f}" if b in by_backend else "" for b in others
        ]
        label = f"{STANDS_FOR.get(name, name)} ({ours['model']})"
        rows.append(f"| {label} | {what} | " + " | ".join((*cells, *ratios)) + " |")
    versions = data["versions"]
    return (
        "\n".join(rows) + f"\n\n{data['device']}, driver {data['driver']}, "
        f"SGLang {versions['sglang']}, torch {versions['torch']}, "
        f"FlashInfer {versions['flashinfer-python']}, sgl_kernel {versions['sglang-kernel']}, "
        f"{data['date'][:10]}, commit {data['commit']}"
    )


STANDS_FOR = {
    "shared-16k": "agents, one long system prompt",
    "shared-4k": "few-shot prompts, a busy server",
    "context-128k": "128K contexts, 70 % shared",
    "rollout": "RL rollouts",
    "nothing-shared": "nothing shared",
    "ttft-32k": "first token on a cached prefix",
    "headline-1b": "a small model, many sequences",
}
"""Workload -> what it is an example of."""


def _brief(row: dict[str, Any]) -> str:
    if row["tokens_per_s"] is None:
        return f"{row['ttft_ms']:.0f} ms"
    return f"{row['tokens_per_s']:.0f} tokens/s"


def serve_small_table(data: dict[str, Any]) -> str:
    """Figures of serve_small_h200.json as Markdown: steps and first tokens, ours over fa3's."""
    head = ["workload", "model", "what", "flashcore", "fa3", "flashcore / fa3"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for by_backend in by_workload(data["rows"], "backend").values():
        ours, theirs = by_backend.get("flashcore"), by_backend.get("fa3")
        if ours is None or theirs is None:
            continue
        spec = ours["spec"].split("/")[-1]
        for figure, what in SMALL_FIGURES.items():
            ratio = ours["over_fa3"].get(figure)
            if ratio is None:
                continue
            cells = (_small(row, figure) for row in (ours, theirs))
            spread = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            rows.append(f"| {spec} | {ours['model']} | {what} | {' | '.join(cells)} | {spread} |")
    versions = data["versions"]
    runs = data.get("runs", [data])
    return (
        "\n".join(rows) + "\n\nMedians with quartiles; the ratio is the median over pairs taken in "
        f"turn, with an interval of 95 % for it. {data['device']}, driver {data['driver']}, SGLang "
        f"{versions['sglang']}, torch {versions['torch']}, sgl_kernel {versions['sglang-kernel']}, "
        f"{data['date'][:10]}, commit {data['commit']}; "
        + ", ".join(f"`{run['command']}`" for run in runs)
    )


def _small(row: dict[str, Any], figure: str) -> str:
    spread = row.get(f"{figure}_quartiles")
    quartiles = "" if spread is None else f" ({spread[0]:.3g} to {spread[1]:.3g})"
    return f"{row[figure]:.3g} ms{quartiles}"


SMALL_FIGURES = {
    "step_ms": "decode step",
    "ttft_ms": "first token",
    "first_request_ttft_ms": "first token, first of its kind",
}


def _served(row: dict[str, Any]) -> str:
    if row["tokens_per_s"] is None:
        return f"first token {row['ttft_ms']:.0f} ms"
    return f"{row['tokens_per_s']:.0f} tokens/s, {row['step_ms']:.1f} ms"


def _speed(row: dict[str, Any]) -> float:
    return float(row["tokens_per_s"] or 1e3 / row["ttft_ms"])


def deterministic_table(data: dict[str, Any]) -> str:
    """Differing bits by backend, setting and mode, then speeds."""
    modes = list(dict.fromkeys(row["mode"] for row in data["bits"] if row["mode"]))
    rows = ["| backend | setting | " + " | ".join(modes) + " |", "|---" * (len(modes) + 2) + "|"]
    settings = dict.fromkeys((row["backend"], row["setting"]) for row in data["bits"])
    for backend, setting in settings:
        of = {
            r["mode"]: r for r in data["bits"] if (r["backend"], r["setting"]) == (backend, setting)
        }
        found = (f"{of[m]['differences']} of {of[m]['of']}" if m in of else "" for m in modes)
        rows.append(f"| {backend} | {setting} | " + " | ".join(found) + " |")
    return "\n".join(rows) + "\n\n" + engines_table(data)
