"""DRAM bytes that one attention call reads, counted by Nsight Compute (ncu).

    this process ──► ncu ──► flashcore bench paged --once ──► marker, kernels of a call, marker, ...
                      └─► CSV: kernel, bytes ──► sums between markers, in the order of the calls

The cache is not emptied by ncu, which would do so before every kernel, but once before each call.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashcore.bench.graphs import Flusher
from flashcore.bench.paged_problems import PagedProblem, make_inputs
from flashcore.bench.paged_providers import PagedProvider

COUNTED = ("8x131072-70", "8x65536-70-mha", "16x32768-50")
"""Workloads whose DRAM bytes are counted where none are named."""

METRIC = "dram__bytes_read.sum"
_MARKER = "spin_kernel"  # of torch.cuda._sleep; no attention runs it
_TIMEOUT_S = 300


class CountError(Exception):
    """ncu could not count; the message says why."""


def run_once(
    problems: Sequence[PagedProblem], providers: Sequence[PagedProvider]
) -> list[tuple[str, str]]:
    """One profiled call of each kernel on each problem: (workload, kernel) of each, in order."""
    flush = Flusher("cuda")
    cuda: Any = torch.cuda
    done = []
    for problem in problems:
        inputs = make_inputs(problem, "cuda")
        for provider in providers:
            try:
                call = provider.prepare(problem, inputs)
                call()
            except Exception as error:
                print(f"{provider.name} on {problem.name}: {error}", file=sys.stderr)
                continue
            flush()
            torch.cuda.synchronize()
            cuda.profiler.start()
            cuda._sleep(1)
            call()
            torch.cuda.synchronize()
            cuda.profiler.stop()
            done.append((problem.name, provider.name))
    return done


def count_bytes(
    workloads: Sequence[str], kernels: Sequence[str], kv_dtype: str = "bf16"
) -> dict[tuple[str, str], int]:
    """(workload, kernel) -> DRAM bytes read by one call, its merge and other helpers included.

    Raises CountError where ncu is absent or fails.
    """
    if shutil.which("ncu") is None:
        raise CountError("ncu is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--profile-from-start", "off", "--metrics", METRIC]
        command += ["--cache-control", "none", "--clock-control", "none"]
        command += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        command += [sys.executable, "-m", "flashcore", "bench", "paged", "--once"]
        command += ["--workload", ",".join(workloads), "--kernels", ",".join(kernels)]
        command += ["--kv-dtype", kv_dtype]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CountError(f"ncu took longer than {_TIMEOUT_S} s") from error
        text = log.read_text() if log.exists() else ""
        if done.returncode:
            last = (done.stderr.strip() or text.strip() or "no output").splitlines()[-1]
            raise CountError(f"ncu ended with {done.returncode}: {last}")
    calls = [(workload, kernel) for workload, kernel in json.loads(done.stdout.splitlines()[-1])]
    return dict(zip(calls, sums_between_markers(text, len(calls)), strict=True))


def sums_between_markers(text: str, calls: int) -> list[int]:
    """Bytes after each marker in ncu's CSV output, one sum a call."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    sums: list[int] = []
    for row in csv.DictReader(lines):
        value = row.get(METRIC) or ""
        if not row.get("ID"):  # the line of units
            continue
        if _MARKER in row["Kernel Name"]:
            sums.append(0)
        elif sums:
            sums[-1] += round(float(value.replace(",", "")))
    if len(sums) != calls:
        raise CountError(f"ncu reports {len(sums)} calls, {calls} ran")
    return sums
