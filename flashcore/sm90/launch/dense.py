"""Launch the dense kernel on torch tensors: the hot path of `flashcore.attention` on Hopper.

    tensors ─► plan (remembered per shape: config, function, grid) ─► launch ─► buffers, call

A `DenseLaunch` may be kept and called again with other tensors; `flashcore.api` does so.

The host is never synchronised and the kernel runs on torch's current stream, so calls can be
captured in a CUDA graph; the first call of a shape may compile and must come before the capture.
Arguments are taken as already checked (flashcore.validate).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.jit.cache import shared_cache
from flashcore.jit.kernel import Kernel
from flashcore.jit.load import CompiledFunction
from flashcore.problem import UNPACKED, Packing, Rules
from flashcore.remembered import Remembered
from flashcore.sm90.available import sm_count
from flashcore.sm90.config.dense import DenseConfig, DenseProblem, choose, grid_size
from flashcore.sm90.families import DENSE
from flashcore.sm90.launch.allocate import Allocate, Buffer, allocator, contiguous
from flashcore.sm90.launch.streams import current_device, scheduler_scratch
from flashcore.sm90.launch.tensors import DTYPE_NAMES, sink_logits, tma_ready


@dataclass(frozen=True)
class _Plan:
    """Everything about a launch that its shapes and options decide."""

    function: CompiledFunction
    needs_scratch: bool
    num_ctas: int


# The fields of DenseProblem in its order, with torch's dtype, and the device.
_PlanKey = tuple[
    tuple[torch.dtype, int, int, int, int, int, int],
    tuple[bool, int, int, bool, bool],
    tuple[bool, bool],
    torch.device,
]
_plans = Remembered(4096)  # _PlanKey -> _Plan


@dataclass(frozen=True, slots=True)
class DenseLaunch:
    """A launch with all that shapes, dtype, device and options decide.

    Where `reusable` it takes other tensors too: for those that do not fit the compiled function
    raises ValueError or TypeError.
    """

    function: CompiledFunction | None  # None: there is nothing to attend to
    device: torch.device
    other_devices: bool  # in this process; without them the device is always the current one
    needs_scratch: bool
    allocate: Allocate
    out: Buffer
    lse: Buffer | None
    scalars: tuple[float | int, ...]  # the last arguments of the compiled function
    reusable: bool

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, LSE or None), made anew."""
        if self.other_devices and self.device.index != current_device():
            with torch.cuda.device(self.device):
                return self(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k)
        if not self.reusable:
            q, k, v = tma_ready("q", q), tma_ready("k", k), tma_ready("v", v)
        sinks = sink_logits(sinks)
        out = self.allocate(*self.out)
        lse = None if self.lse is None else self.allocate(*self.lse)
        if self.function is None:
            return _without_keys(out, lse, sinks)
        scratch = scheduler_scratch(self.device.index) if self.needs_scratch else None
        # As `contract.operands.Dense` has them.
        self.function(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, scratch, *self.scalars)
        return out, lse


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: Rules,
    sinks: torch.Tensor | None = None,
    packing: Packing = UNPACKED,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of q over k and v: (out like q, contiguous; natural-log LSE or None).

    q is [batch, seqlen_q, heads, head_dim], k and v [batch, seqlen_k, kv_heads, head_dim], bf16 or
    fp16; or all packed as [total, heads, head_dim]. The LSE is fp32, [batch, seqlen_q, heads] or
    [total, heads]. `sinks` is [heads], any float dtype.

    Raises NotImplementedError for a dtype and ValueError for a stride that the kernel cannot take;
    MissingRuntimeError, UnsafeCacheError or BuildError when the kernel of a new shape cannot be
    loaded or compiled.
    """
    launch = dense_launch(q, k, v, rules, sinks, packing, return_lse)
    return launch(q, k, v, sinks, packing.cu_seqlens_q, packing.cu_seqlens_k)


def dense_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: Rules,
    sinks: torch.Tensor | None,
    packing: Packing,
    return_lse: bool,
) -> DenseLaunch:
    """The launch of `dense_attention` for such tensors, none of which it keeps."""
    ends, causal = packing.cu_seqlens_q, rules.causal
    left, right = rules.window_left, rules.window_right
    plan, longest_q = None, 0
    if q.numel() and k.numel():  # TMA cannot describe a tensor with no elements
        num_heads, head_dim = q.shape[-2:]
        if ends is None:
            sequences, longest_q, longest_k = q.shape[0], q.shape[1], k.shape[1]
        else:
            sequences = ends.shape[0] - 1
            longest_q = q.shape[0] if packing.max_seqlen_q is None else packing.max_seqlen_q
            # The host knows no more than a bound; rounded up, so that plans are reused.
            longest_k = 1 << (k.shape[0] - 1).bit_length()
        what: _PlanKey = (
            (q.dtype, head_dim, sequences, longest_q, longest_k, num_heads, k.shape[-2]),
            (causal, left, right, rules.softcap != 0.0, sinks is not None),
            (ends is not None, return_lse),
            q.device,
        )
        plan = _plans.get(what) or _plan_of(what)
    # After the choice: a head_dim without kernels mostly has strides that TMA cannot take, too.
    ready = tma_ready("q", q), tma_ready("k", k), tma_ready("v", v)
    # A causal window is a window that ends at the query itself. No bound beyond every key, whose
    # sum with a position might need more than 32 bits.
    reach = q.shape[-3] + k.shape[-3]
    left, right = min(left, reach), 0 if causal else min(right, reach)
    return DenseLaunch(
        function=plan.function if plan else None,
        device=q.device,
        other_devices=torch.cuda.device_count() > 1,
        needs_scratch=plan is not None and plan.needs_scratch,
        allocate=allocator(q.device),
        out=contiguous(q.shape, q.dtype),
        lse=contiguous(q.shape[:-1], torch.float32) if return_lse else None,
        scalars=(rules.scale, rules.softcap, left, right, longest_q, plan.num_ctas if plan else 0),
        # Not where strides need repair, nor where no compiled function looks at the arguments.
        reusable=plan is not None and ready[0] is q and ready[1] is k and ready[2] is v,
    )


def prepare_dense(config: DenseConfig) -> CompiledFunction:
    """The compiled function of `config`, compiled now if no process has done so before."""
    return shared_cache().function(Kernel(DENSE, config))


def _plan_of(what: _PlanKey) -> _Plan:
    """Make the plan of a launch: choose, load or compile, size the grid."""
    sizes, options, packing, device = what
    if sizes[0] not in DTYPE_NAMES:
        raise NotImplementedError(f"q has dtype {sizes[0]}; the Hopper kernel takes bf16 and fp16")
    problem = DenseProblem(DTYPE_NAMES[sizes[0]], *sizes[1:], *options, *packing)
    config = choose(problem)
    plan = _Plan(
        function=prepare_dense(config),
        needs_scratch=config.dynamic,
        num_ctas=grid_size(config, problem, sm_count(device)),
    )
    _plans.remember(what, plan)
    return plan


def _without_keys(
    out: torch.Tensor, lse: torch.Tensor | None, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows that see no key: zeros, and the LSE of nothing, or of the sink alone."""
    out.zero_()
    if lse is not None:
        lse.fill_(float("-inf"))
        if sinks is not None:
            lse.copy_(sinks.expand_as(lse))
    return out, lse
