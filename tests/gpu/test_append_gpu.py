"""`append_kv` on a GPU: its one kernel against torch operators, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import flashcore
from flashcore.append import scatter_by_torch
from flashcore.problem import KVPool
from tests.append_cases import (
    FP8,
    Case,
    cases,
    differences,
    expected,
    pool,
    scales_of,
    slots_of,
    values,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
if torch.cuda.is_available():
    from flashcore.append_kernel import scatter


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_case(case: Case) -> None:
    """Twice: by the kernel as compiled for the case, and as found again."""
    for seed in range(2):
        k, v = values(case, "cuda", seed)
        pages, scales = pool(case, "cuda"), scales_of(case, "cuda")
        slots = slots_of(case, pages[0].shape[0] * case.page_tokens, "cuda", seed)
        wanted = expected(k, v, pages, slots, scales)
        if len(k):
            scatter(k, v, KVPool(*pages, **scales), slots)
        for actual, right in zip(pages, wanted, strict=True):
            assert differences(actual, right) == []


@pytest.mark.parametrize("case", cases()[::5], ids=str)
def test_the_public_call(case: Case) -> None:
    """By the kernel or by torch operators on the device, whichever serves these pages."""
    k, v = values(case, "cuda")
    pages, scales = pool(case, "cuda"), scales_of(case, "cuda")
    slots = slots_of(case, pages[0].shape[0] * case.page_tokens, "cuda")
    wanted = expected(k, v, pages, slots, scales)
    flashcore.append_kv(k, v, *pages, slot_mapping=slots, **scales)
    for actual, right in zip(pages, wanted, strict=True):
        assert differences(actual, right) == []


@pytest.mark.parametrize("case", cases(), ids=str)
def test_torch_operators_on_the_device(case: Case) -> None:
    k, v = values(case, "cuda")
    pages, scales = pool(case, "cuda"), scales_of(case, "cuda")
    slots = slots_of(case, pages[0].shape[0] * case.page_tokens, "cuda")
    wanted = expected(k, v, pages, slots, scales)
    if len(k):
        scatter_by_torch(k, v, KVPool(*pages, **scales), slots)
    for actual, right in zip(pages, wanted, strict=True):
        assert differences(actual, right) == []


@pytest.mark.parametrize("pages_dtype", FP8)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value(dtype: torch.dtype, pages_dtype: torch.dtype) -> None:
    """All 65536 of a 16-bit format, also divided by a scale that is no power of two."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(512, 2, 64).cuda()
    empty = torch.zeros(32, 16, 2, 64).to(pages_dtype)
    slots = torch.arange(512).flip(0).cuda()
    for scales in ({}, {"k_scale": torch.tensor(0.37), "v_scale": torch.tensor([3e-4, 11.0])}):
        pages = empty.cuda(), empty.cuda()
        on_gpu = {name: scale.cuda() for name, scale in scales.items()}
        wanted = expected(x, x, pages, slots, on_gpu)
        flashcore.append_kv(x, x, *pages, slot_mapping=slots, **on_gpu)
        for actual, right in zip(pages, wanted, strict=True):
            assert differences(actual, right) == []


def test_an_aligned_call_after_one_that_is_not() -> None:
    """Each has a kernel of its own: one may read vectors, which the other must not."""
    case = Case(torch.bfloat16, torch.float8_e4m3fn)
    for kind in ("plain", "odd", "plain", "odd"):
        odd = Case(case.dtype, case.pages, kind=kind)
        k, v = values(odd, "cuda")
        pages = pool(odd, "cuda")
        slots = slots_of(odd, pages[0].shape[0] * odd.page_tokens, "cuda")
        wanted = expected(k, v, pages, slots, {})
        scatter(k, v, KVPool(*pages), slots)
        assert [differences(*pair) for pair in zip(pages, wanted, strict=True)] == [[], []]


def test_one_launch_in_a_graph_that_reads_the_scales_of_its_replay() -> None:
    case = Case(torch.bfloat16, torch.float8_e4m3fn, tokens=64, heads=8, dim=128, v_dim=128)
    k, v = values(case, "cuda")
    pages = pool(case, "cuda")
    slots = slots_of(case, pages[0].shape[0] * case.page_tokens, "cuda").clone()
    scale = torch.ones((), device="cuda")
    scales = {"k_scale": scale, "v_scale": scale}
    flashcore.append_kv(k, v, *pages, slot_mapping=slots, **scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flashcore.append_kv(k, v, *pages, slot_mapping=slots, **scales)
    for value in (0.5, 3.0):
        scale.fill_(value)
        wanted = expected(k, v, pages, slots, scales)
        graph.replay()
        for actual, right in zip(pages, wanted, strict=True):
            assert differences(actual, right) == []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        flashcore.append_kv(k, v, *pages, slot_mapping=slots, **scales)
        torch.cuda.synchronize()
    kernels = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "Memset" not in name]) == 1, kernels


def test_by_page_table() -> None:
    case = Case(torch.bfloat16, torch.float8_e5m2, scale="heads", tokens=8)
    k, v = values(case, "cuda")
    pages, scales = pool(case, "cuda"), scales_of(case, "cuda")
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    slots = torch.tensor([3 * 16 + 14, 3 * 16 + 15, 16, *(4 * 16 + i for i in range(3, 8))])
    wanted = expected(k, v, pages, slots, scales)
    flashcore.append_kv(
        *(k, v, *pages),
        page_table=table.cuda(),
        seq_lens=torch.tensor([17, 24]).cuda(),
        q_lens=torch.tensor([3, 5]).cuda(),
        **scales,
    )
    for actual, right in zip(pages, wanted, strict=True):
        assert differences(actual, right) == []


def test_a_slot_beyond_the_pages_is_an_assertion() -> None:
    """In a process of its own, whose device is lost to it."""
    code = (
        "import torch, flashcore\n"
        "k = torch.zeros(1, 2, 64).cuda().half()\n"
        "pages = torch.zeros(2, 16, 2, 64).cuda().to(torch.float8_e5m2)\n"
        "slots = torch.tensor([32]).cuda()\n"
        "flashcore.append_kv(k, k, pages, pages.clone(), slot_mapping=slots)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "a slot is beyond the pages" in done.stderr + done.stdout
