"""Links between pages lead to files and headings that are there; so do the pages and files that
code and pages name."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_NAMED = re.compile(r"\bdocs/[\w/.-]+\.(?:md|png)(?:#[\w-]+)?")
_SOURCES = ("flashcore", "tests", "tools", "benchmarks", "examples", "make", ".github", ".ci")
_PATH = re.compile(r"`([\w.{},-]+/[\w./{},-]*)`")
# What a page's short paths may be relative to.
_BASES = ("", "flashcore", "flashcore/sm90", "flashcore/sm90/kernels")
_TO_COME = "sm100/"  # design.md tells how it would
_PATHS_OF = ("design", "glossary", "runtime", "kernels/dense", "kernels/paged", "kernels/planner")


def anchors(page: Path) -> set[str]:
    """As GitHub names the headings of a page: lower case, words joined by dashes."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", _FENCE.sub("", page.read_text()), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = next(n for n in range(1000) if _numbered(slug, n) not in found)
        found.add(_numbered(slug, number))
    return found


def _numbered(slug: str, number: int) -> str:
    return f"{slug}-{number}" if number else slug


def broken(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text()))
    links = [link for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link)]
    return [link for link in links if not _leads(page, link)]


def _leads(page: Path, link: str) -> bool:
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    if not target.exists():
        return False
    return not anchor or (target.suffix == ".md" and anchor in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = _LINK.findall(page.read_text())
        files = (link.partition("#")[0] for link in links if ":" not in link)
        todo += [(page.parent / file).resolve() for file in files if file]
    assert {page for page in PAGES if ROOT / "docs" in page.parents} <= reached


def test_pages_named_in_code_are_there() -> None:
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "MANIFEST.in"]
    files += [f for folder in _SOURCES for f in (ROOT / folder).rglob("*") if f.suffix != ".pyc"]
    named = [
        (file.relative_to(ROOT).as_posix(), name)
        for file in files
        if file.is_file() and file.suffix in (".py", ".mk", ".toml", ".yml", "", ".in")
        for name in _NAMED.findall(file.read_text())
        if file != Path(__file__).resolve()
    ]
    assert len(named) > 10
    assert [(file, name) for file, name in named if not _leads(ROOT / "README.md", name)] == []


@pytest.mark.parametrize("name", _PATHS_OF)
def test_files_named_in_pages_are_there(name: str) -> None:
    named = files_named((ROOT / "docs" / f"{name}.md").read_text())
    assert [path for path in named if not _is_there(path)] == []


def files_named(text: str) -> list[str]:
    """Folders and files between backticks; not those of a name to be chosen (`docs/ENGINE.md`)."""
    paths = [path for path in _PATH.findall(_FENCE.sub("", text)) if re.search(r"/$|\.\w+$", path)]
    spelled = [one for path in paths for one in _spelled_out(path)]
    return [path for path in spelled if not re.search("[A-Z]{3}", path) and path != _TO_COME]


def _is_there(path: str) -> bool:
    return any((ROOT / base / path).exists() for base in _BASES)


def _spelled_out(path: str) -> list[str]:
    """a/{b,c}/d as a/b/d and a/c/d."""
    parts = re.split(r"\{([^}]*)\}", path)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# One `two`: three\n\n## Same\n\n## Same\n\n```bash\n# No heading\n```\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#one-two-three) [c](other.md#same-1) [d](https://x.y/z)"
    page.write_text(f"{good} `[e](nowhere.md)`\n\n```\n[f](nowhere.md)\n```\n")
    assert broken(page) == []
    bad = ("gone.md", "other.md#no-heading", "other.md#same-2", "#nothing", "other.md/x")
    page.write_text(good + "".join(f" [x]({link})" for link in bad))
    assert broken(page) == list(bad)


def test_a_file_that_has_moved_is_found() -> None:
    named = files_named("`planner/{split,work}.py`, `docs/`, `planner/x`, `docs/NAME.md`")
    assert named == ["planner/split.py", "planner/work.py", "docs/"]
    assert [path for path in named if not _is_there(path)] == ["planner/work.py"]
