"""Unpack what of a vLLM wheel runs without a GPU: python tests/vllm/unpack.py WHEEL FOLDER

Its compiled parts, which are nine tenths of it, are left out. The version becomes `X+cpu`, from
which vLLM knows that it is to run on the CPU.
"""

import sys
import zipfile
from pathlib import Path

KEPT = (".py", ".json", ".txt", "METADATA", "WHEEL", "entry_points.txt")


def unpack(wheel: Path, folder: Path) -> None:
    """The wheel's Python files and metadata into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(KEPT):
                continue
            data = archive.read(name)
            top, _, rest = name.partition("/")
            if top.endswith(".dist-info"):
                top = top.removesuffix(".dist-info") + "+cpu.dist-info"
                if rest == "METADATA":
                    data = _of_cpu(data)
            target = folder / top / rest
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def _of_cpu(metadata: bytes) -> bytes:
    """METADATA with the version's local part."""
    lines = metadata.decode().split("\n")
    place = next(i for i, line in enumerate(lines) if line.startswith("Version: "))
    lines[place] = lines[place].strip() + "+cpu"
    return "\n".join(lines).encode()


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
