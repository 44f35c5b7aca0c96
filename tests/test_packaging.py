"""What is given away: the sdist is the whole repository, an index page's links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tools.index_page import ROOT, absolute_links, copy_tree, point_at, with_urls

if sys.version_info >= (3, 11):
    import tomllib

URL = "https://host.example/group/flashcore"
_BUILD = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_the_sdist_is_the_repository(tmp_path: Path) -> None:
    """Every file of the tree, so that tests, docs and make targets work from it."""
    stage = tmp_path / "stage"
    copy_tree(stage)
    expected = files(stage)
    assert {"Makefile", "tests/test_packaging.py", ".github/workflows/ci.yml"} <= expected
    subprocess.run([sys.executable, "-c", _BUILD, str(tmp_path)], cwd=stage, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {n.partition("/")[2] for n in packed.getnames()}
    assert sorted(expected - names) == []


def test_links_of_an_index_page_are_absolute() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.search(r"\]\(docs/", text)
    shown = absolute_links(text, URL)
    links = re.findall(r"\]\(([^()\s]+)\)", shown)
    assert len(links) == len(re.findall(r"\]\(([^()\s]+)\)", text))
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert f"]({URL}/raw/main/docs/paged_h100.png)" in shown
    for page in re.findall(rf"{URL}/(?:blob|raw)/main/([^)#]+)", shown):
        assert (ROOT / page).exists(), page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](b.md#c)", f"[a]({URL}/blob/main/b.md#c)"),
        ("![a](b.png)", f"![a]({URL}/raw/main/b.png)"),
        ("[a](#c) [b](https://x.y/z)", "[a](#c) [b](https://x.y/z)"),
        ("[![a](b.png)](c.md)", f"[![a]({URL}/raw/main/b.png)]({URL}/blob/main/c.md)"),
    ],
)
def test_which_links_are_rewritten(text: str, expected: str) -> None:
    assert absolute_links(text, URL) == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is newer than this Python")
def test_the_project_s_urls() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    made = tomllib.loads(with_urls(text, URL))
    urls = made["project"].pop("urls")
    assert urls["Homepage"] == URL
    assert all(page.startswith(URL) for page in urls.values())
    assert made == tomllib.loads(text)


@pytest.mark.parametrize(
    "url", ["", "host.example/x", "http://host.example/x", f"{URL}/", "https://x"]
)
def test_what_is_no_url_is_refused(url: str, tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    with pytest.raises(SystemExit, match="--url must be"):
        point_at(tmp_path, url)
