"""One layer of prefill on a shared prefix: python benchmarks/prefill_shared.py [--json FILE]

Every tile and folding of the plan, the one that the SGLang backend takes, and FA3 (sgl_kernel),
all in turn. A forward has at most 8192 new tokens, as SGLang chunks prefills. --predict needs no
GPU: it counts what each plan computes, reads and writes, and says how long that should take.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import flashcore
from flashcore.bench.graphs import capture, start_sample, time_graphs
from flashcore.bench.machine import describe_device, package_versions, source_commit
from flashcore.bench.paged_problems import DTYPE, PagedInputs, PagedProblem, make_batch, make_inputs
from flashcore.bench.paged_providers import paged_providers
from flashcore.contract.counts import Stat
from flashcore.contract.work import DIRECT, Group
from flashcore.planner.folding import Fold
from flashcore.serving.planners import WORKSPACE_BYTES, prefill_fold, prefill_tile
from flashcore.serving.shapes import Shape

WORKLOADS = (  # sequences, cached tokens that all share, new tokens
    (512, 4096, 64),
    (128, 256, 64),
    (64, 64, 192),
    (16, 32768, 2048),
    (64, 2048, 16),
    (256, 2048, 8),
)
HEADS = (Shape(32, 8, 64), Shape(32, 8, 128))
CHUNK = 8192  # new tokens of a forward
PAGE = 64
FOLDS: tuple[Fold, ...] = (True, "always")
TILES = (64, 128)
# Reached on an H100 (docs/experiments/planner.md#folding): 26.05 ms for 16 x 2048 on 32768,
# 0.275 ms for 64 x 16 on 8192 in tiles of 64 rows; partial results at the speed of the DRAM.
FLOPS = {64: 500e12, 128: 690e12}
DRAM = 3.0e12  # bytes/s


def problem_of(workload: tuple[int, int, int], shape: Shape) -> PagedProblem:
    """The first forward of a workload: as many sequences as fit in a chunk."""
    sequences, prefix, new = workload
    return PagedProblem(
        f"{sequences}x{prefix}+{new}",
        min(sequences, CHUNK // new),
        prefix + new,
        prefix_tokens=prefix,
        q_heads=shape.num_q_heads,
        kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_tokens=PAGE,
        q_len=new,
    )


def taken(problem: PagedProblem, shape: Shape) -> tuple[int, Fold]:
    """Tile and folding that the backend takes."""
    tile_m = prefill_tile(problem.total_q, problem.sequences, shape)
    return tile_m, prefill_fold(problem.total_q, shape, WORKSPACE_BYTES // 4)


def variants(problem: PagedProblem, shape: Shape) -> dict[str, tuple[int, Fold]]:
    """By name, the backend's last."""
    found = {f"tile {tile}, fold {fold}": (tile, fold) for tile in TILES for fold in FOLDS}
    return {**found, "backend": taken(problem, shape)}


# What a GPU should take


def predict(problem: PagedProblem, tile_m: int, fold: Fold) -> dict[str, Any]:
    """Counts of the plan, and microseconds: full tiles of arithmetic, then partial results."""
    batch = make_batch(problem)
    plan = flashcore.plan(
        flashcore.layout_from_page_table(batch.page_table, batch.seq_lens, page_tokens=PAGE),
        q_lens=[problem.q_len] * problem.sequences,
        num_q_heads=problem.q_heads,
        num_kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        page_tokens=PAGE,
        itemsize=DTYPE.itemsize,
        tile_m=tile_m,
        num_workers=132,
        fold=fold,
    )
    group = problem.q_heads // problem.kv_heads
    queries, tokens = plan.groups[:, Group.NUM_Q].long(), plan.groups[:, Group.NUM_TOKENS].long()
    blocks = (queries * group + tile_m - 1) // tile_m
    flops = 4.0 * int((blocks * tokens).sum()) * tile_m * problem.kv_heads * problem.head_dim
    partials = int((plan.merge_partials != DIRECT).sum())
    partial_bytes = 2 * partials * problem.q_heads * (problem.head_dim + 1) * 4
    microseconds = 1e6 * (flops / FLOPS[tile_m] + partial_bytes / DRAM)
    return {
        "groups": plan.groups.shape[0],
        "tera_flops": round(flops / 1e12, 3),
        "partial_mb": round(partial_bytes / 1e6, 1),
        "predicted_us": round(microseconds, 1),
    }


# What it takes


def our_call(
    problem: PagedProblem, inputs: PagedInputs, tile_m: int, fold: Fold, workspace: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], flashcore.DevicePlanner]:
    """(attention and merge, the plan alone, the planner)."""
    planner = flashcore.DevicePlanner(
        flashcore.Capacities(
            max_batch=problem.sequences,
            max_entries=inputs.page_table.numel(),
            max_q=problem.total_q,
            max_gathered=10 * problem.total_q,
        ),
        num_pages=inputs.k_pages.shape[0],
        num_q_heads=problem.q_heads,
        num_kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        page_tokens=PAGE,
        tile_m=tile_m,
        fold=fold,
        workspace=workspace,
    )
    q_lens = torch.full_like(inputs.seq_lens, problem.q_len)
    out = torch.empty_like(inputs.q)
    pools = inputs.k_pages, inputs.v_pages

    def update() -> torch.Tensor:
        return planner.update(inputs.page_table, inputs.seq_lens, q_lens).counts

    update()
    attend = lambda: flashcore.paged_attention(inputs.q, *pools, planner.plan, out=out)  # noqa: E731
    return attend, update, planner


def measure(problem: PagedProblem, shape: Shape, rounds: int) -> list[dict[str, Any]]:
    inputs = make_inputs(problem, "cuda")
    workspace = torch.empty(WORKSPACE_BYTES // 4, dtype=torch.float32, device="cuda")
    graphs, rows = {}, {}
    for name, (tile_m, fold) in variants(problem, shape).items():
        attend, update, planner = our_call(problem, inputs, tile_m, fold, workspace)
        graphs[name], graphs[f"{name}: plan"] = capture(attend), capture(update)
        stats = planner.stats().tolist()
        rows[name] = {
            "tile_m": tile_m,
            "fold": fold,
            "tokens_once": stats[Stat.TOKENS_ONCE],
            "tokens_per_sequence": stats[Stat.TOKENS_PER_SEQUENCE],
            "unshared": bool(stats[Stat.UNSHARED]),
        }
    providers, missing = paged_providers()
    peer = next((p for p in providers if p.name == "fa3"), None)
    if peer is None:
        print(f"no fa3: {missing.get('fa3')}")
    else:
        graphs["fa3"] = capture(peer.prepare(problem, inputs))
        rows["fa3"] = {"version": peer.version}
        for graph in graphs.values():  # what a capture leaves in its result means nothing
            graph.replay()
        reference = graphs["fa3"].out
        for name in variants(problem, shape):
            worst = (graphs[name].out.float() - reference.view_as(graphs[name].out).float()).abs()
            rows[name]["max_difference_to_fa3"] = round(float(worst.max()), 5)
    # Layers before this one leave other things in the L2, not this layer's keys.
    flush = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
    times = time_graphs(graphs, rounds=rounds, start=lambda g: start_sample(g, lambda: flush.sum()))
    for name, row in rows.items():
        row["us"] = round(1e3 * times[name].median_ms, 2)
        if f"{name}: plan" in times:
            row["plan_us"] = round(1e3 * times[f"{name}: plan"].median_ms, 2)
        if peer is not None:
            row["of_fa3"] = round(row["us"] / (1e3 * times["fa3"].median_ms), 3)
    return [{"name": name, **row} for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--predict", action="store_true", help="count, measure nothing")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--commit", help="to record where the package is no git checkout")
    options = parser.parse_args()
    result: list[dict[str, Any]] = []
    for shape in HEADS:
        for workload in WORKLOADS:
            problem = problem_of(workload, shape)
            head = {"workload": problem.name, "heads": str(shape), "sequences": problem.sequences}
            if options.predict:
                rows = [
                    {"name": name, "tile_m": tile, "fold": fold, **predict(problem, tile, fold)}
                    for name, (tile, fold) in variants(problem, shape).items()
                ]
            else:
                rows = measure(problem, shape, options.rounds)
            for row in rows:
                print({**head, **row}, flush=True)
                result.append({**head, **row})
    if options.json:
        about = {} if options.predict else describe_device()
        about |= {"versions": package_versions(), "commit": options.commit or source_commit()}
        options.json.write_text(json.dumps({**about, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
