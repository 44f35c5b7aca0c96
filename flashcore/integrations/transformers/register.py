"""Make `attn_implementation="flashcore"` known to transformers."""

from __future__ import annotations

import functools
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from flashcore.integrations.transformers.attention import attention_forward
from flashcore.integrations.transformers.mask import attention_spans
from flashcore.integrations.transformers.rules import check_meanings

NAME = "flashcore"
OLDEST = "4.56"  # as pyproject.toml has it
_PAGED = f"paged|{NAME}"


def register() -> None:
    """Register the name "flashcore"; again, it does nothing.

    Besides the two functions that transformers has places for, `PreTrainedModel` is made to take
    the name as it is. Newer versions think of any name with "flash" in it as FlashAttention, whose
    package they would load, or put another implementation in its place; and a model whose layers
    have attention of their own, apart from that interface, must not be built under this name.

    Raises:
        ImportError: without transformers, or with one that is too old.
        RuntimeError: where this transformers has masks that mean something else by these names.
    """
    _check_installed()
    from transformers import PreTrainedModel, masking_utils
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    chosen = PreTrainedModel._check_and_adjust_attn_implementation
    if getattr(chosen, "of_flashcore", False):
        return
    check_meanings(masking_utils)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_spans)

    @functools.wraps(chosen)
    def choose(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation not in (NAME, _PAGED):
            return chosen(self, attn_implementation, *args, **kwargs)
        refuse_model(type(self), attn_implementation)
        return NAME

    choose.of_flashcore = True  # type: ignore[attr-defined]
    PreTrainedModel._check_and_adjust_attn_implementation = choose


def _check_installed() -> None:
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "transformers is not installed: pip install 'flashcore-attention[transformers]'",
            name="transformers",
        )
    if find_spec("transformers.masking_utils") is None:
        raise ImportError(
            f"flashcore.integrations.transformers needs transformers {OLDEST} or newer, this is "
            f"{version('transformers')}"
        )


def refuse_model(model: Any, attn_implementation: str) -> None:
    """Raises where models of this class would not compute their attention through flashcore."""
    if attn_implementation == _PAGED:
        raise NotImplementedError(
            f"attn_implementation={_PAGED!r}: flashcore does not serve transformers' continuous "
            "batching; use attn_implementation='sdpa'"
        )
    if not model._can_set_attn_implementation():
        raise NotImplementedError(
            f"attn_implementation={NAME!r}: {model.__name__} computes attention by code of its "
            "own, not through transformers' attention interface; use attn_implementation='eager'"
        )
