"""Small transformers models on a Hopper GPU: flashcore's logits beside transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from flashcore.sm90.available import available

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

pytest.importorskip("transformers")

from tests.transformers.models import (  # noqa: E402
    ARCHITECTURES,
    logits,
    models,
    padded,
    random_ids,
    with_flashcore,
)

LENGTH = 97
LENGTHS = (LENGTH, 40, 1)


# Of one length; padded on both sides; packed, by positions that start anew.
@pytest.mark.parametrize("batch", ["full", "left", "right", "packed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_error_in_bfloat16(name: str, batch: str) -> None:
    """At most twice that of transformers' own attention, both against it in fp32."""
    reference = copy.deepcopy(models(name)[0]).cuda()
    ids, options = random_ids(len(LENGTHS), LENGTH).cuda(), dict[str, Any]()
    real = torch.ones_like(ids, dtype=torch.bool)
    if batch == "packed":
        ids, real = ids[:1], real[:1]
        positions = torch.cat([torch.arange(60), torch.arange(1), torch.arange(LENGTH - 61)])
        options["position_ids"] = positions[None].cuda()
    elif batch != "full":
        options["attention_mask"] = padded(LENGTHS, LENGTH, batch).cuda()
        real = options["attention_mask"].bool()
    truth = logits(reference, ids, **options)[real]
    half = copy.deepcopy(reference).bfloat16()
    errors = [
        (logits(model, ids, **options)[real] - truth).square().mean().sqrt()
        for model in (with_flashcore(half).cuda(), half)
    ]
    assert errors[1] > 0
    assert errors[0] <= 2 * errors[1]
