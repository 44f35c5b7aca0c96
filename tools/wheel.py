"""Build a wheel with compiled kernels in it; needs the CuTe DSL, a linker and setuptools, no GPU:

    python -m tools.wheel [--out DIR] [--jobs N] [--url URL]

Every kernel that flashcore ships is compiled (into the user's cache, so that the next time it is
there) and lies in the wheel as flashcore/_kernels. Where that wheel is installed they need neither
the DSL's Python packages nor a compiler, only its runtime library and apache-tvm-ffi.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flashcore.jit.cache import KernelCache
from flashcore.jit.folder import default_folder
from flashcore.jit.gates import default_jobs
from flashcore.jit.kernel import Kernel
from flashcore.jit.packaged import FOLDER, pack
from flashcore.jit.prebuild import prebuild
from flashcore.sm90.shipped import shipped_kernels
from tools.index_page import point_at

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE")
# The kernels' shared objects need no library at all, so they set no limit on the C library; those
# that they are loaded beside want this one.
PLATFORM = f"manylinux_2_28_{platform.machine()}"
_BUILD = """
import sys
from setuptools.build_meta import build_wheel
print(build_wheel(sys.argv[1], {"--build-option": ["--plat-name", sys.argv[2]]}))
"""


def build(
    kernels: Sequence[Kernel],
    out: Path,
    jobs: int,
    folder: Path | None = None,
    url: str | None = None,
) -> Path:
    """The wheel, in `out`. folder: the cache to compile into; the user's where not given. url: of
    the repository, for the index page."""
    cache = KernelCache.open(folder or default_folder())
    failed = [b for b in prebuild(kernels, cache.folder, cache.target, jobs) if b.error]
    if failed:
        raise SystemExit("\n".join(f"{b.kernel.describe()}: {b.error}" for b in failed))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flashcore-wheel-") as scratch:
        stage = Path(scratch)
        for name in FILES:
            shutil.copy(ROOT / name, stage)
        if url:
            point_at(stage, url)
        leave = shutil.ignore_patterns("__pycache__", FOLDER.name)
        shutil.copytree(ROOT / "flashcore", stage / "flashcore", ignore=leave)
        entries = [cache.path(kernel).read_bytes() for kernel in kernels]
        pack(kernels, entries, cache.target, stage / "flashcore" / FOLDER.name)
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, str(out.resolve()), PLATFORM],
            cwd=stage,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise SystemExit(f"building the wheel failed:\n{done.stderr}")
    return out / done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR")
    parser.add_argument("--jobs", type=int, default=default_jobs(), metavar="N")
    parser.add_argument("--url", help="of the repository, for the README's links")
    options = parser.parse_args()
    kernels = shipped_kernels()
    wheel = build(kernels, options.out, options.jobs, url=options.url)
    print(f"{wheel}: {len(kernels)} kernels, {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
