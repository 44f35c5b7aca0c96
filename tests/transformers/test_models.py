"""Logits of small models through flashcore beside transformers' own attention."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.transformers.models import (
    ARCHITECTURES,
    WINDOW,
    WINDOWED,
    assert_same,
    logits,
    logits_in_chunks,
    models,
    padded,
    random_ids,
    with_flashcore,
)

every_model = pytest.mark.parametrize("name", ARCHITECTURES)
LENGTH = 17  # more than three windows
# A row without padding, some, all but one token, and nothing but padding.
LENGTHS = (LENGTH, 9, 1, 0)


@every_model
@pytest.mark.parametrize("shape", [(3, LENGTH), (1, 1), (2, WINDOW), (2, WINDOW + 1)])
def test_full_batches(name: str, shape: tuple[int, int]) -> None:
    """Also one token, and as many as a window has and one more."""
    reference, ours = models(name)
    ids = random_ids(*shape)
    assert_same(logits(ours, ids), logits(reference, ids))


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(name: str, side: str) -> None:
    """Real tokens only, and no other value at all may come of a row that is all padding."""
    reference, ours = models(name)
    ids, mask = random_ids(4, LENGTH), padded(LENGTHS, LENGTH, side)
    found = logits(ours, ids, attention_mask=mask)
    assert torch.isfinite(found).all()
    assert_same(found, logits(reference, ids, attention_mask=mask), mask)


@every_model
def test_what_stands_in_the_padding_does_not_matter(name: str) -> None:
    _, ours = models(name)
    mask = padded(LENGTHS, LENGTH, "left")
    mask[1] = padded((6,), LENGTH, "right")
    ids = random_ids(4, LENGTH)
    other = torch.where(mask.bool(), ids, random_ids(4, LENGTH, seed=1))
    assert not torch.equal(ids, other)
    found, expected = (logits(ours, x, attention_mask=mask) for x in (other, ids))
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


@every_model
def test_packed_sequences(name: str) -> None:
    """Position ids that start anew; each sequence is what it is alone. gpt-oss does not tell its
    masks of them: there as in transformers, one sequence."""
    reference, ours = models(name)
    lengths = (8, 1, 12, 3)
    ids = random_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(x) for x in lengths])[None]
    found = logits(ours, ids, position_ids=positions)
    assert_same(found, logits(reference, ids, position_ids=positions))
    if name != "gpt_oss":
        assert_same(found, _one_by_one(reference, ids, lengths))


@every_model
def test_packed_sequences_by_their_ends(name: str) -> None:
    """cu_seq_lens_q and the others, as transformers' data collators give them."""
    reference, ours = models(name)
    lengths = (8, 1, 12)
    ids = random_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(x) for x in lengths])[None]
    ends = torch.tensor([0, 8, 9, 21], dtype=torch.int32)
    for longest in (12, torch.tensor(12)):
        found = logits(
            ours,
            ids,
            position_ids=positions,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=longest,
            max_length_k=longest,
        )
        assert_same(found, _one_by_one(reference, ids, lengths))


def _one_by_one(
    model: PreTrainedModel, ids: torch.Tensor, lengths: tuple[int, ...]
) -> torch.Tensor:
    return torch.cat([logits(model, part) for part in ids.split(lengths, 1)], 1)


def test_packed_rows_of_a_batch() -> None:
    reference, ours = models("mistral")
    ids = random_ids(2, 12)
    positions = torch.stack([torch.arange(12), torch.cat([torch.arange(7), torch.arange(5)])])
    expected = logits(reference, ids, position_ids=positions)
    assert_same(logits(ours, ids, position_ids=positions), expected)


@every_model
@pytest.mark.parametrize("mask", [None, padded(LENGTHS, LENGTH, "left")], ids=["full", "left"])
def test_chunks_with_a_dynamic_cache(name: str, mask: torch.Tensor | None) -> None:
    """Several tokens on a cache, then one at a time; a window's cache keeps what it reaches."""
    reference, ours = models(name)
    ids, chunks = random_ids(4, LENGTH), (7, 1, 6, 1, 2)
    found, expected = (logits_in_chunks(x, ids, chunks, "dynamic", mask) for x in (ours, reference))
    assert_same(found, expected, mask)
    if mask is None:
        assert_same(found, logits(reference, ids))


@every_model
@pytest.mark.parametrize("mask", [None, padded(LENGTHS, LENGTH, "left")], ids=["full", "left"])
def test_static_caches(name: str, mask: torch.Tensor | None) -> None:
    """Rows of the cache past those filled are not seen: they are NaN here."""
    if name == "deepseek_v3" and transformers.__version__ < "5":
        pytest.skip("this transformers has no static cache for values narrower than keys")
    reference, ours = models(name)
    ids, chunks = random_ids(4, LENGTH), (11, *[1] * 6)
    found = logits_in_chunks(ours, ids, chunks, "static", mask, poison=True)
    assert_same(found, logits_in_chunks(reference, ids, chunks, "static", mask), mask)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_chunks_with_a_static_cache(name: str) -> None:
    reference, ours = models(name)
    ids, chunks = random_ids(3, LENGTH), (6, 5, 1, 5)
    if name in WINDOWED and transformers.__version__ < "5":
        # This transformers' own static windows drop keys that the chunk's first tokens would see.
        with pytest.raises(NotImplementedError, match="positions 6 to 10 on keys at 2 to 6"):
            logits_in_chunks(ours, ids, chunks, "static")
        return
    for length in (LENGTH, 32):  # a cache that is full in the end, and one that is not
        found = logits_in_chunks(ours, ids, chunks, "static", length=length)
        assert_same(found, logits(reference, ids))


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_padding_between_tokens(name: str) -> None:
    """A prompt padded on the right, and tokens behind it; windows that reach no hole, or all."""
    reference, ours = models(name)
    if name in WINDOWED:
        mask = torch.ones(2, WINDOW, dtype=torch.long)
        mask[0, 2] = 0
    else:
        mask = torch.ones(3, LENGTH, dtype=torch.long)
        mask[0, 4:9] = 0
        mask[1, :3] = mask[1, 8] = mask[1, -1] = 0
    ids = random_ids(*mask.shape)
    expected = logits(reference, ids, attention_mask=mask)
    assert_same(logits(ours, ids, attention_mask=mask), expected, mask)


def test_padding_between_tokens_with_a_cache() -> None:
    reference, ours = models("llama")
    ids, mask = random_ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, 6:9], mask[1, :2] = 0, 0
    found, expected = (
        logits_in_chunks(x, ids, (9, 1, 4, 3), "dynamic", mask) for x in (ours, reference)
    )
    assert_same(found, expected, mask)


@every_model
def test_error_in_bfloat16(name: str) -> None:
    """At most twice that of transformers' own attention, both against fp32."""
    reference, _ = models(name)
    ids, mask = random_ids(4, LENGTH), padded(LENGTHS, LENGTH, "left")
    truth = logits(reference, ids, attention_mask=mask)[mask.bool()]
    half = copy.deepcopy(reference).bfloat16()
    errors = [
        (logits(model, ids, attention_mask=mask)[mask.bool()] - truth).square().mean().sqrt()
        for model in (with_flashcore(half), half)
    ]
    assert errors[1] > 0
    assert errors[0] <= 2 * errors[1]
