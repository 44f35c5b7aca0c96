"""Nothing is compiled or loaded while requests are served: all that any forward asks for has been
asked for at start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from flashcore.integrations.sglang.register import register
from flashcore.integrations.sglang.speculation import drafts_are_trees
from flashcore.sm90.families import MERGE, PAGED, PLANNER
from tests import fake_kernels
from tests import serving_cases as cases
from tests.fake_kernels import FakeKernels
from tests.serving_cases import Request
from tests.sglang.batches import Engine, Setup, attend, make_engine, make_forward

register()

FORWARDS: dict[str, tuple[str, Any]] = {
    "decode of one": ("DECODE", lambda: [Request(70, 1)]),
    "decode": ("DECODE", cases.decode),
    "extend of few": ("EXTEND", lambda: [Request(130, 1), Request(0, 2)]),
    "extend": ("EXTEND", cases.extend),
    "extend of many tokens": ("EXTEND", lambda: [Request(0, 300)] * 2),
    "mixed": ("MIXED", cases.mixed),
    "verify": ("TARGET_VERIFY", lambda: cases.verify(5)),
    "verify of one": ("TARGET_VERIFY", lambda: cases.verify(5)[:1]),
    "draft extend": ("DRAFT_EXTEND_V2", lambda: cases.verify(5)),
}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 40},
    "pools": {"window": 100, "two_pools": True},
    "speculative": {"draft_tokens": 5},
    "speculative, windows": {"draft_tokens": 5, "window": 40},
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    return fake_kernels.install(monkeypatch)


def engine_of(options: dict[str, Any], spoil: Any = None, page_tokens: int = 16) -> Engine:
    setup = Setup(page_tokens, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, **options)
    return make_engine(setup, prepare=spoil)


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks", "encoder"])
def test_no_forward_asks_for_a_kernel_that_is_not_there(
    options: dict[str, Any], feature: str, fakes: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flashcore.integrations.sglang.backend.drafts_are_trees",
        lambda runner: "draft_tokens" in options,
    )
    sinks = torch.zeros(8, dtype=torch.bfloat16)

    def give(runner: Any, layers: list[Any]) -> None:
        """The features, as models have them."""
        for layer in layers:
            if feature == "softcap":
                layer.logit_cap = 30.0
            if feature == "encoder" and layer.sliding_window_size < 0:  # with a window: refused
                layer.attn_type = AttentionType.ENCODER_ONLY
        if feature == "sinks":
            runner.model = torch.nn.ModuleList(Parent(layer, sinks) for layer in layers)

    engine = engine_of(options, give)
    assert {k.family for k in fakes.loaded} == {PAGED, MERGE, PLANNER}
    assert set(fakes.compiled) == set(fakes.loaded), "compiled and never launched, or the reverse"
    assert set(fakes.loaded) == set(fakes.calls), "loaded and never launched"
    known = set(fakes.loaded)
    fakes.calls.clear()
    for name, requests in FORWARDS.values():
        if ("VERIFY" in name or "DRAFT" in name) != bool(engine.setup.draft_tokens):
            continue
        for tree in (False, True):
            forward = make_forward(engine, getattr(ForwardMode, name), requests(), tree=tree)
            engine.backend.init_forward_metadata(forward.batch)
            attend(engine, forward, **({"sinks": sinks} if feature == "sinks" else {}))
    assert set(fakes.loaded) == known
    launched = {kernel.family for kernel in fakes.calls}
    assert launched == {PAGED, MERGE, PLANNER}


def test_which_servers_draft_trees() -> None:
    """SGLang 0.5.16 keeps it in its arguments, 0.5.23 in its context, where it is resolved."""
    runner = make_engine(Setup(16)).runner
    assert not drafts_are_trees(runner)
    if not hasattr(runtime_context, "get_spec"):
        for options, trees in (
            ({"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4}, True),
            ({"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 1}, False),
            ({"speculative_algorithm": "NGRAM", "speculative_eagle_topk": None}, True),
        ):
            arguments = SimpleNamespace(**options)
            assert drafts_are_trees(SimpleNamespace(server_args=arguments)) is trees
        return
    with runtime_context.get_spec().override(speculative_eagle_topk=4):
        assert drafts_are_trees(runner)


class Parent(torch.nn.Module):
    """Sinks as gpt-oss has them: a parameter beside the layer."""

    def __init__(self, layer: Any, sinks: torch.Tensor):
        super().__init__()
        self.attn = layer
        self.sinks = torch.nn.Parameter(sinks, requires_grad=False)


def test_sinks_of_layers_of_one_kind_alone(fakes: FakeKernels) -> None:
    """MiMo's windowed layers have sinks, the others do not: no kernel is compiled for nothing."""

    def give(runner: Any, layers: list[Any]) -> None:
        parents = [torch.nn.ModuleList([layers[0]]), Parent(layers[1], torch.zeros(8))]
        runner.model = torch.nn.ModuleList(parents)

    engine_of({"window": 40}, give)
    found = {(k.config.window, k.config.sinks) for k in fakes.loaded if k.family is PAGED}
    assert found == {(False, False), (True, True)}


def test_compiled_forward_on_a_plan_of_the_device(fakes: FakeKernels) -> None:
    """torch.compile does not look into the call: a DevicePlan cannot be traced."""
    engine = engine_of({})
    forward = make_forward(engine, ForwardMode.DECODE, cases.decode())
    engine.backend.init_forward_metadata(forward.batch)
    fakes.calls.clear()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")
    outs = compiled(engine, forward)
    assert outs[0].shape == (forward.tokens, 8 * 64)
    assert {kernel.family for kernel in fakes.calls} == {PAGED, MERGE}
