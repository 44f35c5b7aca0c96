"""A batch-invariant plan run by the text of its kernels: chunks, fold, stores and merge.

What is emulated besides (`simt`): TMA, WGMMA and barriers, that is the tiles' products, each a sum
in the order of k, and the order in which tiles come from the producer.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from flashcore.contract.work import Work
from flashcore.planner.types import Plan
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.config.paged import PagedConfig
from tests.emulation import simt
from tests.emulation.simt import Machine, Memory, Registers

PAGED, PARTS = "attention.paged", "attention.parts"


class Pools(NamedTuple):
    """fp32 arrays of 16-bit values. q: [tokens, heads, dim]. k, v: [pages, tokens, heads, dim]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


class Rule(NamedTuple):
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: np.ndarray | None = None


class AccView:
    """As `matmul.acc_rows_cols`: (rows, columns) of a thread's accumulator."""

    def __init__(self, acc: Registers):
        self.acc, self.shape = acc, (2, acc.shape[0] // 2)

    def __getitem__(self, at: tuple[int, int]) -> Any:
        return self.acc[4 * (at[1] // 2) + 2 * at[0] + at[1] % 2]

    def __setitem__(self, at: tuple[int, int], value: Any) -> None:
        self.acc[4 * (at[1] // 2) + 2 * at[0] + at[1] % 2] = value


def _matrix(acc: Registers, rows: int) -> np.ndarray:
    """[rows, columns] of an accumulator [elements, threads]."""
    elements, threads = acc.data.shape
    found = np.zeros((rows, elements * 2), acc.data.dtype)
    row, column = _places(elements, threads)
    found[row, column] = acc.data
    return found


def _places(elements: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    i, t = np.arange(elements)[:, None], np.arange(threads)
    return t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2), i // 4 * 8 + 2 * (t % 4) + i % 2


def _product(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + a b, 16 of the inner dimension at a time, each row by itself."""
    for k in range(0, a.shape[1], 16):
        acc = acc + (a[:, k : k + 16, None] * b[None, k : k + 16]).sum(1, dtype=np.float32)
    return acc


@lru_cache
def attention_machine(config: PagedConfig, chunk_tokens: int) -> Any:
    """The consumers of a CTA: an object with `consume_chunks`, and what it is called with."""
    machine = Machine(128 * config.num_consumer_warpgroups)
    threads = len(machine.lanes)
    state = SimpleNamespace(advance=lambda: None)

    def fragments(c: PagedConfig, *_: Any) -> Any:
        acc = machine.registers(c.v_columns // 2, np.float32)
        rows = {n: machine.registers(2, np.float32) for n in ("row_max", "row_sum", "alpha")}
        return SimpleNamespace(accO=acc, **rows)

    def store_row(values: Any, row: Memory, lane: Any, there: Any) -> None:
        """Of a quad, without the exchange that makes vectors: what each lane holds."""
        for col in range(row.shape[0] // 4):
            simt.push(there)
            row[8 * (col // 2) + 2 * lane + col % 2] = values[col]
            simt.pop()

    none = SimpleNamespace()
    machine.modules |= {
        f"{PARTS}.matmul": SimpleNamespace(acc_rows_cols=AccView),
        f"{PARTS}.pipelines": SimpleNamespace(
            consumer_state=lambda stages: state, first_turn=lambda *_: None
        ),
        f"{PARTS}.consumer": SimpleNamespace(
            ROWS=2, Fragments=None, fragments=fragments,
            last_product=lambda frag, *_: machine.consumer.product(frag),
        ),
        f"{PARTS}.epilogue": SimpleNamespace(store_row=store_row),
        f"{PAGED}.operands": SimpleNamespace(Operands=None),
        f"{PAGED}.convert": none,
    }  # fmt: skip
    chunks = machine.load(f"{PAGED}.chunks")
    chunks.CHUNK_TOKENS = chunk_tokens
    softmax, intervals = machine.load(f"{PARTS}.softmax"), machine.load(f"{PAGED}.intervals")

    class Consumer(chunks.ChunkedConsumer):
        warpgroups = config.num_consumer_warpgroups
        dtype = out_dtype = config.dtype

        def __init__(self) -> None:
            self.config, self.log = config, []

        def load_queries(self, m: Any, item: Any, *_: Any) -> None:
            """Also begins the stream of tiles that the producer sends."""
            g, row = config.group_size, np.arange(config.tile_m)
            packed = item.row_begin + np.where(row < item.num_rows, row, 0)
            token = m.q_tokens.data[packed // g]
            q = m.pools.q[token, item.kv_head * g + packed % g]
            self.q = np.where((row < item.num_rows)[:, None], q, 0).astype(np.float32)
            self.coming, self.before = list(range(item.end - 1, item.first - 1, -1)), None
            self.item = item

        def keys(self, m: Any, n: int, pool: np.ndarray) -> np.ndarray:
            """Tile n, what lies past the run's end as the producer has it: its last page again."""
            token = n * config.tile_n + np.arange(config.tile_n)
            last = (self.item.num_tokens - 1) // config.page_tokens
            page = m.cols[self.item.entry + np.minimum(token // config.page_tokens, last)]
            return pool[page, token % config.page_tokens, self.item.kv_head]

        def first_tile(self, frag: Any, rows: Any, m: Any, scale: Any, *rest: Any) -> None:
            item, column = rest[-2], rest[-1]
            assert self.before is None
            self.scores(frag, rows, m, scale, column, item.end - 1, True, True)

        def tile(self, frag: Any, rows: Any, m: Any, scale: Any, *rest: Any) -> None:
            column, n, masked = rest[-3:]
            self.product(frag)
            moved = self.scores(frag, rows, m, scale, column, n, masked, False)
            alpha = frag.alpha.data[np.arange(frag.accO.shape[0]) // 2 % 2]
            frag.accO.data[:] = np.where(moved, frag.accO.data * alpha, frag.accO.data)

        def scores(
            self, frag: Any, rows: Any, m: Any, scale: Any, column: Any, n: Any, masked: bool,
            first: bool,
        ) -> Any:  # fmt: skip
            came = self.coming.pop(0)
            assert not masked or simt.uniform(n) == came
            self.log.append((came, masked, first))
            zero = np.zeros((config.tile_m, config.tile_n), np.float32)
            s = _product(self.q, self.keys(m, came, m.pools.k).T, zero)
            row, place = _places(config.tile_n // 2, threads)
            acc = Registers(s[row, place])
            view = AccView(acc)
            if config.softcap:
                softmax.soft_cap(view, scale.cap_factor)
            if masked:
                intervals.mask_scores(config, view, rows, None, column + came * config.tile_n)
            moved = softmax.online_softmax(
                view, frag.row_max, frag.row_sum, frag.alpha, scale.log2, first,
                config.rescale_log2,
            )  # fmt: skip
            p = simt._to(_matrix(acc, config.tile_m).reshape(-1), config.dtype)
            # Rows of V that no row of the item sees are zeroed before the product.
            v, token = self.keys(m, came, m.pools.v), came * config.tile_n
            token = token + np.arange(config.tile_n)
            seen = (token >= self.item.low) & (token < self.item.high)
            self.before = p.reshape(s.shape), np.where(seen[:, None], v, 0).astype(np.float32)
            return moved

        def product(self, frag: Any) -> None:
            p, v = self.before
            self.before = None
            row, place = _places(frag.accO.shape[0], threads)
            out = _product(p, v, _matrix(frag.accO, config.tile_m))
            frag.accO.data[:] = out[row, place]

    machine.consumer = Consumer()
    return machine


def attend(
    plan: Plan,
    pools: Pools,
    config: PagedConfig,
    merge: MergeConfig,
    chunk_tokens: int,
    rule: Rule,
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """(out [tokens, heads, v_dim], lse, every tile in the order in which it was done)."""
    machine = attention_machine(config, chunk_tokens)
    chunks, consumer = machine.load(f"{PAGED}.chunks"), machine.consumer
    consumer.log = []
    intervals, loop = machine.load(f"{PAGED}.intervals"), machine.load(f"{PAGED}.work_loop")
    tokens, heads, dim = pools.q.shape
    nothing = np.float32(np.nan)
    out, lse = (
        np.full((tokens, heads, config.v_head_dim), nothing),
        np.full((tokens, heads), nothing),
    )
    partials = max(plan.num_partial_tokens, 1)
    partial_out = np.full((partials, heads, config.v_head_dim), nothing)
    partial_lse = np.full((partials, heads), nothing)
    arrays = {
        "q_tokens": plan.q_tokens.numpy(), "q_positions": plan.q_positions.numpy(), "out": out,
        "lse": lse, "partial_out": partial_out, "partial_lse": partial_lse,
    }  # fmt: skip
    if rule.sinks is not None:
        arrays["sinks"] = rule.sinks
    m = SimpleNamespace(
        **{name: Memory.of(array) for name, array in arrays.items()},
        pools=pools, cols=plan.cols.numpy(), q_index=None, tree_positions=None,
    )  # fmt: skip
    window = intervals.Bounds(*rule.window)
    items = []
    for words in plan.work.tolist():
        item = intervals.measure_item(
            config, words, Work, m.q_positions, m.q_tokens, None, None, window
        )
        items.append(type(item)(*(x if x is None else simt.uniform(x) for x in item)))
    stream = iter([*items, SimpleNamespace(valid=-1)])
    loop.await_item = lambda slot, phase: next(stream)
    threads = len(machine.lanes)
    layout = chunks.totals_layout(config)
    totals = chunks.Totals(
        Memory(np.full(config.total_elements, nothing), *layout),
        Memory.of(np.full(config.total_rows, nothing)[:threads].copy()),
    )
    consumer.consume_chunks(
        m, None, None, None, totals, None, None, None, np.float32(dim**-0.5),
        np.float32(rule.softcap), window, None, None, machine.lanes,
    )  # fmt: skip
    merge_partials(plan, m, merge, (tokens, heads))
    return out, lse, consumer.log


def merge_partials(plan: Plan, m: Any, config: MergeConfig, shape: tuple[int, int]) -> None:
    """The merge kernel: a CTA of eight warps a row, or each warp with its own."""
    together = config.warps_per_row > 1
    rows = shape[0] * -(-shape[1] // config.heads_per_warp)
    lists = plan.merge_partials if plan.merge_partials.numel() else plan.merge_offsets
    for index in range(rows):
        threads, first = (256, 0) if together else (32, index % 8 * 32)
        machine = _merger(threads, first)
        machine.block = index if together else index // 8
        if config.fixed_order:
            kernel = machine.load("fold_merge").FoldMerge(config)
        else:
            kernel = machine.load("merge").Merge(config)
        kernel.dtype = config.dtype
        kernel.kernel(
            m.out, m.lse, m.partial_out, m.partial_lse, Memory.of(plan.merge_offsets.numpy()),
            Memory.of(lists.numpy()), getattr(m, "sinks", None), None, 2**31 - 1,
        )  # fmt: skip


_mergers: dict[tuple[int, int], Machine] = {}


def _merger(threads: int, first: int) -> Machine:
    if (threads, first) not in _mergers:
        machine = Machine(threads, first)
        machine.modules[f"{PARTS}.device_counts"] = SimpleNamespace(plan_fits=lambda *_: True)
        _mergers[threads, first] = machine
    return _mergers[threads, first]
