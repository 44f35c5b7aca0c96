"""What items cost, and how much of it each worker shall have: `planner.split` on the device."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.work import Group
from flashcore.planner.split import (
    COST_UNIT,
    SHORT_SPLIT_TOKENS,
    TILE_TOKENS,
    Costs,
    fills_tiles,
    read_cost,
)
from flashcore.sm90.config.planner import GROUP_THREADS
from flashcore.sm90.kernels.planner.block import Shared, block_reduce, block_sums
from flashcore.sm90.kernels.planner.groups import row_blocks

# What some group is, in `split_share`.
LONG = 1  # longer than a worker's share of all work
UNLIKE = 2  # not as long as the first


@cute.jit
def split_share(plan: Plan, problem: Problem, num_groups: Int32, shared: Shared):
    """`split.split_share` of all groups, and `split.costs_of`.

    Of each group `plan.member_offsets` is the number of its members yet.
    """
    tid, _, _ = cute.arch.thread_idx()
    block = Int64(problem.block_cost)
    once, in_blocks, both, full = Int64(0), Int64(0), Int64(0), Int64(0)
    for h in cutlass.range(tid, num_groups, GROUP_THREADS, unroll=1):
        queries = plan.groups[h, int(Group.NUM_Q)]
        blocks = Int64(row_blocks(problem, queries))
        tokens = Int64(plan.groups[h, int(Group.NUM_TOKENS)])
        once = once + tokens
        in_blocks = in_blocks + tokens * blocks
        both = both + tokens * token_cost(blocks, Costs(Int64(1), block))
        if fills_tiles(Int64(queries) * Int64(problem.group_size), Int64(plan.member_offsets[h])):
            full = full + Int64(1)
    once, in_blocks, both, full = block_sums((once, in_blocks, both, full), shared.wide)
    if full > 0:
        block = Int64(0)
        both = read_cost(in_blocks, once)
    computed, reads = in_blocks * block, Int64(0)
    if Int64(COST_UNIT) * once >= computed:
        reads = Int64(1)
    costs = Costs(reads, block)
    total = both if reads == 1 else computed
    total = total * Int64(problem.kv_heads)
    workers, found = Int64(problem.num_workers), Int32(0)
    first = run_cost(plan, problem, Int32(0), costs)
    for h in cutlass.range(tid, num_groups, GROUP_THREADS, unroll=1):
        cost = run_cost(plan, problem, h, costs)
        if 4 * cost * workers > 5 * total:
            found = found | LONG
        if cost != first:
            found = found | UNLIKE
    found = block_reduce((found,), ("or",), shared.sums)[0]
    share = Int64(0)
    if problem.num_workers > 1 and (found & LONG) != 0:
        share = (total + workers - 1) // workers
        if (found & UNLIKE) != 0:
            two = (total + 2 * workers - 1) // (2 * workers)
            four = (total + 4 * workers - 1) // (4 * workers)
            most = Int64(COST_UNIT) * Int64(problem.long_split_tokens)
            share = two if two < most else most
            share = share if share > four else four
        least = problem.min_split_tokens
        if total < COST_UNIT * TILE_TOKENS * workers:
            least = min(least, Int32(SHORT_SPLIT_TOKENS))
        least = Int64(COST_UNIT) * Int64(least)
        share = share if share > least else least
    return share, costs


@cute.jit
def token_cost(blocks: Int64, costs: Costs):
    """`split.token_cost`."""
    read, computed = costs.reads * Int64(read_cost(blocks)), costs.block * blocks
    return read if read > computed else computed


@cute.jit
def run_cost(plan: Plan, problem: Problem, h: Int32, costs: Costs):
    """`split.run_cost` of one item of a group, 0 past the last group."""
    cost = Int64(0)
    blocks = Int64(row_blocks(problem, plan.groups[h, int(Group.NUM_Q)]))
    if blocks > 0:
        tokens = Int64(plan.groups[h, int(Group.NUM_TOKENS)])
        cost = tokens * token_cost(blocks, costs) // blocks
    return cost
