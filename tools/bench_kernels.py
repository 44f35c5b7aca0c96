"""Compile what `flashcore bench paged` launches, for a machine that has no compiler:

    python tools/bench_kernels.py FOLDER

Run the benchmark there with FLASHCORE_CACHE_DIR=FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flashcore.bench.latency import PLAN_SHAPES, latency_problems
from flashcore.bench.paged_problems import paged_problems
from flashcore.bench.plan_time import SHAPES
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from flashcore.jit.prebuild import prebuild
from flashcore.problem import Problem, Rules
from flashcore.sm90.config import planner
from flashcore.sm90.families import PLANNER
from flashcore.sm90.needed import Plans, kernels_for


def kernels() -> list[Kernel]:
    """Both tile heights and both merges for every workload, also of --latency; the planners."""
    found = []
    for p in (*paged_problems(), *latency_problems()):
        shape = Problem(p.q_heads, p.kv_heads, p.head_dim, p.head_dim, p.page_tokens)
        found += kernels_for(shape, Rules(1.0, True), Plans((64, 128)))
    found += [Kernel(PLANNER, planner.choose(rows)) for rows, _ in (*SHAPES, *PLAN_SHAPES)]
    found.append(Kernel(PLANNER, planner.choose_small(chunks=False)))
    return list(dict.fromkeys(found))


def main() -> int:
    cache = KernelCache.open(Path(sys.argv[1]))
    built = prebuild(kernels(), cache.folder, cache.target, jobs=os.cpu_count() or 1)
    for result in built:
        print(result.error or "ok", result.kernel.describe())
    return int(any(result.error for result in built))


if __name__ == "__main__":
    sys.exit(main())
