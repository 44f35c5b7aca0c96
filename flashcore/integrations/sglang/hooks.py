"""Puts adjust.py's decisions into the steps of SGLang that resolve a server's arguments.

SGLang 0.5.23 has hooks for its steps, by name; 0.5.16 has methods of ServerArgs, which are wrapped.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from flashcore.integrations.sglang import adjust

logger = logging.getLogger(__name__)

GROUPS = "sglang.srt.arg_groups"
Step = Callable[[Any], None]

_installed = False


def install() -> None:
    """Once in a process; later calls change nothing."""
    global _installed
    if not _installed:
        _installed = True
        _install()


def _install() -> None:
    # The page size has no hook of its own: its default comes soon after the backend's.
    steps = {
        "handle_model_specific_adjustments": model_adjustments,
        "handle_attention_backend_compatibility": after(page_size),
        "handle_speculative_decoding": speculative_decoding,
    }
    try:
        if importlib.util.find_spec(f"{GROUPS}.resolution_hooks") is not None:
            hooks = importlib.import_module(f"{GROUPS}.resolution_hooks")
            for name, wrapper in steps.items():
                hooks.register_resolution_hook(name)(wrapper)
            return
        from sglang.srt.server_args import ServerArgs

        speculative = importlib.import_module(f"{GROUPS}.speculative_hook")
        for name, wrapper in steps.items():
            if hasattr(speculative, name):
                _wrap(speculative, name, wrapper)
            else:
                _wrap(ServerArgs, f"_{name}", wrapper)
    except (AttributeError, ImportError, ValueError) as error:  # a version that is not tested
        logger.warning("flashcore: defaults and lists of names stay SGLang's own: %s", error)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any, Step], None]) -> None:
    previous = getattr(owner, name)

    @functools.wraps(previous)
    def wrapped(server_args: Any) -> None:
        wrapper(server_args, previous)

    setattr(owner, name, wrapped)


def after(step: Step) -> Callable[[Any, Step], None]:
    """A wrapper that runs `step` after SGLang's own."""

    def wrapper(server_args: Any, previous: Step) -> None:
        previous(server_args)
        step(server_args)

    return wrapper


def model_adjustments(server_args: Any, previous: Step) -> None:
    """Refuses what the configuration shows; counts among the backends that a model names."""
    view = _overrides().resolved_view(server_args)
    config = model_config(server_args) if adjust.chosen(view) else None
    if config is None:
        previous(server_args)
        return
    adjust.check_model(config)
    adjust.check_arguments(view)
    architecture = adjust.architecture_of(config)
    if architecture not in adjust.NAMES_BACKENDS:
        previous(server_args)
        return
    with counted_as_fa3():
        previous(server_args)
    logger.info("flashcore: counts as fa3 among the backends that %s allows", architecture)


def page_size(server_args: Any) -> None:
    """Its default, before SGLang's."""
    config = model_config(server_args)
    architecture = "" if config is None else adjust.architecture_of(config)
    chunk = None if config is None else getattr(config.hf_config, "mamba_chunk_size", None)

    def flashcore_page_size(view: Any) -> dict[str, int]:
        return adjust.default_page_size(view, architecture, chunk)

    _overrides().run_post_process_pass(server_args, flashcore_page_size)


def speculative_decoding(server_args: Any, previous: Step) -> None:
    """The draft backend's default; trees over pages, which SGLang allows by name."""
    overrides = _overrides()
    view = overrides.resolved_view(server_args)
    for field, value in adjust.default_draft_backend(view).items():
        if hasattr(overrides, "declare_resolution"):
            overrides.declare_resolution(server_args, "flashcore", **{field: value})
        else:  # 0.5.16 reads the field itself in this step
            setattr(server_args, field, value)
    if not adjust.chosen(view) or adjust.algorithm_of(view) not in adjust.TREES:
        previous(server_args)
        return
    with counted_as_fa3():
        previous(server_args)
    view = overrides.resolved_view(server_args)
    if (view.speculative_eagle_topk or 1) > 1 and view.page_size > 1:
        logger.info("flashcore: counts as fa3 among the backends with draft trees over pages")


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig; None for a model that another instance sends."""
    overrides = _overrides()
    path = str(overrides.resolved_view(server_args).model_path)
    if path.startswith("instance://"):
        return None
    if hasattr(overrides, "model_config_of"):
        return overrides.model_config_of(server_args)
    return server_args.get_model_config()


@contextmanager
def counted_as_fa3() -> Iterator[None]:
    """While SGLang compares names with its lists, the view it reads them from says fa3.

    What a step declares goes to the arguments themselves, where the name stays.
    """
    overrides = _overrides()
    original = overrides.resolved_view

    def resolved_view(server_args: Any) -> Any:
        view = original(server_args)
        overlay = {**overrides._declaration_overlay(server_args), **adjust.counted(view)}
        return type(view)(server_args, overlay=overlay)

    with ExitStack() as stack:
        for module in _readers():
            if getattr(module, "resolved_view", None) is original:
                stack.callback(setattr, module, "resolved_view", original)
                module.resolved_view = resolved_view
        yield


def _readers() -> Iterator[Any]:
    """Modules whose steps read the view."""
    for name in ("overrides", "model_hook", "speculative_hook"):
        if importlib.util.find_spec(f"{GROUPS}.{name}") is not None:
            yield importlib.import_module(f"{GROUPS}.{name}")


def _overrides() -> Any:
    return importlib.import_module(f"{GROUPS}.overrides")
