"""Scripts of examples/ run, the tutorial shows them as they are, the reference is up to date."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashcore
from tools.api_reference import PAGE, page

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "cuda_graph.py": "this example needs a Hopper GPU|the graph's result is that of a call",
    "decode_loop.py": r"4 sequences of 108 tokens: KV read 3\.00 times less",
    "shared_prefix.py": r"share=True: 33 groups, .* times less",
    "tree_verify.py": "3 trees of 5 drafts verified",
}
_SHOWN = re.compile(r"<!-- example: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[path.name], done.stdout), done.stdout


def test_the_tutorial_shows_every_example_as_it_is() -> None:
    shown = dict(_SHOWN.findall((ROOT / "docs/tutorial.md").read_text()))
    assert set(shown) == {path.name for path in EXAMPLES}
    for path in EXAMPLES:
        assert shown[path.name] == f"```python\n{path.read_text()}```\n", path.name


def test_the_reference_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python tools/api_reference.py"
    for name in flashcore.__all__:
        assert name == "__version__" or f"## {name}\n" in PAGE.read_text()


def messages() -> list[str]:
    """Every text in the package, with `...` for what is filled in."""
    found = []
    for path in (ROOT / "flashcore").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_what_is_said() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = [q for line in page.splitlines() for q in re.findall(r'^\| "(.*?)"', line)]
    assert len(quoted) >= 6
    texts = messages()
    for quote in quoted:
        pattern = ".*".join(re.escape(part.strip()) for part in quote.split("..."))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), quote
