"""Compile a representative subset of the shipped kernels with this Python's CuTe DSL and gate it.

    python tools/gate_subset.py [--jobs N]

For a DSL version beside the one of the development environment; needs no torch and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashcore.jit.cache import KernelCache
from flashcore.jit.gates import check_kernels, default_jobs, format_table, representative
from flashcore.sm90.shipped import shipped_kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes")
    args = parser.parse_args()
    cache = KernelCache.open()
    rows = check_kernels(representative(shipped_kernels()), cache.folder, cache.target, args.jobs)
    print(f"CuTe DSL {cache.target.dsl} {cache.target.toolkit}")
    print(format_table(rows))
    return 1 if any(row.violations for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
