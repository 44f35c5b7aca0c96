"""What the README and the docs say: tables are those of the measured files, the example runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MARKER = re.compile(r"<!-- table: (\S+) -->\n")


@pytest.fixture(scope="module")
def report() -> Any:
    """benchmarks/report.py as a module."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_the_result_files_say(report: Any) -> None:
    pages = {page: page.read_text() for page in report.PAGES}
    assert ROOT / "README.md" in pages
    assert ROOT / "docs" / "results.md" in pages
    for page, text in pages.items():
        assert report.filled(text) == text, f"{page}: run python benchmarks/report.py"
    places = [(name, page) for page, text in pages.items() for name in MARKER.findall(text)]
    assert {name for name, _ in places} == set(report.TABLES) | set(report.LATER)
    assert len(places) == len({name for name, _ in places}), "a table stands in two places"
    for name, (file, _) in report.TABLES.items():
        assert (ROOT / "benchmarks" / "results" / file).exists(), file
        page = dict(places)[name]
        assert f"<!-- table: {name} -->\n| " in pages[page]


def test_a_figure_changed_by_hand_shows(report: Any) -> None:
    for page in report.PAGES:
        text = page.read_text()
        for name, table in re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", text, re.S):
            file, _ = {**report.TABLES, **report.LATER}[name]
            if not (ROOT / "benchmarks" / "results" / file).exists():
                assert table == "Not measured yet.\n"
                continue
            changed = text.replace(table, re.sub(r"\d(?=[^\d]*$)", "x", table.rstrip()) + "\n")
            assert changed != text
            assert report.filled(changed) == text


def test_the_readme_has_one_measured_table_and_one_picture() -> None:
    assert MARKER.findall(README) == ["headline"]
    assert len(re.findall(r"!\[", README)) == 1


def test_commands_of_the_readme_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\S+)", README, re.M)
    assert commands == ["demo", "test"]
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.M), command


def test_the_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert isinstance(scope["out"], torch.Tensor)
    assert bool(torch.isfinite(scope["out"]).all())
