"""The paged kernels, planner, pager and merges under compute-sanitizer; needs a Hopper GPU:

    python tools/sanitize.py [--tools memcheck,racecheck] [--log-dir FOLDER]

A few small GPU tests of each kind, held against the reference as ever, once for each tool, the
tools side by side. Fails where a tool finds something, a test fails, or a test of the list is gone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "paged": (
        "test_rules[everything-64]",  # boxes of 16 rows, two CTAs an SM, host's plan, merge
        "test_rules[softcap_sinks-128]",  # one CTA of 128 rows
        "test_page_sizes[64-40]",
        "test_page_sizes[128-1]",
        "test_gathered_rows[everything-128-64]",  # pages of 1 token, two CTAs
        "test_gathered_rows[tree-256-64]",
        "test_gathered_rows[causal-64-128]",  # pages of 4 tokens
        "test_shapes[64-heads2-64]",
        "test_shapes[64-heads1-256]",
        "test_plans[options2]",  # more items than CTAs
        "test_strides[1]",
    ),
    "device_attention": (
        "test_rules[everything-1-8]",  # planner, attention and merge by its counts
        "test_rules[softcap_sinks-8-1]",
        "test_shapes[128-dtype5-1-heads5-64]",  # gathered
        "test_what_does_not_fit_is_all_nan[q]",
        "test_what_does_not_fit_is_all_nan[tree]",
    ),
    "paged_dims": (
        "test_dims[8-8-1-64-causal-1]",  # all but one vector of a gathered row is padding
        "test_dims[112-112-64-64-everything-40]",
        "test_dims[192-128-1-64-causal-40]",
    ),
    "fp8": (
        "test_rules[everything-64]",
        "test_rules[softcap_sinks-128]",
        "test_page_sizes[1-40]",  # gathered, two warps that convert
        "test_items_in_a_row[64-64]",
        "test_dims[dims5-1-64-window-40]",  # 80 columns: padding that is converted
        "test_scales[e4m3-heads-dtype0]",
    ),
    "few_rows": (
        "test_groups[heads1-6]",  # every shape of warps
        "test_rules[1-64-window]",  # gathered
        "test_shapes[64-256-8]",
        "test_both_kinds_of_items_in_a_row[70-64-False]",
        "test_what_is_not_finite_reaches_the_rows_that_see_it_alone[e5m2]",
    ),
    "expand": (
        "test_rules[everything-64]",
        "test_dims[dims1-1]",  # gathered, 80 columns
        "test_planned_on_the_device[False]",  # and decided there
    ),
    "device_plan": (
        "test_same_plan[small-True-40]",  # one kernel: shared memory, and a cluster
        "test_same_plan[chain-True-40]",
        "test_same_plan[chain-always-0]",
        "test_capacities[small]",
        "test_capacities[chain]",
    ),
    "batch_invariant": (
        "test_planned_by_either_kernels[128]",
        "test_several_queries[128-16]",  # chunks of an item, folded in the kernel
        "test_rules[everything-64-30]",
    ),
    "device_pager": (
        "test_token_maps[words]",
        "test_token_maps[bool]",
        "test_page_tables[none]",
        "test_plans_of_token_maps",
        "test_faults",
    ),
}


def start(tool: str, log: Path) -> subprocess.Popen[bytes]:
    """The cases under one tool; exit status 9 where it found something."""
    tests = [
        f"tests/gpu/test_{file}_gpu.py::{name}" for file, names in CASES.items() for name in names
    ]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    options = [
        "-W",
        "ignore",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--durations=5",
        "--tb=short",
    ]
    with log.open("wb") as out:
        return subprocess.Popen(
            [*command, *options, *tests], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--log-dir", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    logs = {tool: args.log_dir / f"{tool}.log" for tool in args.tools.split(",")}
    running = {tool: start(tool, log) for tool, log in logs.items()}
    worst = 0
    for tool, process in running.items():
        status = process.wait()
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", logs[tool].read_text())
        print(
            f"{tool}: exit status {status}; {found[-1] if found else 'no summary'} ({logs[tool]})"
        )
        worst = max(worst, abs(status))
    return worst


if __name__ == "__main__":
    sys.exit(main())
