"""These tests need SGLang, and run where it is: `make test-sglang` installs it for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.sglang import standins

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
collect_ignore_glob = [] if HAS_SGLANG else ["test_*.py"]
if HAS_SGLANG:
    standins.install()


@pytest.fixture(autouse=True)
def first_of_one_rank() -> Iterator[None]:
    """SGLang knows no ranks where nothing is distributed."""
    from sglang.srt.runtime_context import get_parallel

    with get_parallel().override(attn_tp_rank=0):
        yield
