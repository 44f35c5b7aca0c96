"""The prefix cache against a naive one that searches lists, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.replay.prefix_cache import (
    ROOT,
    PageIds,
    PrefixCache,
    check_page_tokens,
    prompt_page_keys,
)
from flashcore.replay.trace import Request

Path = tuple[int, ...]


@dataclass
class NaiveCache:
    """Knows each cached page by its whole path, and looks everything up by search."""

    num_pages: int
    cached: dict[Path, int] = field(default_factory=dict)
    released_at: dict[Path, int] = field(default_factory=dict)
    clock: int = 0
    evicted: int = 0

    def match(self, keys: list[int]) -> list[int]:
        found = []
        for end in range(1, len(keys) + 1):
            if tuple(keys[:end]) not in self.cached:
                break
            found.append(self.cached[tuple(keys[:end])])
        return found

    def evictable(self, held: set[int]) -> list[Path]:
        """Unreferenced paths, the next to go first: the least recently released, the deepest."""
        idle = [path for path, page in self.cached.items() if page not in held]
        return sorted(idle, key=lambda path: (self.released_at[path], -len(path)))

    def evict(self, held: set[int]) -> None:
        path = self.evictable(held)[0]
        children = [other for other in self.cached if other[:-1] == path]
        assert not children, "a parent would go before its child"
        del self.cached[path], self.released_at[path]
        self.evicted += 1


@dataclass
class Holder:
    keys: list[int]
    pages: PageIds


class Pair:
    """Does everything to both caches and compares."""

    def __init__(self, num_pages: int) -> None:
        self.cache = PrefixCache(num_pages)
        self.naive = NaiveCache(num_pages)
        self.holders: list[Holder] = []

    def held(self) -> list[int]:
        return [page for holder in self.holders for page in holder.pages.tolist()]

    def admit(self, keys: list[int], private: int) -> None:
        hit = self.cache.match(keys)
        assert hit.tolist() == self.naive.match(keys)
        held = {*self.held(), *hit.tolist()}
        wanted = len(keys) - hit.size + private
        idle_cached = sum(page not in held for page in self.naive.cached.values())
        free = self.naive.num_pages - len({*held, *self.naive.cached.values()})
        assert self.cache.free_pages == free
        assert self.cache.obtainable_beside(hit) == idle_cached + free
        if wanted > idle_cached + free:
            return
        self.cache.hold(hit)
        for _ in range(wanted - free):
            self.naive.evict(held)
        fresh = self.cache.extend(int(hit[-1]) if hit.size else ROOT, keys[hit.size :])
        pages = np.concatenate([hit, fresh, self.cache.take(private)])
        new = pages[hit.size :].tolist()
        assert len(set(new)) == len(new)
        assert not held & set(new), "a page in use was given out again"
        for depth, page in enumerate(pages[: len(keys)].tolist(), 1):
            self.naive.cached[tuple(keys[:depth])] = page
        self.holders.append(Holder(keys, pages))

    def release(self, index: int) -> None:
        holder = self.holders.pop(index)
        self.cache.release(holder.pages)
        self.naive.clock += 1
        for depth in range(1, len(holder.keys) + 1):
            self.naive.released_at[tuple(holder.keys[:depth])] = self.naive.clock

    def compare(self) -> None:
        references = np.zeros(self.naive.num_pages, np.int32)
        np.add.at(references, np.array(self.held(), np.int64), 1)
        assert (self.cache.references == references).all()
        for path, page in self.naive.cached.items():
            assert self.cache.match(path).tolist()[-1] == page
            assert len(self.cache.match(path)) == len(path)
        ids = list(self.naive.cached.values())
        assert len(set(ids)) == len(ids)
        assert self.cache.evictable_pages == len(self.naive.evictable(set(self.held())))
        assert self.cache.evictions == self.naive.evicted


# Three keys and paths up to four pages make most admissions hit, and 12 pages make most evict.
ADMISSION = st.tuples(st.lists(st.integers(0, 2), max_size=4), st.integers(0, 2))
RELEASE = st.integers(0, 10)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.lists(ADMISSION | RELEASE, max_size=40))
def test_agrees_with_a_naive_cache(
    num_pages: int, actions: list[tuple[list[int], int] | int]
) -> None:
    pair = Pair(num_pages)
    for action in actions:
        if isinstance(action, tuple):
            pair.admit(*action)
        elif pair.holders:
            pair.release(action % len(pair.holders))
        pair.compare()


def test_the_least_recently_released_goes_first_from_its_end() -> None:
    cache = PrefixCache(4)
    old, new = cache.extend(ROOT, [1, 2]), cache.extend(ROOT, [3, 4])
    cache.release(new)
    cache.release(old)
    cache.hold(cache.match([3]))  # used again, and released last of all
    cache.release(cache.match([3]))
    gone = [cache.take(1).tolist()[0] for _ in range(4)]
    assert gone == [new[1], old[1], old[0], new[0]]
    assert cache.evictions == 4


def test_too_many_pages_takes_none() -> None:
    cache = PrefixCache(3)
    cache.take(2)
    with pytest.raises(MemoryError, match="2 pages wanted, 1 free or evictable"):
        cache.take(2)
    assert cache.free_pages == 1


def test_extending_by_a_cached_key_is_refused() -> None:
    cache = PrefixCache(3)
    cache.extend(ROOT, [8])
    with pytest.raises(ValueError, match="key 8 below page -1 is cached already"):
        cache.extend(ROOT, [8])


@pytest.mark.parametrize("num_pages", [0, -1, 2**28 + 1])
def test_impossible_sizes(num_pages: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages is {num_pages}; it must be 1 to"):
        PrefixCache(num_pages)


@pytest.mark.parametrize("page_tokens", [1, 16, 128, 256, 512, 1024, 1536])
def test_page_sizes_that_nest_with_hash_blocks(page_tokens: int) -> None:
    check_page_tokens(page_tokens)


@pytest.mark.parametrize("page_tokens", [0, -512, 3, 384, 513, 768])
def test_page_sizes_that_do_not_nest(page_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"page_tokens is {page_tokens}; it must divide 512"):
        check_page_tokens(page_tokens)


@pytest.mark.parametrize("page_tokens", [1, 8, 16, 32, 48, 512])
def test_page_sizes_that_nest_with_blocks_of_16(page_tokens: int) -> None:
    check_page_tokens(page_tokens, 16)


@pytest.mark.parametrize("page_tokens", [0, 3, 24, 100])
def test_page_sizes_that_do_not_nest_with_blocks_of_16(page_tokens: int) -> None:
    with pytest.raises(
        ValueError, match=f"page_tokens is {page_tokens}; it must divide 16 or be a multiple of 16"
    ):
        check_page_tokens(page_tokens, 16)


@pytest.mark.parametrize(
    ("page_tokens", "keys"),
    [(8, [7, 7, 8, 8]), (16, [7, 8]), (32, [(7, 8)]), (64, [])],
)
def test_keys_of_blocks_of_16(page_tokens: int, keys: list[int | tuple[int, ...]]) -> None:
    assert prompt_page_keys(Request(0.0, 39, 1, (7, 8, 9)), page_tokens, 16) == keys


@pytest.mark.parametrize(
    ("page_tokens", "keys"),
    [
        (256, [7, 7, 8, 8, 9]),  # the last 100 tokens fill no page
        (512, [7, 8]),
        (1024, [(7, 8)]),
        (2048, []),
    ],
)
def test_keys_cover_full_pages_only(page_tokens: int, keys: list[int | tuple[int, ...]]) -> None:
    request = Request(0.0, 5 * 256 + 100, 1, (7, 8, 9))
    assert prompt_page_keys(request, page_tokens) == keys
