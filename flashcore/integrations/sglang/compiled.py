"""The backend's call under torch.compile: one operator that the compiler does not look into.

    traced forward ─► flashcore::sglang_attention(q, k, v, out, ...) ─► FlashcoreBackend.run_layer

SGLang compiles a model's forward and captures what comes out in a CUDA graph (0.5.16 and 0.5.23:
--enable-torch-compile). The operator has tensors and numbers alone; backend and layer are found by
number when it runs.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch

_NUMBER = "_flashcore_number"  # of a layer among its model's
_backends: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number_layers(layers: list[Any]) -> None:
    """Give each layer its place in `layers`, which the compiler sees as a constant."""
    for number, layer in enumerate(layers):
        setattr(layer, _NUMBER, number)


def enter(backend: Any) -> int:
    """A number for `backend`, by which the operator finds it."""
    number = max(_backends, default=-1) + 1
    _backends[number] = backend
    return number


def attend(
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out: torch.Tensor,
    layer: Any,
    loc: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """`backend.run_layer`, seen by the compiler as one operator that writes `out`.

    A layer that was not in the model when the backend was made has no number: the compiler breaks
    its graph around it.
    """
    number = getattr(layer, _NUMBER, None)
    if number is None:
        _untraced(backend, q, k, v, out, layer, loc, sinks)
    else:
        torch.ops.flashcore.sglang_attention(backend.number, number, q, k, v, out, loc, sinks)


@torch.compiler.disable
def _untraced(backend: Any, *arguments: Any) -> None:
    backend.run_layer(*arguments)


@torch.library.custom_op("flashcore::sglang_attention", mutates_args=("out",), device_types=None)
def _operator(
    backend: int,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out: torch.Tensor,
    loc: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """q [tokens, heads * head_dim] to out, of its shape; k and v [tokens, heads, head_dim] to the
    slots loc, if any."""
    found = _backends[backend]
    found.run_layer(q, k, v, out, found.layers[layer], loc, sinks)


@_operator.register_fake
def _fake(
    backend: int,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out: torch.Tensor,
    loc: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    return None
