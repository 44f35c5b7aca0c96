"""Device code of tests/toy_kernels.py. Imports the CuTe DSL."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from tests.toy_kernels import TileConfig

try:
    from cutlass.memory import SmemAllocator
    from cutlass.tensor_utils import LayoutEnum
except ImportError:  # before 4.8
    from cutlass.utils import LayoutEnum, SmemAllocator

_TILE = 64


class TileKernel:
    def __init__(self, config: TileConfig) -> None:
        self.c = config

    @cute.jit
    def __call__(self, mA: cute.Tensor, mB: cute.Tensor, mC: cute.Tensor, stream):
        layout = sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, BFloat16, _TILE)
        atom = warpgroup.make_smem_layout_atom(layout, BFloat16)
        s_layout = cute.tile_to_shape(atom, (_TILE, _TILE), order=(0, 1))
        load = cpasync.CopyBulkTensorTileG2SOp()
        tma_a, gA = cpasync.make_tiled_tma_atom(load, mA, s_layout, (_TILE, _TILE))
        tma_b, gB = cpasync.make_tiled_tma_atom(load, mB, s_layout, (_TILE, _TILE))
        mma = sm90.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (64, _TILE),
        )

        @cute.struct
        class Storage:
            barrier: cute.struct.MemRange[Int64, 1]
            extra: cute.struct.MemRange[Int64, 1 + self.c.extra_smem_bytes // 8]
            a: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(s_layout)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(s_layout)], 1024]

        self.Storage = Storage
        self.kernel(tma_a, gA, tma_b, gB, mA, mB, mC, s_layout, mma).launch(
            grid=[1, 1, 1], block=[128, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        tma_a: cute.CopyAtom,
        gA: cute.Tensor,
        tma_b: cute.CopyAtom,
        gB: cute.Tensor,
        mA: cute.Tensor,
        mB: cute.Tensor,
        mC: cute.Tensor,
        s_layout: cute.ComposedLayout,
        mma: cute.TiledMma,
    ):
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.Storage)
        barrier = storage.barrier.data_ptr()
        sA = storage.a.get_tensor(s_layout.outer, swizzle=s_layout.inner)
        sB = storage.b.get_tensor(s_layout.outer, swizzle=s_layout.inner)
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        thread = mma.get_slice(tid)
        fragA = mma.make_fragment_A(thread.partition_A(sA))
        fragB = mma.make_fragment_B(thread.partition_B(sB))
        acc = cute.make_rmem_tensor(thread.partition_shape_C((_TILE, _TILE)), Float32)
        acc.fill(0.0)
        for step in cutlass.range_constexpr(self.c.steps):
            if cutlass.const_expr(self.c.tma):
                self.load_tma(tma_a, gA, sA, tma_b, gB, sB, barrier, step, warp)
                cute.arch.mbarrier_wait(barrier, step % 2)
            else:
                self.load_plain(mA, sA, mB, sB, step, tid)
            if cutlass.const_expr(self.c.tensor_cores):
                self.multiply(mma, acc, fragA, fragB)
            else:
                acc[step] = acc[step] + sA[tid % _TILE, step].to(Float32)
            cute.arch.sync_threads()
        if cutlass.const_expr(self.c.local_array > 0):
            self.use_local_array(acc, mC)
        out = thread.partition_C(mC)
        cute.autovec_copy(acc, out)

    @cute.jit
    def load_tma(self, tma_a, gA, sA, tma_b, gB, sB, barrier, step: cutlass.Constexpr[int], warp):
        if warp == 0:
            one = cute.make_layout(1)
            for tma, g, s in ((tma_a, gA, sA), (tma_b, gB, sB)):
                tile = cute.local_tile(g, (_TILE, _TILE), (0, step))
                source, target = cute.group_modes(tile, 0, 2), cute.group_modes(s, 0, 2)
                ts, tg = cpasync.tma_partition(tma, 0, one, target, source)
                cute.copy(tma, tg, ts, tma_bar_ptr=barrier)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, 2 * _TILE * _TILE * 2)

    @cute.jit
    def load_plain(self, mA, sA, mB, sB, step: cutlass.Constexpr[int], tid):
        for row in cutlass.range(_TILE, unroll=1):
            if tid < _TILE:
                sA[row, tid] = mA[row, step * _TILE + tid]
                sB[row, tid] = mB[row, step * _TILE + tid]
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()

    @cute.jit
    def multiply(self, mma, acc, fragA, fragB):
        warpgroup.fence()
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        for k in cutlass.range_constexpr(cute.size(fragA, mode=[2])):
            if cutlass.const_expr(self.c.fence_each):
                warpgroup.fence()
            cute.gemm(atom, acc, fragA[None, None, k], fragB[None, None, k], acc)
            if cutlass.const_expr(self.c.fence_each):
                warpgroup.commit_group()
                warpgroup.wait_group(0)
        warpgroup.commit_group()
        warpgroup.wait_group(0)

    @cute.jit
    def use_local_array(self, acc, mC):
        array = cute.make_rmem_tensor((self.c.local_array,), Float32)
        array.fill(1.0)
        index = Int32(mC[0, 0]) % self.c.local_array
        array[index] = acc[0]
        acc[1] = array[(index * 7 + 1) % self.c.local_array]


def compile_tile(config: TileConfig, options: str) -> Any:
    """The compiled tile kernel: (a, b, out), bf16, bf16, fp32."""

    def fake(dtype, columns):
        return make_fake_compact_tensor(
            dtype, (_TILE, columns), stride_order=(1, 0), assumed_align=16
        )

    wide = _TILE * config.steps
    return cute.compile(
        TileKernel(config),
        fake(BFloat16, wide),
        fake(BFloat16, wide),
        fake(Float32, _TILE),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi {options}".strip(),
    )
