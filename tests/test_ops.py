"""The custom operators under torch's own checks, torch.compile and torch.export; the import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashcore
from flashcore.problem import NO_EXTRAS, KVPool, Rules
from tests.test_paged_attention import shared_batch


def test_import_is_quick_and_light():
    """No torch, no NVIDIA wheel before a name is used."""
    code = (
        "import sys, flashcore; "
        "heavy = {'torch', 'numpy', 'cutlass', 'tvm_ffi', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "assert 'attention' in dir(flashcore); "
        "flashcore.attention; assert 'cutlass' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'flashcore' has no attribute 'atention'"):
        _ = flashcore.atention


def test_every_public_name_loads():
    for name in flashcore.__all__:
        assert getattr(flashcore, name) is not None


def dense_arguments(packed: bool) -> tuple:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16)
    ends = (None, None)
    if packed:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        ends = (torch.tensor([0, 5, 10]).int(), torch.tensor([0, 7, 14]).int())
    return (q, k, k.clone(), 0.25, True, 3, -1, 2.0, torch.randn(4), *ends, 5, True, None)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_dense(packed):
    torch.library.opcheck(torch.ops.flashcore.attention.default, dense_arguments(packed))


@pytest.mark.parametrize("fp8", [False, True])
def test_opcheck_paged(fp8):
    batch = shared_batch()
    plan = batch.plan()
    q, k, v = batch.tensors()
    pool = KVPool(k, v)
    if fp8:
        q, (k, v) = q.half(), (x.to(torch.float8_e4m3fn) for x in (k, v))
        pool = KVPool(k, v, torch.tensor(0.5), torch.rand(2) + 0.5)
    arguments = (q, *pool, *plan.tensors, *plan.numbers, *Rules(0.1, causal=True), *NO_EXTRAS, None)
    # The check of the schema compares arguments, which torch cannot do with fp8 ones.
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = others if fp8 else ("test_schema", *others)
    op = torch.ops.flashcore.paged_attention.default
    torch.library.opcheck(op, arguments, test_utils=checks)


def test_compile_sees_one_node():
    batch = shared_batch()
    q, k, v = batch.tensors()
    plan = batch.plan()

    def layer(q, k, v):
        out, lse = flashcore.paged_attention(q * 2, k, v, plan, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), layer(q, k, v), strict=True):
        assert torch.equal(a, b)

    x = torch.randn(2, 5, 4, 16)
    dense = torch.compile(
        lambda x: flashcore.attention(x, x, x, causal=True), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(dense(x), flashcore.attention(x, x, x, causal=True))


def test_compile_sees_one_node_with_fp8_pages():
    """Scales are tensors of the graph, not constants of it."""
    batch = shared_batch()
    q, k, v = batch.tensors(torch.bfloat16)
    k, v = k.to(torch.float8_e5m2), v.to(torch.float8_e5m2)
    plan = batch.plan()

    def layer(q, k_scale, v_scale):
        return flashcore.paged_attention(q, k, v, plan, k_scale=k_scale, v_scale=v_scale)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for scale in (0.5, 3.0):
        scales = torch.tensor(scale), torch.tensor([scale, 1.0])
        assert torch.equal(compiled(q, *scales), layer(q, *scales))


def test_compiled_call_writes_where_it_is_told():
    batch = shared_batch()
    q, k, v = batch.tensors()
    plan = batch.plan()

    def layer(q, out):
        return flashcore.paged_attention(q, k, v, plan, out=out) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outs = torch.zeros_like(q), torch.zeros_like(q)
    assert torch.equal(compiled(q, outs[0]), layer(q, outs[1]))
    assert torch.equal(*outs)
    assert torch.equal(outs[0], flashcore.paged_attention(q, k, v, plan))


def test_export_sees_one_node():
    batch = shared_batch()
    q, k, v = batch.tensors()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = batch.plan()

        def forward(self, q, k, v):
            return flashcore.paged_attention(q, k, v, self.plan)

    program = torch.export.export(Layer(), (q, k, v))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "flashcore.paged_attention.default" in targets
    assert torch.equal(program.module()(q, k, v), Layer()(q, k, v))


def test_fake_tensors_get_shapes():
    with FakeTensorMode():
        q, k = torch.empty(2, 5, 4, 16).half(), torch.empty(2, 7, 2, 16).half()
        out, lse = flashcore.attention(q, k, k, return_lse=True)
    assert out.shape == q.shape
    assert out.dtype == torch.float16
    assert lse.shape == (2, 5, 4)
    assert lse.dtype == torch.float32
