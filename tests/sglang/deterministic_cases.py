"""Runners of deterministic servers, and stretches of a sequence that is in the cache."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from flashcore.integrations.sglang.register import NAME
from tests.serving_cases import Request
from tests.sglang.batches import Engine, Forward, attend, batch_of


class Overlaid:
    """Arguments with other values: those of SGLang 0.5.23 are sealed."""

    def __init__(self, under: Any, values: dict[str, Any]):
        self.__dict__.update(values, _under=under)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)


def deterministic(**options: Any) -> Any:
    """To prepare a runner."""

    def prepare(runner: Any, layers: Any) -> None:
        wanted = {"enable_deterministic_inference": True, "attention_backend": NAME} | options
        runner.server_args = Overlaid(runner.server_args, wanted)

    return prepare


def stretch(engine: Engine, whole: Forward, begin: int, n: int) -> list[torch.Tensor]:
    """Each layer's output of n tokens of the first request alone, over the cache as `whole` left
    it."""
    mode = ForwardMode.DECODE if n == 1 else ForwardMode.EXTEND
    slots, row = whole.slots[0][: begin + n], int(whole.batch.req_pool_indices[0])
    batch = batch_of(engine, mode, [Request(begin, n)], [slots], [row])
    part = slice(begin, begin + n)
    tensors = ([layer[part] for layer in kind] for kind in (whole.q, whole.k, whole.v))
    forward = Forward(batch, [slots], [n], *tensors)
    engine.backend.init_forward_metadata(batch)
    return attend(engine, forward)
