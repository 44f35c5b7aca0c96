"""What a benchmark ran on: device, driver, clocks, versions, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_CLOCK_FIELDS = {
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}
_PACKAGES = (
    "torch",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "fa3-fwd",
    "sglang-kernel",
    "flash-attn-4",
    "sglang",
    "vllm",
    "flashinfer-python",
    "triton",
    "transformers",
)


def describe_device() -> dict[str, Any]:
    """The current CUDA device: name, SMs, memory, driver and CUDA versions."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "sm_count": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _nvidia_smi("driver_version") or "unknown",
        "cuda": torch.version.cuda,
    }


def cpu_name() -> str:
    """What the processor calls itself, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_clocks(index: int | None = None) -> dict[str, float]:
    """Clocks, power and temperature now; empty where nvidia-smi does not say.

    With the index of a GPU, counted as CUDA counts, this process does not open the device.
    """
    values = (_nvidia_smi(",".join(_CLOCK_FIELDS.values()), index) or "").split(",")
    clocks = {}
    for name, value in zip(_CLOCK_FIELDS, values, strict=False):
        try:
            clocks[name] = float(value)
        except ValueError:
            continue  # "[N/A]"
    return clocks


def package_versions() -> dict[str, str]:
    """Versions of the packages that take part, those installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_commit() -> str:
    """The commit of the checkout this package lies in, marked where files differ from it."""
    here = Path(__file__).resolve().parent
    commit = _output("git", "-C", str(here), "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _nvidia_smi(fields: str, index: int | None = None) -> str | None:
    import torch

    if index is None:
        index = torch.cuda.current_device()
    which = f"--id={_physical(index)}"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", which)


def _physical(index: int) -> str:
    """What nvidia-smi calls a GPU that CUDA numbers among the visible ones: a number or a UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[index].strip() if visible != [""] and index < len(visible) else str(index)


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
