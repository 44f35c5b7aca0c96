"""The launch path with a stand-in for the compiled kernel: arguments, plans, buffers, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcore
from flashcore import api, ops
from flashcore.dispatch import Path
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from flashcore.problem import Packing, Rules
from flashcore.remembered import Remembered
from flashcore.sm90.config.dense import DenseConfig
from flashcore.sm90.families import DENSE
from flashcore.sm90.launch import dense as launch
from tests.mask_cases import strided
from tests.pretend_gpu import no_gpu, pretend
from tests.runtime_fixtures import needs_dsl


class Recorder:
    """Takes the place of the disk cache and of every function in it."""

    def __init__(self) -> None:
        self.configs: list[DenseConfig] = []
        self.calls: list[tuple[Any, ...]] = []

    def function(self, kernel: Kernel) -> Any:
        assert kernel.family is DENSE
        self.configs.append(kernel.config)
        return lambda *arguments: self.calls.append(arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors pass for tensors of the current GPU, which has 132 SMs."""
    recorder = Recorder()
    monkeypatch.setattr(launch, "shared_cache", lambda: recorder)
    monkeypatch.setattr(launch, "_plans", Remembered(4096))
    monkeypatch.setattr(launch, "sm_count", lambda device: 132)
    monkeypatch.setattr(launch, "scheduler_scratch", lambda index: "scratch")
    monkeypatch.setattr(launch, "current_device", lambda: None)
    return recorder


def tensors(*shape: int, kv_heads: int | None = None) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(*shape, dtype=torch.bfloat16)
    kv = (*shape[:-2], kv_heads or shape[-2], shape[-1])
    return q, torch.zeros(*kv, dtype=torch.bfloat16), torch.zeros(*kv, dtype=torch.bfloat16)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    """options: fields of `Rules` and `Packing`, sinks, return_lse."""
    values = {"scale": 0.125, "causal": False, **options}
    rules, packing = (
        kind(**{name: values.pop(name) for name in kind._fields if name in values})
        for kind in (Rules, Packing)
    )
    return launch.dense_attention(q, k, v, rules, packing=packing, **values)


def test_argument_order(recorder: Recorder) -> None:
    q, k, v = tensors(2, 300, 4, 128)
    out, lse = attend(q, k, v, return_lse=True)
    assert recorder.calls[0][:3] == (q, k, v)
    assert recorder.calls[0][3] is out
    assert recorder.calls[0][4] is lse
    # cu_seqlens_q, cu_seqlens_k, sinks, then scratch where tiles come from a counter
    assert recorder.calls[0][5:8] == (None, None, None)
    # scale, softcap, window, longest query, CTAs: 2 * 4 heads * 3 tiles of 128 rows
    assert recorder.calls[0][9:] == (0.125, 0.0, -1, -1, 300, 24)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (torch.Size([2, 300, 4]), torch.float32)


def test_lse_only_on_request(recorder: Recorder) -> None:
    assert attend(*tensors(1, 64, 2, 64))[1] is None
    assert recorder.configs[0].return_lse is False


def test_packed(recorder: Recorder) -> None:
    q, k, v = tensors(1000, 8, 64, kv_heads=2)
    ends = torch.tensor([0, 400, 400, 1000], dtype=torch.int32)
    out, lse = attend(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=600, return_lse=True
    )
    assert recorder.configs[0].varlen
    assert recorder.calls[0][5:7] == (ends, ends)
    assert recorder.calls[0][13] == 600
    assert (out.shape, lse.shape) == (q.shape, q.shape[:2])


def test_packed_with_unknown_longest_query_uses_the_total(recorder: Recorder) -> None:
    q, k, v = tensors(1000, 2, 64)
    ends = torch.tensor([0, 400, 1000], dtype=torch.int32)
    attend(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert recorder.calls[0][13] == 1000


def test_scratch_exactly_where_the_kernel_wants_it(recorder: Recorder) -> None:
    for causal in (False, True):
        attend(*tensors(1, 256, 2, 64), causal=causal)
    for config, call in zip(recorder.configs, recorder.calls, strict=True):
        assert (call[8] is not None) == config.dynamic


@pytest.mark.parametrize(
    ("options", "config", "window"),
    [
        ({"causal": True}, {"causal": True, "local": False}, (-1, 0)),
        ({"causal": True, "window_left": 9}, {"causal": False, "local": True}, (9, 0)),
        ({"causal": True, "window_right": 9}, {"causal": True, "local": False}, (-1, 0)),
        ({"window_left": 9, "window_right": 4}, {"causal": False, "local": True}, (9, 4)),
    ],
)
def test_causal_bounds_the_window_on_the_right(
    recorder: Recorder, options: dict[str, Any], config: dict[str, bool], window: tuple[int, int]
) -> None:
    attend(*tensors(1, 64, 2, 64), **options)
    assert {name: getattr(recorder.configs[0], name) for name in config} == config
    assert recorder.calls[0][11:13] == window


def test_options_reach_the_configuration(recorder: Recorder) -> None:
    sinks = torch.zeros(2, dtype=torch.bfloat16)
    attend(*tensors(1, 64, 2, 64), softcap=20.0, sinks=sinks)
    assert recorder.configs[0].softcap
    assert recorder.configs[0].sinks
    assert recorder.calls[0][7].dtype == torch.float32
    assert recorder.calls[0][10] == 20.0


def test_a_shape_is_planned_once(recorder: Recorder) -> None:
    for _ in range(3):
        attend(*tensors(2, 128, 4, 64))
    attend(*tensors(2, 128, 4, 64), scale=0.5, softcap=0.0)
    assert (len(recorder.configs), len(recorder.calls)) == (1, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (3, 128, 4, 64)},
        {"shape": (2, 129, 4, 64)},
        {"shape": (2, 128, 2, 64)},
        {"shape": (2, 128, 4, 128)},
        {"kv_heads": 2},
        {"causal": True},
        {"window_left": 5},
        {"softcap": 1.0},
        {"sinks": torch.zeros(4)},
        {"return_lse": True},
    ],
    ids=str,
)
def test_a_change_makes_a_new_plan(recorder: Recorder, change: dict[str, Any]) -> None:
    attend(*tensors(2, 128, 4, 64))
    options = dict(change)
    shape, kv_heads = options.pop("shape", (2, 128, 4, 64)), options.pop("kv_heads", None)
    attend(*tensors(*shape, kv_heads=kv_heads), **options)
    assert len(recorder.configs) == 2


def test_packed_lengths_do_not_multiply_plans(recorder: Recorder) -> None:
    ends = torch.tensor([0, 10], dtype=torch.int32)
    for total in (520, 700, 1024):
        q, k, v = tensors(total, 2, 64)
        attend(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=64)
    assert len(recorder.configs) == 1


def test_plans_are_bounded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_plans", Remembered(3))
    for length in range(1, 9):
        attend(*tensors(1, length, 1, 64))
    assert len(launch._plans) <= 3


# ---------------------------------------------------------------- calls through the public function


@pytest.fixture
def on_hopper(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """`flashcore.attention` takes CPU tensors for a Hopper GPU's."""
    monkeypatch.setattr(ops, "device_path", lambda device: Path("hopper", ""))
    monkeypatch.setattr(api, "_dense_launches", Remembered(4096))
    return recorder


def test_a_remembered_call_is_the_same_call(on_hopper: Recorder) -> None:
    sinks = torch.zeros(8, dtype=torch.bfloat16)
    for _ in range(2):
        q, k, v = tensors(2, 128, 8, 64, kv_heads=2)
        out, lse = flashcore.attention(
            q, k, v, causal=True, softcap=3.0, sinks=sinks, return_lse=True
        )
        passed = on_hopper.calls[-1]
        assert passed[:3] == (q, k, v)
        assert (passed[3], passed[4]) == (out, lse)
    assert on_hopper.calls[0][3] is not on_hopper.calls[1][3]
    assert on_hopper.calls[0][5:7] == on_hopper.calls[1][5:7] == (None, None)
    assert on_hopper.calls[0][9:] == on_hopper.calls[1][9:]
    assert torch.equal(on_hopper.calls[1][7], sinks.float())
    assert len(api._dense_launches) == len(on_hopper.configs) == 1


def test_a_remembered_packed_call_takes_the_new_bounds(on_hopper: Recorder) -> None:
    q, k, v = tensors(100, 2, 64)
    for middle in (40, 60):
        ends = torch.tensor([0, middle, 100], dtype=torch.int32)
        flashcore.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=60)
        assert on_hopper.calls[-1][5:7] == (ends, ends)
        assert on_hopper.calls[-1][13] == 60
    assert len(api._dense_launches) == 1


def test_without_lse_nothing_but_the_output_is_made(on_hopper: Recorder) -> None:
    for _ in range(2):
        flashcore.attention(*tensors(1, 64, 2, 64))
        assert on_hopper.calls[-1][4] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": [1.0]}, "k must be a torch.Tensor"),
        ({"k": torch.zeros(2, 16, 3, 64).bfloat16()}, "v must have the shape of k"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"softcap": -1.0}, "softcap must be finite"),
        ({"window": (1, -2)}, "window right must be an int"),
        ({"window": [1, True]}, "window right must be an int"),
        ({"sinks": torch.zeros(3)}, "sinks must have one logit per query head"),
        ({"sinks": torch.zeros(4).int()}, "sinks must have dtype"),
        ({"cu_seqlens_q": torch.zeros(2).int()}, "go with packed q"),
        ({"q": torch.zeros(2, 16, 4, 64).bfloat16().requires_grad_()}, "q requires a gradient"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_checks_stay_after_a_good_call(
    on_hopper: Recorder, change: dict[str, Any], message: str
) -> None:
    good = dict(zip("qkv", tensors(2, 16, 4, 64), strict=True))
    flashcore.attention(**good)
    with pytest.raises((TypeError, ValueError), match=message):
        flashcore.attention(**{**good, **change})
    assert len(on_hopper.calls) == 1


def test_a_fault_of_our_own_is_not_passed_over(on_hopper: Recorder) -> None:
    """A remembered launch may only refuse arguments; anything else is told at once."""
    q, k, v = tensors(1, 16, 2, 64)
    flashcore.attention(q, k, v)
    (key, launched), *_ = api._dense_launches.items()

    def fails(*arguments: Any) -> Any:
        raise LookupError("a bug")

    api._dense_launches.remember(key, fails)
    with pytest.raises(LookupError, match="a bug"):
        flashcore.attention(q, k, v)
    api._dense_launches.remember(key, launched)
    flashcore.attention(q, k, v)


def test_an_option_that_can_change_is_read_each_time(on_hopper: Recorder) -> None:
    q, k, v = tensors(1, 16, 2, 64)
    scale = torch.tensor(0.25)
    for expected in (0.25, 0.5):
        scale.fill_(expected)
        flashcore.attention(q, k, v, scale=scale)  # type: ignore[call-overload]
        assert on_hopper.calls[-1][9] == expected
    assert api._dense_launches == {}


def test_repaired_strides_are_repaired_each_time(on_hopper: Recorder) -> None:
    q, k, v = tensors(1, 16, 2, 64)
    odd = q.as_strided(q.shape, (1, 128, 64, 1))
    for _ in range(2):
        flashcore.attention(odd, k, v)
        assert all(stride % 8 == 0 for stride in on_hopper.calls[-1][0].stride()[:-1])


def test_remembered_calls_are_bounded(on_hopper: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_dense_launches", Remembered(3))
    for length in range(1, 9):
        flashcore.attention(*tensors(1, length, 1, 64))
    assert len(api._dense_launches) <= 3


def test_cpu_calls_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_dense_launches", Remembered(4096))
    flashcore.attention(*tensors(1, 8, 2, 64))
    assert api._dense_launches == {}


# ---------------------------------------------------------------- nothing to attend to


@pytest.mark.parametrize("shape", [(0, 8, 2, 64), (2, 0, 2, 64)])
def test_no_queries_launches_nothing(recorder: Recorder, shape: tuple[int, ...]) -> None:
    out, lse = attend(*tensors(*shape), return_lse=True)
    assert out.shape == shape
    assert lse.shape == shape[:-1]
    assert recorder.calls == []


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -2.0])])
def test_no_keys_gives_zeros(recorder: Recorder, sinks: torch.Tensor | None) -> None:
    q, _, _ = tensors(2, 3, 2, 64)
    k = v = torch.zeros(2, 0, 2, 64, dtype=torch.bfloat16)
    out, lse = attend(q, k, v, sinks=sinks, return_lse=True)
    expected = torch.full((2,), float("-inf")) if sinks is None else sinks
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, expected.expand(2, 3, 2))
    assert recorder.calls == []


# ---------------------------------------------------------------- bad input


def test_dtype_is_named(recorder: Recorder) -> None:
    q, k, v = (t.float() for t in tensors(1, 8, 2, 64))
    with pytest.raises(NotImplementedError, match=r"q has dtype torch\.float32.* bf16 and fp16"):
        attend(q, k, v)


@pytest.mark.parametrize("head_dim", [4, 100, 264])
def test_head_dim_is_named(recorder: Recorder, head_dim: int) -> None:
    base = torch.zeros(1, 8, 2, 512, dtype=torch.bfloat16)
    q = base[..., :head_dim]
    with pytest.raises(ValueError, match=f"head_dim must be a multiple of 8.* got {head_dim}"):
        attend(q, q, q)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda: torch.zeros(2, 9, 2, 132)[..., :64], r"stride 264|stride 132"),
        (lambda: torch.zeros(2, 9, 2, 72)[..., 4:68], "must start at an address divisible by 16"),
        (lambda: torch.zeros(2, 9, 2, 128)[..., ::2], "must have a contiguous last axis"),
    ],
    ids=["row stride", "first element", "last axis"],
)
def test_layout_that_tma_cannot_take_is_named(
    recorder: Recorder, name: str, view: Any, message: str
) -> None:
    arguments = dict(zip("qkv", tensors(2, 9, 2, 64), strict=True))
    arguments[name] = _same_layout(view())
    with pytest.raises(ValueError, match=message) as raised:
        attend(**arguments)
    assert str(raised.value).startswith(f"{name} ")
    assert recorder.calls == []


def _same_layout(view: torch.Tensor) -> torch.Tensor:
    """`view` in bf16 with its strides and storage offset kept."""
    storage = torch.zeros(view.untyped_storage().nbytes() // 4, dtype=torch.bfloat16)
    return storage.as_strided(view.shape, view.stride(), view.storage_offset())


def test_stride_of_an_axis_of_one_element_is_repaired(recorder: Recorder) -> None:
    q, k, v = tensors(1, 16, 2, 64)
    odd = q.as_strided(q.shape, (1, 128, 64, 1))
    attend(odd, k, v)
    passed = recorder.calls[0][0]
    assert passed.data_ptr() == q.data_ptr()
    assert all(stride % 8 == 0 for stride in passed.stride()[:-1])


def test_legal_views_are_passed_as_they_are(recorder: Recorder) -> None:
    packed = torch.zeros(2, 16, 3, 4, 64, dtype=torch.bfloat16)
    q, k, v = packed.unbind(2)
    attend(q, k, v)
    assert recorder.calls[0][0] is q
    assert recorder.calls[0][1] is k


# ---------------------------------------------------------------- the real function


def test_sinks_in_any_strides_are_passed_side_by_side(on_hopper: Recorder) -> None:
    q, k, v = tensors(1, 64, 8, 64)
    for sinks in strided(torch.randn(8)):
        for _ in range(2):
            flashcore.attention(q, k, v, sinks=sinks)
            passed = on_hopper.calls[-1][7]
            assert (passed.stride(), passed.dtype) == ((1,), torch.float32)
            assert torch.equal(passed, sinks.float())


@pytest.mark.parametrize("bound", [2**31 - 2, 2**30, 200])
def test_bounds_stay_within_reach(on_hopper: Recorder, bound: int) -> None:
    """Kernels add them to positions in 32 bits; no key is further away than all are many."""
    q, k, v = tensors(1, 64, 2, 64)
    flashcore.attention(q, k, v, window=(bound, bound))
    assert on_hopper.calls[-1][11:13] == (128, 128)
    flashcore.attention(q, k, v, window=(bound, 3))
    assert on_hopper.calls[-1][11:13] == (128, 3)


class Checked(Recorder):
    """Calls the compiled function with CPU tensors that pass for a GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KernelCache.open()

    def function(self, kernel: Kernel) -> Any:
        compiled = self.cache.function(kernel)

        def call(*arguments: Any) -> None:
            self.calls.append(arguments)
            compiled(*pretend(arguments))

        return call


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Checked:
    """The compiled function checks its arguments before it asks for a driver that is not there."""
    checked = Checked()
    monkeypatch.setattr(launch, "shared_cache", lambda: checked)
    monkeypatch.setattr(launch, "_plans", Remembered(4096))
    monkeypatch.setattr(launch, "sm_count", lambda device: 132)
    zeros = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(launch, "scheduler_scratch", lambda index: zeros)
    monkeypatch.setattr(launch, "current_device", lambda: None)
    monkeypatch.setattr(ops, "device_path", lambda device: Path("hopper", ""))
    monkeypatch.setattr(api, "_dense_launches", Remembered(4096))
    return checked


@needs_dsl
@no_gpu
def test_what_a_remembered_call_leaves_to_the_compiled_function(checked: Checked) -> None:
    """It refuses each of these before it would launch; the error is then the checks' own."""
    good = dict(zip("qkv", tensors(1, 300, 4, 128), strict=True))

    def like(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    bad: list[tuple[dict[str, Any], str]] = [
        ({"v": [1.0]}, "v must be a torch.Tensor"),
        ({"v": torch.zeros(1, 300, 4, 128)}, "v must have the dtype of q"),
        ({"k": torch.zeros(1, 300, 4, 128).half()}, "k must have the dtype of q"),
        ({"v": like(1, 299, 4, 128)}, "v must have the shape of k"),
        ({"v": like(1, 300, 2, 128)}, "v must have the shape of k"),
        ({"v": like(300, 4, 128)}, "v must have 4 dimensions"),
        ({"q": like(1, 300, 4, 256)[..., ::2]}, "q must have a contiguous last axis"),
        ({"v": like(1, 300, 4, 256)[..., ::2]}, "v must have a contiguous last axis"),
        ({"k": like(1, 300, 4, 132)[..., :128]}, "k has stride 132"),
        ({"v": like(1, 300, 4, 136)[..., 4:132]}, "v must start at an address divisible by 16"),
        ({"v": torch.empty(1, 300, 4, 128, device="meta").bfloat16()}, "v must be on the device"),
    ]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="InsufficientDriver"):
            flashcore.attention(**good)
    assert len(checked.calls) == 3  # the second call: as remembered, then after the checks
    for change, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            flashcore.attention(**{**good, **change})
    assert len(api._dense_launches) == 1


@needs_dsl
@no_gpu
@pytest.mark.parametrize(
    ("shape", "kv_heads", "options"),
    [
        ((2, 300, 4, 128), 4, {"return_lse": True}),
        ((1, 1, 8, 128), 1, {"causal": True}),
        ((1, 300, 1, 40), 1, {"sinks": torch.zeros(1), "window_left": 5, "causal": True}),
        ((300, 4, 64), 2, {"cu_seqlens": (0, 100, 300), "causal": True, "return_lse": True}),
    ],
    ids=["batched", "decode", "padded, every axis 1", "packed"],
)
def test_compiled_function_takes_what_the_launch_passes(
    checked: Checked, shape: tuple[int, ...], kv_heads: int, options: dict[str, Any]
) -> None:
    options = dict(options)
    if "cu_seqlens" in options:
        ends = torch.tensor(options.pop("cu_seqlens"), dtype=torch.int32)
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 200}
    with pytest.raises(RuntimeError, match="InsufficientDriver"):
        attend(*tensors(*shape, kv_heads=kv_heads), **options)
