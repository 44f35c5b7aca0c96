"""The plugin's entry point: tells SGLang of the backend `flashcore`."""

from __future__ import annotations

from typing import Any

NAME = "flashcore"


def register() -> None:
    """Add the backend to SGLang's registry and to the choices of its command line.

    SGLang calls it in every process, through the entry point group `sglang.srt.plugins`. It touches
    no device. Calling it again changes nothing.
    """
    from sglang.srt import server_args
    from sglang.srt.layers.attention import attention_registry

    if NAME not in attention_registry.ATTENTION_BACKENDS:
        attention_registry.register_attention_backend(NAME)(_create)
    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])


def _create(model_runner: Any) -> Any:
    """The backend of one model runner; fails here for what the backend does not serve."""
    from flashcore.sglang.backend import FlashcoreBackend

    return FlashcoreBackend(model_runner)
