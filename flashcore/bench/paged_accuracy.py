"""Errors of paged attention against float64, on a sample of its rows."""

from __future__ import annotations

import torch

from flashcore.bench.paged_problems import PagedInputs, PagedProblem

_SEQUENCES = 8
_QUERIES = 4  # of each of them


class Sample:
    """Some query tokens of a problem with the float64 output of all heads of two KV heads."""

    def __init__(self, problem: PagedProblem, inputs: PagedInputs):
        p = problem
        kv_heads, group = _spread(p.kv_heads, 2), p.q_heads // p.kv_heads
        self._heads = [head * group + place for head in kv_heads for place in range(group)]
        tokens, expected = [], []
        for row in _spread(p.sequences, _SEQUENCES):
            places = _spread(p.q_len, _QUERIES)
            tokens += [row * p.q_len + place for place in places]
            expected.append(_exact(p, inputs, row, places, kv_heads))
        self._tokens = torch.tensor(tokens, device=inputs.device)
        self._expected = torch.cat(expected)

    def errors(self, out: torch.Tensor) -> tuple[float, float]:
        """(root mean square, largest) over the sampled tokens of |out - exact| / |exact|."""
        got = out[self._tokens][:, self._heads].double()
        each = relative_distance(got, self._expected)
        return float(each.square().mean().sqrt()), float(each.max())


def relative_distance(out: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|out - expected| / |expected| of each query token, [tokens], norms over heads and dims."""
    difference = (out.double() - expected.double()).flatten(1).norm(dim=1)
    ratio: torch.Tensor = difference / expected.double().flatten(1).norm(dim=1)
    return ratio


def _exact(
    problem: PagedProblem, inputs: PagedInputs, row: int, places: list[int], kv_heads: list[int]
) -> torch.Tensor:
    """float64 output [places, q heads of kv_heads, head_dim] of one sequence's queries."""
    p = problem
    length = int(inputs.batch.seq_lens[row])
    pages = inputs.page_table[row, : -(-length // p.page_tokens)].long()
    tokens = torch.tensor(places, device=inputs.device)
    last = length - p.q_len + tokens  # the last key each query sees
    group = p.q_heads // p.kv_heads
    out = []
    for head in kv_heads:
        k, v = (
            _of_head(pool, pages, head)[:length].double()
            for pool in (inputs.k_pages, inputs.v_pages)
        )
        q = inputs.q[row * p.q_len + tokens, head * group : (head + 1) * group].double()
        scores = torch.einsum("qhd,kd->qhk", q, k) * p.head_dim**-0.5
        hidden = torch.arange(length, device=inputs.device) > last[:, None]
        scores.masked_fill_(hidden[:, None], float("-inf"))
        out.append(torch.einsum("qhk,kd->qhd", scores.softmax(-1), v))
    return torch.cat(out, 1)


def _of_head(pool: torch.Tensor, pages: torch.Tensor, head: int) -> torch.Tensor:
    """[tokens, head_dim] of these pages; torch takes bytes where it may not take fp8."""
    of_bytes = pool.view(torch.uint8)[:, :, head] if pool.itemsize == 1 else pool[:, :, head]
    return of_bytes[pages].view(pool.dtype).flatten(0, 1).float()


def _spread(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1, evenly, both ends among them."""
    if count <= most:
        return list(range(count))
    return [number * (count - 1) // (most - 1) for number in range(most)]
