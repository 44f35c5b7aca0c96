"""The launch on a Hopper GPU: streams, graphs, synchronisation, what a second process loads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import flashcore
import flashcore.reference
from flashcore.problem import Packing, Rules
from flashcore.sm90.available import available
from flashcore.sm90.launch import dense as launch

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """options: fields of `Rules` and `Packing`, sinks, return_lse."""
    values = {"scale": 0.125, "causal": True, **options}
    rules, packing = (
        kind(**{name: values.pop(name) for name in kind._fields if name in values})
        for kind in (Rules, Packing)
    )
    return launch.dense_attention(q, k, v, rules, packing=packing, **values)[0]


def inputs(seqlen: int = 1000, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (2, seqlen, 4, 64)
    return [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    ]


@pytest.mark.parametrize("causal", [False, True])  # static and dynamic tile order
def test_runs_on_the_current_stream(causal: bool) -> None:
    """Inputs written late on a side stream are seen: the launch waits for that stream alone."""
    q, k, v = inputs()
    expected = attend(q, k, v, causal=causal)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = attend(late, k, v, causal=causal)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_streams_do_not_disturb_each_other(causal: bool) -> None:
    sets = [inputs(700, seed) for seed in range(4)]
    expected = [attend(*tensors, causal=causal) for tensors in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, tensors in zip(streams, sets, strict=True):
            with torch.cuda.stream(stream):
                results.append(attend(*tensors, causal=causal))
        torch.cuda.synchronize()
        for out, right in zip(results, expected, strict=True):
            assert torch.equal(out, right)


@pytest.mark.parametrize("causal", [False, True])
def test_graph_replays(causal: bool) -> None:
    q, k, v = inputs()
    attend(q, k, v, causal=causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, causal=causal)
    for seed in (1, 2):
        for tensor, fresh in zip((q, k, v), inputs(seed=seed), strict=True):
            tensor.copy_(fresh)
        out.fill_(float("nan"))
        graph.replay()
        # A launch beside the replay must not share its tile counters.
        beside = attend(q, k, v, causal=causal)
        torch.cuda.synchronize()
        assert torch.equal(out, beside)


def test_does_not_synchronise() -> None:
    q, k, v = inputs()
    ends = torch.tensor([0, 300, 1000], dtype=torch.int32, device="cuda")
    attend(q, k, v)
    packed = [t[0] for t in (q, k, v)]
    attend(*packed, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=700)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v)
        attend(*packed, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=700)
        # Nor does the library wait by other means: the call returns while the GPU is busy.
        torch.cuda._sleep(500_000_000)
        attend(q, k, v)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("causal", [False, True])
def test_remembered_calls_run_on_the_current_stream_and_in_graphs(causal: bool) -> None:
    """The public function, whose second call skips the checks: as the launch itself, above."""
    q, k, v = inputs()
    expected = flashcore.attention(q, k, v, causal=causal)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = flashcore.attention(late, k, v, causal=causal)
    stream.synchronize()
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flashcore.attention(q, k, v, causal=causal)
    captured.fill_(float("nan"))
    graph.replay()
    beside = flashcore.attention(q, k, v, causal=causal)
    torch.cuda.synchronize()
    assert torch.equal(captured, beside)


def test_remembered_calls_refuse_what_does_not_fit() -> None:
    q, k, v = inputs()
    expected = flashcore.attention(q, k, v)
    wide = torch.zeros(2, 1000, 4, 72, device="cuda", dtype=torch.bfloat16)
    bad = [
        ({"v": v.cpu()}, "v must be on the device of q"),
        ({"v": v.half()}, "v must have the dtype of q"),
        ({"v": v[:, :999]}, "v must have the shape of k"),
        ({"k": wide[..., 4:68]}, "k must start at an address divisible by 16"),
        ({"q": q.clone().requires_grad_()}, "q requires a gradient"),
    ]
    for change, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            flashcore.attention(**{"q": q, "k": k, "v": v, **change})
    # A stride that the remembered launch was not made for is legal all the same.
    wide[..., :64] = v
    assert torch.equal(flashcore.attention(q, k, wide[..., :64]), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(700, 4133), (1500, 700), (1031, 900), (65, 300)]
)
def test_head_dim_64_against_the_reference(causal: bool, seqlen_q: int, seqlen_k: int) -> None:
    """Full attention has tiles of its own for many keys; causal warpgroups pass over blocks."""
    generator = torch.Generator("cuda").manual_seed(3)

    def normal(length: int) -> torch.Tensor:
        shape = (2, length, 4, 64)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(seqlen_q), normal(seqlen_k), normal(seqlen_k)
    out, lse = flashcore.attention(q, k, v, causal=causal, return_lse=True)
    expected, expected_lse = flashcore.reference.attention_reference(q, k, v, causal=causal)
    assert float((out.double() - expected).norm() / expected.norm()) < 5e-3
    assert torch.allclose(lse.double(), expected_lse, rtol=0, atol=2e-4)
    for _ in range(20):
        assert torch.equal(flashcore.attention(q, k, v, causal=causal, return_lse=True)[0], out)


def decode(prefix_pages: int) -> dict[str, Any]:
    """Two sequences that decode; with a common prefix their partial results are merged."""
    own = [[8, 9], [10, 11]]
    table = torch.tensor([[*range(prefix_pages), *pages] for pages in own], dtype=torch.int32)
    length = 64 * (prefix_pages + 2)
    plan = flashcore.plan(
        flashcore.layout_from_page_table(
            table, torch.tensor([length - 9, length - 20]), page_tokens=64
        ),
        q_lens=[1, 1],
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=128,
        page_tokens=64,
    )
    assert plan.needs_merge == (prefix_pages > 0)
    generator = torch.Generator("cuda").manual_seed(prefix_pages)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    k, v = normal(12, 64, 2, 128), normal(12, 64, 2, 128)
    return {"q": normal(2, 8, 128), "k_pages": k, "v_pages": v, "plan": plan.to("cuda")}


@pytest.mark.parametrize("prefix_pages", [0, 8])
def test_remembered_paged_calls(prefix_pages: int) -> None:
    """The second call skips the checks and finds its buffers: new inputs, streams and graphs."""
    given = decode(prefix_pages)
    on_cpu = {name: value.to("cpu") for name, value in given.items()}
    expected = flashcore.paged_attention(**on_cpu).cuda().double()
    first = flashcore.paged_attention(**given)
    assert float((first.double() - expected).norm() / expected.norm()) < 5e-3
    assert torch.equal(flashcore.paged_attention(**given), first)
    assert len(given["plan"].launches) == 1
    out, lse = flashcore.paged_attention(**given, return_lse=True)
    kept = lse.clone()
    other = {**given, "q": torch.randn_like(given["q"])}
    assert not torch.equal(flashcore.paged_attention(**other), first)
    flashcore.paged_attention(**other, return_lse=True)
    assert torch.equal(out, first)
    assert torch.equal(lse, kept)  # a returned LSE is the caller's
    into = torch.empty_like(first)
    for _ in range(2):
        into.fill_(float("nan"))
        assert flashcore.paged_attention(**given, out=into) is into
        assert torch.equal(into, first)
    late = {**given, "q": torch.zeros_like(given["q"])}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late["q"].copy_(given["q"])
        results = [flashcore.paged_attention(**late) for _ in range(2)]
    stream.synchronize()
    assert all(torch.equal(result, first) for result in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flashcore.paged_attention(**given)
    captured.fill_(float("nan"))
    flashcore.paged_attention(**other)
    graph.replay()
    beside = flashcore.paged_attention(**other)
    torch.cuda.synchronize()
    assert torch.equal(captured, first)
    assert torch.equal(beside, flashcore.paged_attention(**other))


def test_remembered_paged_calls_refuse_what_does_not_fit() -> None:
    given = decode(8)
    for _ in range(2):
        flashcore.paged_attention(**given)
    k = given["k_pages"]
    wide = torch.zeros(12, 64, 2, 136, device="cuda", dtype=torch.bfloat16)
    bad = [
        ({"v_pages": k.cpu()}, "v_pages must be on the device of q"),
        ({"v_pages": k.half()}, "v_pages must have the dtype of q"),
        ({"v_pages": k[:11]}, "v_pages must have at least 12 pages"),
        ({"k_pages": k[:, :32]}, "k_pages must have the plan's"),
        ({"k_pages": wide[..., 4:132]}, "k_pages must start at an address divisible by 16"),
        ({"q": given["q"].clone().requires_grad_()}, "q requires a gradient"),
    ]
    for change, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            flashcore.paged_attention(**{**given, **change})


def test_torch_operators_where_a_call_asks_for_them() -> None:
    """A dtype that kernels do not take, and one that they do, after a launch is remembered."""
    q, k, v = inputs(100)
    by_kernels = flashcore.attention(q, k, v, causal=True)
    by_torch = flashcore.attention(q, k, v, causal=True, impl="eager")
    wide = flashcore.attention(q.float(), k.float(), v.float(), causal=True, impl="eager")
    assert wide.dtype is torch.float32
    for found in (by_kernels, by_torch):
        torch.testing.assert_close(found.float(), wide, rtol=2e-2, atol=2e-2)
    with pytest.raises(NotImplementedError, match="takes bf16 and fp16"):
        flashcore.attention(q.float(), k.float(), v.float(), causal=True)


def test_second_process_loads_without_the_dsl() -> None:
    q, k, v = inputs()
    attend(q, k, v)  # now in the cache
    code = """
import sys, torch
from flashcore.problem import Rules
from flashcore.sm90.launch.dense import dense_attention
t = torch.randn(2, 1000, 4, 64, device="cuda", dtype=torch.bfloat16)
dense_attention(t, t, t, Rules(0.125, causal=True))
torch.cuda.synchronize()
print("cutlass" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.stdout.strip() == "False", done.stderr


def test_host_cost_is_far_below_a_kernel() -> None:
    """Reported as a figure by `flashcore bench`; here only a bound that a busy machine keeps."""
    from flashcore.bench.timing import host_us_per_call

    q, k, v = inputs(64)

    def call() -> torch.Tensor:
        return flashcore.attention(q, k, v, causal=True)

    host_us_per_call(call, 50)
    assert min(host_us_per_call(call) for _ in range(5)) < 30
