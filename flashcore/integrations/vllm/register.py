"""The plugin's entry point: tells vLLM of the backend."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

BACKEND = "flashcore.integrations.vllm.backend.FlashcoreBackend"


def register() -> None:
    """Add the backend to vLLM's registry.

    vLLM calls it in every process, through the entry point group `vllm.general_plugins`, before its
    arguments are checked. `--attention-backend FLASHCORE` where vLLM takes new names (0.33), else
    `--attention-backend CUSTOM`. It touches no device. Calling it again changes nothing.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from flashcore.integrations.vllm.versions import backend_name, log_with_vllm, takes_names

    log_with_vllm()
    name = backend_name()
    if name not in AttentionBackendEnum.__members__:
        if takes_names():
            register_backend(name, BACKEND)
        return
    member = AttentionBackendEnum[name]
    if not member.is_overridden():
        register_backend(member, BACKEND)
    elif member.get_path() != BACKEND:
        logger.warning(
            "flashcore attention is not registered: vLLM's backend %s is %s already",
            *(name, member.get_path()),
        )
