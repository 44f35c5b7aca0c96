"""What a package index shows: the README with links that lead to the repository, and its URLs.

    python -m tools.index_page --url URL STAGE    # a copy of this tree, made ready to build

The repository itself has relative links, which its own pages and checkouts follow.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^()\s]+)\)")
_PICTURES = (".png", ".svg")
_MADE = (".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def absolute_links(text: str, url: str) -> str:
    """`text` with its relative links, and its pictures, at `url`."""

    def at_url(link: re.Match[str]) -> str:
        how = "raw" if link[1].endswith(_PICTURES) else "blob"
        return f"]({url}/{how}/main/{link[1]})"

    return _LINK.sub(at_url, text)


def with_urls(pyproject: str, url: str) -> str:
    """`pyproject` with the project's URLs."""
    pages = {
        "Homepage": url,
        "Documentation": f"{url}/blob/main/docs/tutorial.md",
        "Changelog": f"{url}/blob/main/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    table = "".join(f'{name} = "{page}"\n' for name, page in pages.items())
    return pyproject.replace("[project.scripts]", f"[project.urls]\n{table}\n[project.scripts]", 1)


def point_at(stage: Path, url: str) -> None:
    """Rewrite README.md and pyproject.toml of a copy of the tree."""
    if not re.fullmatch(r"https://[^\s/]+/\S*[^\s/]", url):
        raise SystemExit(f"--url must be that of the repository, https://HOST/PATH, got {url!r}")
    for name, rewritten in (("README.md", absolute_links), ("pyproject.toml", with_urls)):
        file = stage / name
        file.write_text(rewritten(file.read_text(), url))


def copy_tree(stage: Path) -> None:
    """This tree without what was made in it: of a checkout what git does not ignore, of an unpacked
    sdist what `make clean` leaves."""
    if not (ROOT / ".git").exists():
        shutil.copytree(ROOT, stage, ignore=shutil.ignore_patterns(*_MADE), symlinks=True)
        return
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # not one that is being removed
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, stage / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of the repository; without it links stay relative")
    parser.add_argument("stage", type=Path, metavar="STAGE", help="a folder to make")
    options = parser.parse_args()
    copy_tree(options.stage)
    if options.url:
        point_at(options.stage, options.url)
    else:
        print("no URL: on an index page the README's links will lead nowhere (make dist URL=...)")


if __name__ == "__main__":
    main()
