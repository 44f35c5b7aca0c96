"""The plugin's entry point: tells SGLang of the backend `flashcore`."""

from __future__ import annotations

from typing import Any

from flashcore.integrations.sglang.names import NAME as NAME


def register() -> None:
    """Add the backend to SGLang's registry and to the choices of its command line.

    SGLang calls it in every process, through the entry point group `sglang.srt.plugins`, before its
    own launchers read their arguments. A launcher that makes SGLang's parser or a ServerArgs of its
    own calls it first; then `ServerArgs.add_cli_args` accepts `--attention-backend flashcore`, and
    the defaults and lists of names that docs/sglang.md tells of are in place. It touches no device.
    Calling it again changes nothing.
    """
    from sglang.srt import server_args
    from sglang.srt.layers.attention import attention_registry

    from flashcore.integrations.sglang import deterministic, hooks

    if NAME not in attention_registry.ATTENTION_BACKENDS:
        attention_registry.register_attention_backend(NAME)(_create)
    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])
        deterministic.add_names()
    hooks.install()


def _create(model_runner: Any) -> Any:
    """The backend of one model runner; fails here for what the backend does not serve."""
    from flashcore.integrations.sglang.backend import FlashcoreBackend

    return FlashcoreBackend(model_runner)
