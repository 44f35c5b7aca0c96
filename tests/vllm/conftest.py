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


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What flashcore says, which goes to vLLM's logger alone."""
    ours = logging.getLogger("flashcore")
    ours.addHandler(caplog.handler)
    yield caplog
    ours.removeHandler(caplog.handler)
