"""Items of few rows on fp8 pages, by the text of their consumer warps on the host.

What is emulated besides (`simt`): instructions of a warp (`warp_products`), lane by lane as PTX has
its fragments, on the bytes of the stages as the kernel's layout has them; the loads, a tile for
each wait; and q, which is fp16 already.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from flashcore.contract.work import Work
from flashcore.planner.types import Plan
from flashcore.sm90.config.paged import PagedConfig
from tests.emulation import simt
from tests.emulation.simt import Machine, Memory, Registers
from tests.fp8 import FORMATS

PAGED, PARTS = "attention.paged", "attention.parts"
START = 1024  # of the first stage
THREADS = 128


class Pools(NamedTuple):
    """q: [tokens, heads, dim] of fp16 values. k, v: codes [pages, tokens, heads, dim]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


class Instructions:
    """`parts.warp_products`, on bytes of shared memory."""

    def __init__(self, machine: Machine, memory: np.ndarray):
        self.machine, self.memory = machine, memory

    def load_matrices(self, address: Any, transposed: bool) -> list[np.ndarray]:
        """Matrix i from the addresses of lanes 8 i to 8 i + 7."""
        address = np.broadcast_to(address, THREADS).reshape(4, 4, 8)  # warp, matrix, row
        assert np.all(address % 16 == 0)
        banks = np.sort(address // 16 % 8, -1)
        assert np.array_equal(banks, np.broadcast_to(np.arange(8), banks.shape)), "banks"
        rows = self.memory[address[..., None] + np.arange(16)].view(np.uint16)
        if transposed:
            rows = np.swapaxes(rows, -1, -2)
        words = np.ascontiguousarray(rows).view(np.int32)  # of lane 4 g + t: row g, word t
        return [words[:, i].reshape(THREADS) for i in range(4)]

    def transpose(self, matrix: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(matrix).view(np.uint16).reshape(4, 8, 8)
        return np.ascontiguousarray(np.swapaxes(rows, -1, -2)).view(np.int32).reshape(THREADS)

    def permute_bytes(self, word: np.ndarray, selector: Any) -> np.ndarray:
        selector = np.broadcast_to(selector, THREADS)
        source = np.zeros((THREADS, 8), np.uint8)
        source[:, :4] = np.ascontiguousarray(word, np.int32).view(np.uint8).reshape(THREADS, 4)
        nibbles = selector[:, None] >> np.arange(0, 16, 4) & 7
        return np.take_along_axis(source, nibbles, 1).view(np.int32).reshape(THREADS)

    def widen(self, words: list[np.ndarray], kv_dtype: str) -> list[np.ndarray]:
        found = []
        for word in words:
            codes = torch.from_numpy(np.ascontiguousarray(word).view(np.uint8).copy())
            wide = codes.view(FORMATS[kv_dtype]).to(torch.float16).numpy().view(np.int32)
            found += [wide[0::2].copy(), wide[1::2].copy()]
        return found

    def multiply(self, acc: Registers, a: list[np.ndarray], b: list[np.ndarray]) -> None:
        """m16n8k16: of lane 4 g + t, a0: row g, k = 2 t, + 1; a1: row g + 8; a2, a3: k + 8."""
        a = [np.ascontiguousarray(x).view(np.float16).reshape(4, 8, 8) for x in a]
        left = np.concatenate([np.concatenate(a[:2], 1), np.concatenate(a[2:], 1)], 2)
        b = [np.ascontiguousarray(x).view(np.float16).reshape(4, 8, 8) for x in b]
        right = np.concatenate(b, 2)  # [warp, column, k]
        product = np.einsum("wik,wjk->wij", *(x.astype(np.float32) for x in (left, right)))
        for i in range(4):
            own = product[:, 8 * (i // 2) : 8 * (i // 2) + 8].reshape(4, 8, 4, 2)[..., i % 2]
            acc[i] = acc[i] + own.reshape(THREADS)

    def load_words(self, address: Any, count: int) -> Registers:
        address = np.where(simt.active(), address, START) + np.zeros(THREADS, np.int64)
        assert np.all(address % (4 * count) == 0)
        words = self.memory[address[:, None] + np.arange(4 * count)].view(np.float32)
        return Registers(np.ascontiguousarray(words.T))

    def store_words(self, values: Registers, address: Any) -> None:
        active = np.broadcast_to(simt.active(), THREADS)
        count = len(values.data)
        at = np.broadcast_to(address, THREADS)[active, None] + np.arange(4 * count)
        self.memory[at] = np.ascontiguousarray(values.data.T[active]).view(np.uint8)

    def load_pairs(self, row: Memory, column: Any) -> list[np.ndarray]:
        at = row.start + column
        values = row.data[at[:, None] + np.arange(4)].astype(np.float16)
        return list(values.view(np.int32).T.copy())


def places(columns: int, tile_n: int) -> np.ndarray:
    """Byte of each value of a stage of fp8, as the loads' layout has it."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32
    from cutlass.cute.runtime import from_dlpack

    from flashcore.sm90.kernels.attention.paged.gather import byte_layout
    from flashcore.sm90.kernels.attention.parts import matmul

    @cute.jit
    def evaluate(found):
        layout = byte_layout(matmul.narrow_smem_layout(tile_n, columns, 1), 8)
        for i in cutlass.range(tile_n * columns):
            found[i] = Int32(cute.crd2idx((i // columns, i % columns, 0), layout))

    found = torch.zeros(tile_n * columns, dtype=torch.int32)
    evaluate(from_dlpack(found))
    return found.view(tile_n, columns).numpy()


class Ring:
    """Loads of K or of V: a tile for each wait, what is in the other stages gone."""

    def __init__(self, memory: np.ndarray, start: int, tile_bytes: int, stages: int):
        self.memory, self.start, self.tile_bytes, self.stages = memory, start, tile_bytes, stages
        self.coming: list[np.ndarray] = []
        self.freed = 0

    def wait(self, stage: int) -> None:
        assert 0 <= stage < self.stages
        self.memory[self.start : self.start + self.stages * self.tile_bytes] = 0xFF
        begin = self.start + stage * self.tile_bytes
        self.memory[begin : begin + self.tile_bytes] = self.coming.pop(0)


class Consumer:
    """The consumer warps of a CTA of `config`."""

    def __init__(self, config: PagedConfig):
        self.config = c = config
        self.machine = machine = Machine(THREADS)
        k_bytes, v_bytes = c.tile_n * c.k_columns, c.tile_n * c.v_columns
        of_v = START + c.stages * k_bytes
        self.totals = of_v + c.stages * v_bytes
        self.memory = np.zeros(self.totals + 4 * c.few_totals, np.uint8)
        self.k = Ring(self.memory, START, k_bytes, c.stages)
        self.v = Ring(self.memory, of_v, v_bytes, c.stages)
        self.places = places(c.k_columns, c.tile_n), places(c.v_columns, c.tile_n)
        machine.names |= {"Uint32": lambda x: x}
        arch = machine.names["cute"].arch
        arch.fence_proxy, arch.sync_warp = lambda *_, **__: None, lambda: None
        machine.modules |= {
            f"{PARTS}.warp_products": Instructions(machine, self.memory),
            f"{PARTS}.matmul": SimpleNamespace(pack_pair=pack_pair),
            f"{PARTS}.pipelines": SimpleNamespace(
                state_at=State, await_stage=lambda ring, state: ring.wait(state.index),
                release=self._release,
            ),
            f"{PARTS}.consumer": SimpleNamespace(here=lambda x: x),
            f"{PAGED}.operands": SimpleNamespace(Operands=None),
            f"{PAGED}.convert": SimpleNamespace(pair_as_fp16=lambda pair: pair),
            f"{PAGED}.barriers": SimpleNamespace(sync_warpgroup=lambda _: None),
        }  # fmt: skip
        self.item = machine.load(f"{PAGED}.few_rows.item")
        self.shape = machine.load(f"{PAGED}.few_rows.shape")

    def _release(self, ring: Ring, state: State) -> None:
        ring.freed += 1

    def attend(self, m: Any, pools: Pools, item: Any, window: Any, scale: Any, tiles: int) -> None:
        """An item whose tiles are loaded as they are asked for."""
        c = self.config
        for ring, pool, place in zip((self.k, self.v), pools[1:], self.places, strict=True):
            ring.coming = []
            for n in range(item.end - 1, item.first - 1, -1):
                token = n * c.tile_n + np.arange(c.tile_n)
                last = (item.num_tokens - 1) // c.page_tokens
                page = m.cols[item.entry + np.minimum(token // c.page_tokens, last)]
                stage = np.zeros(place.size, np.uint8)
                stage[place] = pool[page, token % c.page_tokens, item.kv_head]
                ring.coming.append(stage)
            ring.freed = 0
        loads = self.item.Loads(START, self.v.start, self.k, self.v, self.totals)
        rows = int(np.max(item.num_rows))
        shape = next(s for s in self.shape.shapes_of(c) if rows <= s.rows)
        self.item.attend(shape, c.dtype, m, item, window, scale, loads, tiles, self.machine.lanes)
        for ring in (self.k, self.v):
            assert ring.freed == item.end - item.first
            assert not ring.coming


class State:
    """A position in a ring, as `pipelines.state_at` gives it."""

    def __init__(self, count: int, stages: int, produces: bool):
        assert not produces
        self.count, self.stages = count, stages

    @property
    def index(self) -> int:
        return self.count % self.stages

    def advance(self) -> None:
        self.count += 1


def pack_pair(low: Any, high: Any, dtype: str) -> np.ndarray:
    assert dtype == "fp16"
    pair = np.stack([np.float16(low), np.float16(high)], -1)
    return np.ascontiguousarray(pair).view(np.int32).reshape(-1)


def items_of(consumer: Consumer, plan: Plan, m: Any, window: Any) -> list[Any]:
    """The plan's items, as the producer publishes them."""
    intervals = consumer.machine.load(f"{PAGED}.intervals")
    found = []
    for words in plan.work.tolist():
        item = intervals.measure_item(
            consumer.config, words, Work, m.q_positions, m.q_tokens, None, None, window
        )
        found.append(type(item)(*(x if x is None else simt.uniform(x) for x in item)))
    return found
