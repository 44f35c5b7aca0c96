"""Tables of what serving took: speeds by workload, small steps, deterministic modes.

`report.py` puts them where they belong.
"""

from __future__ import annotations

from typing import Any

from flashcore.bench.rows import by_workload
from flashcore.bench.serve.report import BASELINES, NAMES, OURS, by_engine, engine_of, speed
from flashcore.bench.serve.workloads import parse_workload

BACKENDS = ("flashcore", "fa3", "flashinfer", "triton")


def serve_table(data: dict[str, Any]) -> str:
    """Figures of serve_h100.json as Markdown: tokens/s and decode step, ours over each other's."""
    found = by_workload(data["rows"], "backend")
    backends = [b for b in BACKENDS if any(b in by_backend for by_backend in found.values())]
    others = [b for b in backends if b != "flashcore"]
    head = ["workload", "model", *backends, *(f"flashcore / {b}" for b in others)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for by_backend in found.values():
        first = next(iter(by_backend.values()))
        cells = [_served(by_backend[b]) if b in by_backend else "" for b in backends]
        ours = by_backend.get("flashcore")
        for other in others:
            both = ours is not None and other in by_backend
            cells.append(f"{speed(ours) / speed(by_backend[other]):.2f}" if both else "")
        rows.append(f"| {_label(first)} | {first['model']} | " + " | ".join(cells) + " |")
    packages = ("torch", "flashinfer-python", "sglang-kernel")
    return "\n".join(rows) + f"\n\n{_measured(data, packages)}; {_commands(data)}"


def engines_table(data: dict[str, Any]) -> str:
    """A line for each workload and engine: its speed, over FlashAttention-3's in an engine like it,
    and where flashcore has several, over the plain one's."""
    peer, found = BASELINES[engine_of(data["rows"])], by_engine(data["rows"])
    ours = {n for of in found.values() for n, row in of.items() if row["backend"] == OURS}
    several = len(ours) > 1
    head = ["workload", "model", "engine", "tokens/s", "step, ms", "first token, ms"]
    head += [f"over {peer}", *["over flashcore"] * several]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for by_name in found.values():
        for name, row in by_name.items():
            cells = [_label(row), row["model"], name]
            for figure, form in (("tokens_per_s", ".0f"), ("step_ms", ".2f"), ("ttft_ms", ".1f")):
                cells.append("" if row[figure] is None else f"{row[figure]:{form}}")
            for other in (name.replace(row["backend"], peer, 1), *[OURS] * several):
                known = other in by_name and other != name
                cells.append(f"{speed(row) / speed(by_name[other]):.2f}" if known else "")
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + f"\n\n{_measured(data, ('torch',))}; {_commands(data)}"


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
            f"{speed(ours) / speed(by_backend[b]):.2f}" if b in by_backend else "" for b in others
        ]
        label = f"{STANDS_FOR.get(name, name)} ({ours['model']})"
        rows.append(f"| {label} | {what} | " + " | ".join((*cells, *ratios)) + " |")
    packages = ("torch", "flashinfer-python", "sglang-kernel")
    return "\n".join(rows) + f"\n\n{_measured(data, packages)}"


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
    return (
        "\n".join(rows) + "\n\nMedians with quartiles; the ratio is the median over pairs taken in "
        "turn, with an interval of 95 % for it. "
        f"{_measured(data, ('torch', 'sglang-kernel'))}; {_commands(data)}"
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


def _label(row: dict[str, Any]) -> str:
    """A workload's name, if it has one, and what it is."""
    spec = row["spec"].split("/")[-1]
    return spec if row["workload"] == row["spec"] else f"{row['workload']}, {spec}"


PACKAGES = {"torch": "torch", "flashinfer-python": "FlashInfer", "sglang-kernel": "sgl_kernel"}


def _measured(data: dict[str, Any], packages: tuple[str, ...]) -> str:
    """On what, with which engine and packages, when and at which commit."""
    engine, versions = engine_of(data["rows"]), data["versions"]
    numbers = [f"{NAMES[engine]} {versions[engine]}"]
    numbers += [f"{PACKAGES[name]} {versions[name]}" for name in packages]
    return (
        f"{data['device']}, driver {data['driver']}, {', '.join(numbers)}, {data['date'][:10]}, "
        f"commit {data['commit']}"
    )


def _commands(data: dict[str, Any]) -> str:
    """Of each run that the result was joined from."""
    return ", ".join(f"`{run['command']}`" for run in data.get("runs", [data]))


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
