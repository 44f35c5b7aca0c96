"""`flashcore info`: what is installed, what devices there are, and which path each one takes."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from typing import Any

import flashcore

PACKAGES = ("torch", "numpy", "nvidia-cutlass-dsl", "apache-tvm-ffi", "sglang", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Collect and print."""
    report = collect()
    print(json.dumps(report) if args.json else _text(report))
    return 0


def collect() -> dict[str, Any]:
    """versions: package -> version or None; impl: what calls take that do not choose; devices: what
    each is, its path and the reason; kernels: where compiled ones come from."""
    import torch

    from flashcore.dispatch import device_path, wanted

    names = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = []
    for name in names:
        device = torch.device(name)
        described = platform.processor() or platform.machine()
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            described = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
        path = device_path(device)
        devices.append(
            {"device": name, "name": described, "path": path.name, "reason": path.reason}
        )
    versions = {"flashcore": flashcore.__version__, "python": platform.python_version()}
    return {
        "versions": versions | {p: _version(p) for p in PACKAGES},
        "impl": wanted(None),
        "devices": devices,
        "kernels": _kernels(),
    }


def _kernels() -> dict[str, str]:
    """installed: those that came with the package; cache: those that this user has compiled;
    compiler: whether more can be compiled."""
    from flashcore.jit.build import compiler_installed
    from flashcore.jit.folder import default_folder
    from flashcore.jit.packaged import open_packaged
    from flashcore.jit.target import MissingRuntimeError, detect_target

    try:
        packaged, reason = open_packaged(detect_target())
    except MissingRuntimeError as error:
        packaged, reason = None, str(error)
    installed = reason
    if packaged is not None:
        built = packaged.target
        installed = f"{packaged.count()} for {built.arch}, CuTe DSL {built.dsl} {built.toolkit}"
    try:
        folder = default_folder()
        cached = f"{sum(1 for _ in folder.glob('*.so')) if folder.is_dir() else 0} in {folder}"
    except OSError as error:
        cached = f"none: {error}"
    return {
        "installed": installed,
        "cache": cached,
        "compiler": "installed" if compiler_installed() else "not installed",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"{name:20}{version or 'not installed'}" for name, version in report["versions"].items()
    ]
    for device in report["devices"]:
        lines += ["", f"{device['device']}: {device['name']}"]
        if device["path"] == "none":
            lines.append(f"  no kernels: {device['reason']}")
            lines.append("  torch operators run there with impl='eager' or FLASHCORE_IMPL=eager")
        else:
            lines.append(f"  {device['path']} path: {device['reason']}")
    lines += ["", "kernels"]
    lines += [f"  {name:18}{what}" for name, what in report["kernels"].items()]
    if report["impl"] != "auto":
        lines += [
            "",
            f"FLASHCORE_IMPL={report['impl']}: torch operators wherever a call may choose",
        ]
    return "\n".join(lines)
