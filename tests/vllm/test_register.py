"""The plugin: vLLM's registry, its entry point, its command line and its log."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
from pathlib import Path

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flashcore.integrations.vllm import register, versions
from flashcore.integrations.vllm.backend import FlashcoreBackend
from flashcore.integrations.vllm.register import BACKEND
from tests.vllm.conftest import Log

ROOT = Path(__file__).parents[2]
NAME = versions.backend_name()


def test_the_name_is_the_one_that_the_version_has_room_for() -> None:
    version = importlib.metadata.version("vllm")
    assert ("FLASHCORE" if version.startswith("0.33.") else "CUSTOM") == NAME
    assert FlashcoreBackend.get_name() == NAME
    assert AttentionBackendEnum[NAME].get_class() is FlashcoreBackend


def test_registering_again_changes_nothing() -> None:
    before = dict(AttentionBackendEnum.__members__)
    register()
    register()
    assert dict(AttentionBackendEnum.__members__) == before


def test_another_s_backend_is_left_alone(log: Log) -> None:
    member = AttentionBackendEnum[NAME]
    register_backend(member, "a.package.Backend")
    try:
        register()
        assert member.get_path() == "a.package.Backend"
        if not versions.takes_names():  # a name of our own is nobody else's
            assert "CUSTOM is a.package.Backend already" in "".join(log.messages)
    finally:
        register_backend(member, BACKEND)


def test_the_entry_point_is_declared() -> None:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        pytest.skip("no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["vllm.general_plugins"]
    module, function = points["flashcore"].split(":")
    assert getattr(importlib.import_module(module), function) is register
    oldest, newest = (part.split("=")[-1].lstrip("<") for part in _bounds(project))
    assert (oldest, newest) == ("0.26", "0.34")


def _bounds(project: dict[str, dict[str, list[str]]]) -> list[str]:
    (requirement,) = project["optional-dependencies"]["vllm"]
    return requirement.removeprefix("vllm").split(",")


def test_the_command_line_takes_the_name() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--attention-backend", NAME, "--model", "nothing"])
    assert isinstance(arguments, argparse.Namespace)
    engine = EngineArgs.from_cli_args(arguments)
    assert AttentionBackendEnum[NAME] in (
        engine.attention_backend,
        getattr(AttentionBackendEnum, str(engine.attention_backend), None),
    )


def test_messages_go_where_vllm_s_go() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    theirs = logging.getLogger("vllm")
    theirs.addHandler(handler)
    level = theirs.level
    try:
        for enabled in (logging.INFO, logging.WARNING):
            theirs.setLevel(enabled)
            logging.getLogger("flashcore.serving.counters").info("reuse: %d", 3)
    finally:
        theirs.removeHandler(handler)
        theirs.setLevel(level)
    assert [record.getMessage() for record in records] == ["reuse: 3"]
    handlers = logging.getLogger("flashcore").handlers
    assert [type(one).__name__ for one in handlers].count("_ToVllm") == 1


def test_a_model_s_configuration_is_resolved_with_it() -> None:
    """Preferred blocks too, where vLLM's platform asks the backend for them."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(ROOT / "tests/data/models/llama"),
        skip_tokenizer_init=True,
        load_format="dummy",
        attention_backend=NAME,
        max_model_len=512,
    ).create_engine_config()
    assert config.attention_config.backend is AttentionBackendEnum[NAME]
    assert FlashcoreBackend.get_preferred_block_size(16) == 64
