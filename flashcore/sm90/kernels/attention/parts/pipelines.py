"""Barriers: the K/V and Q rings, the work slot, and the turns of ping-pong warpgroups."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, pipeline


class NamedBarrier(IntEnum):
    """Hardware barrier ids; 0 is sync_threads. TURN + w is the turn of consumer warpgroup w."""

    TURN = 1


def tma_ring(
    barriers: cute.Pointer, stages: int, tx_bytes: int, consumer_warps: int, cluster_m: int = 1
) -> pipeline.PipelineTmaAsync:
    """A TMA ring whose consumers release a stage with one arrival per warp.

    With a cluster every CTA's consumers release the stage in every CTA, because each CTA's
    producer fills its share of all of them.
    """
    producer = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    if cluster_m == 1:
        consumers = pipeline.CooperativeGroup(pipeline.Agent.Thread, consumer_warps)
        return pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers,
            num_stages=stages,
            producer_group=producer,
            consumer_group=consumers,
            tx_count=tx_bytes,
            defer_sync=True,
        )
    return pipeline.PipelineTmaAsync.create(
        barrier_storage=barriers,
        num_stages=stages,
        producer_group=producer,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32 * consumer_warps),
        tx_count=tx_bytes,
        cta_layout_vmnk=cute.make_layout((1, cluster_m, 1, 1)),
        mcast_mode_mn=(0, 1),
        enable_multicast_signaling=True,
        defer_sync=True,
    )


@dataclass(frozen=True)
class GatherRing(pipeline.PipelineCpAsync):
    """A ring filled by cp.async: a stage is full once all copies of a warp have landed."""

    def consumer_release(self, state):
        """One arrival per warp, as of a TMA ring."""
        with cute.arch.elect_one():
            super().consumer_release(state)


@dataclass(frozen=True)
class FencedGatherRing(GatherRing):
    """A ring filled by cp.async for products.

    cp.async writes through the generic proxy and WGMMA reads through the async one, so whoever has
    waited for a stage fences before its products. The way back needs no fence: a stage is released
    after its products have been waited for.
    """

    def consumer_wait(self, state, try_wait_token=None):
        """Wait until the stage is full and its rows are visible to this thread's products."""
        super().consumer_wait(state, try_wait_token)
        cute.arch.fence_proxy("async.shared", space="cta")


def gather_ring(
    barriers: cute.Pointer, stages: int, consumer_warps: int, products: bool = True
) -> GatherRing:
    """A ring whose stages are filled by one warp each; products: read them, and not loads."""
    ring = pipeline.PipelineCpAsync.create(
        barrier_storage=barriers,
        num_stages=stages,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumer_warps),
        defer_sync=True,
    )
    kind = FencedGatherRing if products else GatherRing
    return kind(ring.sync_object_full, ring.sync_object_empty, stages, None, None)


@dataclass(frozen=True)
class ConvertedRing(pipeline.PipelineAsync):
    """A ring whose stages are written by whole warps, a part of a stage each.

    They write through the generic proxy and WGMMA reads through the async one: each thread fences
    what it has written before its warp's arrival.
    """

    def producer_commit(self, state):
        """One arrival per warp, for its part of the stage."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            super().producer_commit(state)

    def consumer_release(self, state):
        """One arrival per warp, as of a TMA ring."""
        with cute.arch.elect_one():
            super().consumer_release(state)


def converted_ring(
    barriers: cute.Pointer, stages: int, parts: int, consumer_warps: int
) -> ConvertedRing:
    """A ring whose stages are full after `parts` warps have written theirs."""
    ring = pipeline.PipelineAsync.create(
        barrier_storage=barriers,
        num_stages=stages,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, parts),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumer_warps),
        defer_sync=True,
    )
    return ConvertedRing(ring.sync_object_full, ring.sync_object_empty, stages, None, None)


def state_at(count: Int32, stages: int, produces: bool):
    """The position in a ring after `count` stages."""
    phase = (count // stages) % 2
    return pipeline.PipelineState(stages, count, count % stages, phase ^ 1 if produces else phase)


def producer_state(stages: int):
    """The producer's position in a ring."""
    return pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, stages)


def consumer_state(stages: int):
    """A consumer's position in a ring."""
    return pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, stages)


@cute.jit
def first_turn(warpgroup: Int32, warpgroups: cutlass.Constexpr[int]):
    """Before the work loop: the last warpgroup hands the first turn to warpgroup 0."""
    if const_expr(warpgroups > 1):
        if warpgroup == warpgroups - 1:
            cute.arch.barrier_arrive(barrier_id=int(NamedBarrier.TURN), number_of_threads=256)


@cute.jit
def take_turn(warpgroup: Int32, warpgroups: cutlass.Constexpr[int]):
    """Wait until it is this warpgroup's turn to issue products."""
    if const_expr(warpgroups > 1):
        cute.arch.barrier(barrier_id=int(NamedBarrier.TURN) + warpgroup, number_of_threads=256)


@cute.jit
def pass_turn(warpgroup: Int32, warpgroups: cutlass.Constexpr[int]):
    """Let the next warpgroup issue; 256 = the 128 threads that wait and the 128 that arrive."""
    if const_expr(warpgroups > 1):
        following = Int32(0) if warpgroup == warpgroups - 1 else warpgroup + 1
        cute.arch.barrier_arrive(
            barrier_id=int(NamedBarrier.TURN) + following, number_of_threads=256
        )


@cute.jit
def release(ring, state, arrivals: cutlass.Constexpr[int] = 1):
    """Free a stage for one warp, or for as many as it stands for, by whatever ring it is of."""
    with cute.arch.elect_one():
        barrier = ring.sync_object_empty.get_barrier(state.index)
        cute.arch.mbarrier_arrive(barrier, arrive_count=arrivals)


@cute.jit
def await_stage(ring, state):
    """Wait for a stage's load; the waiting loop stays off the path of a load that has landed."""
    ring.consumer_wait(state, ring.consumer_try_wait(state))


@cute.jit
def pass_over(ring, state, warpgroup: Int32, warpgroups: cutlass.Constexpr[int]):
    """Free a stage unread, and let the turn that would have used it go by.

    The stage is waited for: freed before it is full it would count for the load before it.
    """
    take_turn(warpgroup, warpgroups)
    pass_turn(warpgroup, warpgroups)
    await_stage(ring, state)
    ring.consumer_release(state)
