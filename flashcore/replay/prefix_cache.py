"""A prefix cache over KV pages: a radix tree of full prompt pages, references and LRU eviction.

A page is in one of four states: free; private (held by one request, unknown to the tree); cached
and referenced; cached and unreferenced. Only the last may be evicted.

Requests hold whole paths, from the root down. So an unreferenced page has unreferenced children
only, and those were released before it or together with it. Queueing the pages of one release
from the deepest up therefore keeps every child ahead of its parent, and one ordered queue gives
both the LRU order and "children before parents".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from flashcore.replay.trace import HASH_BLOCK_TOKENS, Request

PageIds = NDArray[np.int32]
PageKey = int | tuple[int, ...]

ROOT = -1
MAX_PAGES = 2**28


def check_page_tokens(page_tokens: int, block_tokens: int = HASH_BLOCK_TOKENS) -> None:
    """Raise ValueError unless page edges and the edges of hash blocks nest."""
    divides = 1 <= page_tokens <= block_tokens and block_tokens % page_tokens == 0
    if not divides and (page_tokens < 1 or page_tokens % block_tokens):
        raise ValueError(
            f"page_tokens is {page_tokens}; it must divide {block_tokens} "
            f"or be a multiple of {block_tokens}, the tokens of one hash block"
        )


def prompt_page_keys(
    request: Request, page_tokens: int, block_tokens: int = HASH_BLOCK_TOKENS
) -> Sequence[PageKey]:
    """One key for each full page of the prompt: the hash id, or ids, of the blocks it is made of.

    Together with the page before it, the key says what a page holds. The tokens after the last
    full page have no key: they are never shared.
    """
    full_pages = request.input_tokens // page_tokens
    ids = request.hash_ids
    if page_tokens > block_tokens:
        blocks = page_tokens // block_tokens
        return [ids[page * blocks : (page + 1) * blocks] for page in range(full_pages)]
    pages_per_block = block_tokens // page_tokens
    return [ids[page // pages_per_block] for page in range(full_pages)]


class PrefixCache:
    """A pool of `num_pages` KV pages with ids 0 .. num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        if not 1 <= num_pages <= MAX_PAGES:
            raise ValueError(f"num_pages is {num_pages}; it must be 1 to {MAX_PAGES}")
        self.num_pages = num_pages
        self.evictions = 0
        self.references: NDArray[np.int32] = np.zeros(num_pages, np.int32)
        self._never_taken = 0  # this page and all after it are free
        self._freed: list[int] = []
        self._children: dict[tuple[int, PageKey], int] = {}  # (parent page, key) -> page
        self._edges: dict[int, tuple[int, PageKey]] = {}  # the same, from the page
        self._unreferenced: OrderedDict[int, None] = OrderedDict()  # the next to evict first

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return self.num_pages - self._never_taken + len(self._freed)

    @property
    def evictable_pages(self) -> int:
        """Cached pages that no request holds."""
        return len(self._unreferenced)

    def match(self, keys: Sequence[PageKey]) -> PageIds:
        """Page ids of the longest cached prefix of `keys`; changes nothing."""
        pages: list[int] = []
        parent = ROOT
        for key in keys:
            page = self._children.get((parent, key))
            if page is None:
                break
            pages.append(page)
            parent = page
        return np.array(pages, np.int32)

    def obtainable_beside(self, held: PageIds) -> int:
        """Pages that could be taken, free or evicted, once the pages `held` are held."""
        idle = int(np.count_nonzero(self.references[held] == 0))
        return self.free_pages + self.evictable_pages - idle

    def hold(self, pages: PageIds) -> None:
        """Add a reference to each page of a matched path, which keeps them from eviction."""
        for page in pages[self.references[pages] == 0].tolist():
            del self._unreferenced[page]
        self.references[pages] += 1

    def extend(self, parent: int, keys: Sequence[PageKey]) -> PageIds:
        """Take one page for each key, cached as a path below `parent`, with one reference each.

        Raises ValueError when the first key is cached already (match and hold it instead), and
        MemoryError as `take` does.
        """
        if keys and (parent, keys[0]) in self._children:
            raise ValueError(f"key {keys[0]} below page {parent} is cached already; hold it")
        pages = self.take(len(keys))
        children, edges = self._children, self._edges
        for page, key in zip(pages.tolist(), keys, strict=True):
            edges[page] = edge = (parent, key)
            children[edge] = page
            parent = page
        return pages

    def take(self, count: int) -> PageIds:
        """Take `count` private pages with one reference each, evicting when too few are free.

        Raises MemoryError, and takes none, when free and evictable pages do not suffice.
        """
        obtainable = self.free_pages + self.evictable_pages
        if count > obtainable:
            raise MemoryError(f"{count} pages wanted, {obtainable} free or evictable")
        self._evict_oldest(count - self.free_pages)
        pages = np.array(self._take_free(count), np.int32)
        self.references[pages] = 1
        return pages

    def release(self, pages: PageIds) -> None:
        """Drop one reference of each page, given in sequence order; private pages become free."""
        self.references[pages] -= 1
        idle = pages[self.references[pages] == 0].tolist()
        for page in reversed(idle):
            if page in self._edges:
                self._unreferenced[page] = None
            else:
                self._freed.append(page)

    def _take_free(self, count: int) -> list[int]:
        """Those freed last, then those never taken."""
        kept = max(len(self._freed) - count, 0)
        pages = self._freed[: kept - 1 if kept else None : -1]
        del self._freed[kept:]
        fresh = self._never_taken
        self._never_taken += count - len(pages)
        pages.extend(range(fresh, self._never_taken))
        return pages

    def _evict_oldest(self, count: int) -> None:
        if count <= 0:
            return
        children, edges, unreferenced = self._children, self._edges, self._unreferenced
        oldest = list(islice(unreferenced, count))
        for page in oldest:
            del unreferenced[page], children[edges.pop(page)]
        self._freed.extend(oldest)
        self.evictions += count
