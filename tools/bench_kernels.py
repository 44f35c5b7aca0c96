"""Compile what `flashcore bench paged` launches, for a machine that has no compiler:

    python tools/bench_kernels.py FOLDER

Run the benchmark there with FLASHCORE_CACHE_DIR=FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flashcore.bench.paged_problems import paged_problems
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from flashcore.jit.prebuild import prebuild
from flashcore.sm90.config import planner
from flashcore.sm90.config.paged import PagedCall, choose, choose_merge
from flashcore.sm90.families import MERGE, PAGED
from flashcore.sm90.launch.planner import PLANNER


def kernels() -> list[Kernel]:
    """Both tile heights for every workload, both merges, the planner."""
    found = [Kernel(PLANNER, planner.choose(256))]
    for partials in (1, 1000):
        found.append(Kernel(MERGE, choose_merge("bf16", 128, False, partials, 1)))
    for p in paged_problems():
        group = p.q_heads // p.kv_heads
        for tile_m in (64, 128):
            config = choose(PagedCall("bf16", p.head_dim, p.page_tokens, group), tile_m)
            found.append(Kernel(PAGED, config))
    return list(dict.fromkeys(found))


def main() -> int:
    cache = KernelCache.open(Path(sys.argv[1]))
    built = prebuild(kernels(), cache.folder, cache.target, jobs=os.cpu_count() or 1)
    for result in built:
        print(result.error or "ok", result.kernel.describe())
    return int(any(result.error for result in built))


if __name__ == "__main__":
    sys.exit(main())
