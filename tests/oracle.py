"""Brute-force answers in plain Python and numpy, written from the definitions alone.

Nothing here uses the package's algorithms: sets of occurrences instead of owners and links, loops
over tokens instead of segments, one softmax per query and head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def layout_rows(token_pages: list[list[int]], page_tokens: int) -> list[list[tuple[int, int]]]:
    """Per sequence its (page, tokens) entries, token by token."""
    rows = []
    for pages in token_pages:
        row: list[tuple[int, int]] = []
        for page in pages:
            if row and row[-1][0] == page and row[-1][1] < page_tokens:
                row[-1] = (page, row[-1][1] + 1)
            else:
                row.append((page, 1))
        rows.append(row)
    return rows


def staging(rows: list[list[tuple[int, int]]], resident: set[int]) -> list[int]:
    """Each used page that is not resident, once, in first-use order."""
    seen: list[int] = []
    for row in rows:
        for page, _ in row:
            if page not in resident and page not in seen:
                seen.append(page)
    return seen


@dataclass(frozen=True)
class Run:
    """A group: pages with their tokens, and its members as (row, index of its first page there)."""

    pages: tuple[tuple[int, int], ...]
    members: tuple[tuple[int, int], ...]


def groups(rows: list[list[tuple[int, int]]], page_tokens: int) -> list[Run]:
    """Maximal runs of consecutive pages with one set of occurrences; `rows` holds the active ones.

    Inactive rows are given as []. Groups are ordered by their first occurrence.
    """
    together: dict[tuple[int, int], frozenset[tuple[int, int]]] = {}
    for places in uses_of_pages(rows).values():
        counts = {rows[r][i][1] for r, i in places}
        for place in places:
            together[place] = frozenset(places) if len(counts) == 1 else frozenset([place])
    return runs(rows, page_tokens, together)


def uses_of_pages(rows: list[list[tuple[int, int]]]) -> dict[int, list[tuple[int, int]]]:
    """Places (row, index) of each page, in their order."""
    uses: dict[int, list[tuple[int, int]]] = {}
    for r, row in enumerate(rows):
        for i, (page, _) in enumerate(row):
            uses.setdefault(page, []).append((r, i))
    return uses


def runs(
    rows: list[list[tuple[int, int]]],
    page_tokens: int,
    together: dict[tuple[int, int], frozenset[tuple[int, int]]],
) -> list[Run]:
    """Maximal runs of places read together, ordered by their first one."""

    def joined(place: tuple[int, int]) -> bool:
        """The page at `place` and the one after it are in one group."""
        here = together[place]
        after = frozenset((r, i + 1) for r, i in here)
        return rows[place[0]][place[1]][1] == page_tokens and together.get(min(after)) == after

    found = []
    for r, row in enumerate(rows):
        i = 0
        while i < len(row):
            begin = i
            while joined((r, i)):
                i += 1
            i += 1
            members = sorted(together[r, begin])
            if members[0] == (r, begin):
                found.append(Run(tuple(row[begin:i]), tuple(members)))
    return found


def chunks(row: list[tuple[int, int]], pages: int, page_tokens: int) -> list[tuple[int, int]]:
    """(first, last + 1) of stretches of `pages` pages; a page that is not full ends one too."""
    found, begin = [], 0
    for i, (_, tokens) in enumerate(row):
        if i + 1 - begin == pages or tokens < page_tokens or i + 1 == len(row):
            found.append((begin, i + 1))
            begin = i + 1
    return found


def chunk_groups(
    rows: list[list[tuple[int, int]]], page_tokens: int, chunk_pages: list[int]
) -> list[Run]:
    """`groups` where only chunks that are the same as a whole are shared; of a row so many pages.

    A chunk is compared with the one that ends with the first use of its last page, and a row's
    only chunk with others' only chunks.
    """
    cut = [chunks(row, n, page_tokens) for row, n in zip(rows, chunk_pages, strict=True)]
    ends = {(r, end - 1): begin for r, found in enumerate(cut) for begin, end in found}
    uses = uses_of_pages(rows)
    same: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for r, found in enumerate(cut):
        for begin, end in found:
            places = uses[rows[r][end - 1][0]]
            first = places[0] if len({rows[a][b][1] for a, b in places}) == 1 else (r, end - 1)
            twin = (first[0], ends.get(first, 0))
            equal = first in ends and rows[first[0]][twin[1] : first[1] + 1] == rows[r][begin:end]
            equal = equal and (len(cut[first[0]]) == 1) == (len(found) == 1)
            same.setdefault(twin if equal else (r, begin), []).append((r, begin))
    together = {}
    for (r, begin), members in same.items():
        length = next(end - first for first, end in cut[r] if first == begin)
        for i in range(length):
            for a, b in members:
                together[a, b + i] = frozenset((c, d + i) for c, d in members)
    return runs(rows, page_tokens, together)


def attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    scale: float,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: np.ndarray | None = None,
    tree_mask: np.ndarray | None = None,
    tree_positions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence in float64: q [n, heads, d], keys [m, kv heads, d], values
    [m, kv heads, e].

    In a tree the new tokens stand at their depth below the first of them; what is right of a query
    is the mask's business.
    """
    n, heads, _ = q.shape
    m, kv_heads, _ = keys.shape
    out, lse = np.zeros((n, heads, values.shape[2])), np.full((n, heads), -math.inf)
    stands = {j: j for j in range(min(0, m - n), m)}
    if tree_mask is not None:
        window = window[0], -1
        if tree_positions is None:
            tree_positions = np.array([len([k for k in range(n) if row[k]]) for row in tree_mask])
        for i in range(n):
            stands[m - n + i] = m - n + int(tree_positions[i]) - int(tree_positions[0])
    for i in range(n):
        position = stands[i + m - n]
        for h in range(heads):
            terms, chosen = [], []
            for j in range(m):
                new = j - (m - n)
                if tree_mask is not None:
                    if new >= 0 and not tree_mask[i, new]:
                        continue
                elif causal and j > position:
                    continue
                if window[0] >= 0 and stands[j] < position - window[0]:
                    continue
                if window[1] >= 0 and stands[j] > position + window[1]:
                    continue
                s = scale * float(np.dot(q[i, h], keys[j, h * kv_heads // heads]))
                terms.append(softcap * math.tanh(s / softcap) if softcap else s)
                chosen.append(j)
            total = [*terms, float(sinks[h])] if sinks is not None else terms
            if not total:
                continue
            peak = max(total)
            lse[i, h] = peak + math.log(sum(math.exp(t - peak) for t in total))
            for t, j in zip(terms, chosen, strict=True):
                out[i, h] += math.exp(t - lse[i, h]) * values[j, h * kv_heads // heads]
    return out, lse
