"""These tests need vLLM, and run where it is: `make test-vllm` installs what they need of it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]
if HAS_VLLM:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def registered() -> None:
    """As vLLM's loader of plugins does it."""
    from flashcore.integrations.vllm import register

    register()


class Log(logging.Handler):
    """Messages, each once, whatever handlers vLLM's logger and its parents have."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[Log]:
    """What flashcore says, which goes to vLLM's logger alone."""
    ours, handler = logging.getLogger("flashcore"), Log()
    ours.addHandler(handler)
    yield handler
    ours.removeHandler(handler)
