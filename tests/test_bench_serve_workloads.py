"""Workloads of the serving benchmark and their prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashcore.bench.serve.shapes import model_shape
from flashcore.bench.serve.workloads import PRESETS, Prompts, parse_workload

VOCAB = 1000


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_spec_says(name: str) -> None:
    preset = parse_workload(name)
    again = parse_workload(preset.spec)
    assert replace(again, name=name) == preset
    assert preset.prompt + preset.output <= model_shape(preset.model or "llama-3.1-8b").longest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64x16384", "unknown workload '64x16384': one of shared-16k"),
        ("0x10+1:4", "sequences must be at least 1"),
        ("4x10+1:0", "output must be at least 1"),
        ("4x0+0:3", "its prompts have no token"),
        ("", "unknown workload ''"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_workload(text)


def test_prefixes_are_shared_within_a_group_and_nothing_else_is() -> None:
    workload = parse_workload("3*4x20+7:5")
    prompts = Prompts(workload, VOCAB, seed=0)
    batch = prompts.batch()
    assert len(batch) == workload.batch == 12
    assert {len(prompt) for prompt in batch} == {27}
    assert all(10 <= token < VOCAB for prompt in batch for token in prompt)
    groups = [batch[start : start + 4] for start in (0, 4, 8)]
    for group in groups:
        assert len({tuple(prompt[:20]) for prompt in group}) == 1
    assert len({group[0][0] for group in groups}) == 3
    assert len({prompt[20] for prompt in batch}) == 12
    later = prompts.batch()
    assert [prompt[:20] for prompt in later] == [prompt[:20] for prompt in batch]
    assert not {prompt[20] for prompt in later} & {prompt[20] for prompt in batch}
    assert Prompts(workload, VOCAB, seed=0).batch() == batch
    assert Prompts(workload, VOCAB, seed=1).batch() != batch


def test_samples_of_a_prompt_are_identical() -> None:
    batch = Prompts(parse_workload("2*3x8+0:4"), VOCAB, seed=0).batch()
    assert batch[0] == batch[1] == batch[2] != batch[3] == batch[5]


def test_running_out_of_distinct_tokens_is_an_error() -> None:
    prompts = Prompts(parse_workload("8x4+2:4"), 20, seed=0)
    with pytest.raises(ValueError, match="all 10 distinct first tokens are used up"):
        prompts.batch(), prompts.batch()


@pytest.mark.parametrize("text", ["3*4x20+7:5", "5x16+0:3", "4x3+9:6", "6x0+5:4", "2*2x9+1:8"])
@pytest.mark.parametrize("page", [1, 4, 8])
def test_token_counts_agree_with_a_prefix_cache(text: str, page: int) -> None:
    workload = parse_workload(text)
    batch = Prompts(workload, VOCAB, seed=3).batch()
    pages, tokens = set(), 0
    for number, prompt in enumerate(batch):
        length = len(prompt) + workload.output
        for start in range(0, length, page):
            # A page is shared if it lies before the prompt's last token, which is computed anew.
            whole = start + page <= len(prompt) - 1
            key = tuple(prompt[: start + page]) if whole else (number, start)
            tokens += 0 if key in pages else min(page, length - start)
            pages.add(key)
    assert workload.tokens_unique(workload.output, page) == tokens
    assert workload.capacity(page) == len(pages) * page
    assert workload.tokens_per_sequence(workload.output) == sum(
        len(prompt) + workload.output for prompt in batch
    )
