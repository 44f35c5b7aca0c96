"""Builder and implementation on the CPU, through vLLM's own layers, beside the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests import serving_cases as cases
from tests.compare import assert_close
from tests.serving_cases import Request
from tests.vllm.batches import Setup, attend, expected, make_engine, make_forward

FORWARDS: dict[str, Callable[[], list[Request]]] = {
    "decode": cases.decode,
    "prefill": cases.extend,
    "mixed": cases.mixed,
}
SETUPS = {
    "16": Setup(16),
    "64": Setup(64),
    "128": Setup(128),
    "one KV head": Setup(64, heads=(8, 1)),
    "no groups of heads": Setup(16, heads=(3, 3), head_dim=24),
    "HND": Setup(16, layout="HND"),
    "padded blocks": Setup(16, gap=48),
    "window": Setup(16, windows=(40,)),
    "window of a block": Setup(64, windows=(64,)),
    "window of one": Setup(16, windows=(1,)),
    "hybrid": Setup(16, windows=(None, 40, 40)),
    "windows in a group of full attention": Setup(16, second=40),
    "sinks": Setup(16, windows=(None, 128), sinks=True),
    "softcap": Setup(16, windows=(None, 100), softcap=2.0),
}


def check(setup: Setup, requests: list[Request], padded: int = 0, padded_tokens: int = 0) -> None:
    engine = make_engine(setup)
    forward = make_forward(engine, requests, padded, padded_tokens)
    for actual, exact in zip(attend(engine, forward), expected(engine, forward), strict=True):
        assert_close(actual, exact, setup.dtype)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("setup", SETUPS)
def test_matches_the_reference(setup: str, forward: str) -> None:
    check(SETUPS[setup], FORWARDS[forward]())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check(Setup(64, dtype=dtype), cases.decode())


@pytest.mark.parametrize("setup", ["64", "hybrid"])
def test_a_graph_s_padding_rows_come_out_zero(setup: str) -> None:
    check(SETUPS[setup], cases.decode(), padded=11, padded_tokens=11)


def test_a_piecewise_graph_pads_tokens_alone() -> None:
    check(Setup(64), cases.mixed(), padded_tokens=512)


@pytest.mark.parametrize("window", [None, 40])
def test_drafts_in_a_chain(window: int | None) -> None:
    setup = Setup(16, windows=(window,), drafts=4)
    check(setup, cases.verify(5), padded=6, padded_tokens=30)


def test_one_engine_serves_one_forward_after_another() -> None:
    engine = make_engine(SETUPS["hybrid"])
    for requests in (cases.extend(), cases.decode(), cases.mixed(), cases.decode()[:1]):
        forward = make_forward(engine, requests)
        for actual, exact in zip(attend(engine, forward), expected(engine, forward), strict=True):
            assert_close(actual, exact, torch.float32)


def test_layers_of_a_forward_share_one_plan() -> None:
    engine = make_engine(replace(SETUPS["hybrid"], layers=3))
    attend(engine, make_forward(engine, cases.decode()))
    plans = [group.builder.group.view.plan for group in engine.groups]
    assert len({id(plan) for plan in plans}) == 3
    views = [group.builder.group.view for group in engine.groups]
    made: list[int] = []
    for number, view in enumerate(views):
        view.make_plan = lambda number=number, inner=view.make_plan: (made.append(number), inner())
    attend(engine, make_forward(engine, cases.decode()))
    assert made == [0, 1, 2]
    attend(engine, make_forward(engine, cases.mixed()))
    assert made == [0, 1, 2, 0, 1, 2]


def test_shared_blocks_are_read_once() -> None:
    engine = make_engine(Setup(16, layers=1))
    attend(engine, make_forward(engine, cases.decode()))
    stats = engine.groups[0].builder.group.view.plan.stats()
    assert stats.tokens_once < stats.tokens_per_sequence


def test_tables_of_a_window_hold_the_window_alone() -> None:
    """Blocks before it are the null block: rows that repeat it would be taken for shared."""
    engine = make_engine(Setup(16, windows=(40,), layers=1))
    forward = make_forward(engine, cases.decode())
    attend(engine, forward)
    tables = engine.groups[0].builder.group.view.tables
    assert tables.pages.shape[1] <= 5
    lengths = tables.seq_lens.tolist()
    for row, length in enumerate(lengths):
        blocks = tables.pages[row, : -(-length // 16)].tolist()
        assert 0 not in blocks
        assert blocks == forward.blocks[0][row][-len(blocks) :]


def test_a_cache_that_the_layers_do_not_know_yet() -> None:
    engine = make_engine(Setup(16), bind=False)
    forward = make_forward(engine, cases.decode())
    assert engine.groups[0].builder.build(0, forward.common[0]).group.view is None
    for actual, exact in zip(attend(engine, forward), expected(engine, forward), strict=True):
        assert_close(actual, exact, torch.float32)


def test_no_metadata_while_memory_is_measured() -> None:
    engine = make_engine(Setup(16))
    layer, q = engine.groups[0].layers[0], torch.randn(5, 4, 16)
    out = torch.full_like(q, float("nan"))
    assert layer.impl.forward(layer, q, q, q, torch.tensor([]), None, out) is out
    assert not out.any()


def test_a_batch_of_nothing() -> None:
    engine = make_engine(Setup(16))
    forward = make_forward(engine, [], padded=4, padded_tokens=4)
    for out in attend(engine, forward):
        assert not out.any()
