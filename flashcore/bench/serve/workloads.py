"""Workloads of the serving benchmark: batches of prompts made of a shared and a unique part."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

RESERVED_IDS = 10  # the first token ids: begin, end and their like


@dataclass(frozen=True)
class Workload:
    """`groups` x `sequences` prompts of `prefix` + `unique` tokens; each answers `output` tokens.

    The prompts of a group have the prefix in common; with unique = 0 they are samples of one
    prompt. An output of one token measures the time to it, and nothing else.
    """

    name: str
    sequences: int  # of a group
    prefix: int
    unique: int
    output: int
    groups: int = 1
    model: str | None = None  # a shape of its own

    def __post_init__(self) -> None:
        for field in ("sequences", "output", "groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"workload {self.name}: {field} must be at least 1")
        if self.prefix + self.unique < 1:
            raise ValueError(f"workload {self.name}: its prompts have no token")

    @property
    def batch(self) -> int:
        return self.groups * self.sequences

    @property
    def prompt(self) -> int:
        return self.prefix + self.unique

    @property
    def prefill_only(self) -> bool:
        return self.output == 1

    @property
    def spec(self) -> str:
        """As it is written on the command line: [MODEL/][GROUPS*]SEQUENCESxPREFIX+UNIQUE:OUTPUT."""
        model = f"{self.model}/" if self.model else ""
        groups = f"{self.groups}*" if self.groups > 1 else ""
        return f"{model}{groups}{self.sequences}x{self.prefix}+{self.unique}:{self.output}"

    def shared_tokens(self, page: int) -> int:
        """Tokens of a prompt whose pages others hold too: whole pages, never the last token."""
        return min(self.prefix, self.prompt - 1) // page * page

    def tokens_per_sequence(self, output: float) -> float:
        """KV tokens of all sequences, each counted in full, once `output` tokens are out."""
        return self.batch * (self.prompt + output)

    def tokens_unique(self, output: float, page: int) -> float:
        """KV tokens of the batch, each page counted once, once `output` tokens are out."""
        repeats = self.groups * (self.sequences - 1) * self.shared_tokens(page)
        return self.tokens_per_sequence(output) - repeats

    def capacity(self, page: int) -> int:
        """KV tokens that a cache must hold to run it, in whole pages."""
        rounded = self.batch * -(-(self.prompt + self.output) // page) * page
        return rounded - self.groups * (self.sequences - 1) * self.shared_tokens(page)


PRESETS = {
    workload.name: workload
    for workload in (
        Workload("shared-16k", 64, 16384, 512, 128),
        Workload("shared-4k", 256, 4096, 512, 96),
        Workload("context-128k", 8, 104448, 26368, 96),
        Workload("rollout", 8, 2048, 0, 512, groups=64),
        Workload("nothing-shared", 32, 64, 8128, 96),
        Workload("ttft-32k", 16, 32768, 2048, 1),
        Workload("headline-1b", 512, 4096, 64, 256, model="llama-3.2-1b"),
        Workload("headline-3b", 768, 1024, 64, 128, model="llama-3.2-3b"),
    )
}
# What `bench serve --small` takes: small steps, and first tokens of every workload above and of
# batches of short prompts. The large ones run with few of their model's layers, whose kernels are
# the same, so that the engines of all backends lie in one GPU's memory side by side.
SMALL_STEPS = (
    "llama-3.2-1b/1x64+448:256",
    "llama-3.2-1b/8x64+960:256",
    "llama-3.2-1b/64x64+192:256",
    "llama-3.1-8b/1x64+448:128",
)
FIRST_TOKENS = (
    "llama-3.2-1b/512x4096+64:1",
    "llama-3.2-1b/128x256+64:1",
    "llama-3.2-1b/64x64+192:1",
    "llama-3.1-8b-8l/64x16384+512:1",
    "llama-3.1-8b-8l/256x4096+512:1",
    "llama-3.1-8b-8l/8x104448+26368:1",
    "llama-3.1-8b-8l/64*8x2048+0:1",
    "llama-3.1-8b-8l/32x64+8128:1",
    "llama-3.1-8b-8l/16x32768+2048:1",
    "llama-3.2-3b-8l/768x1024+64:1",
)
SMALL = (*SMALL_STEPS, *FIRST_TOKENS)
DETERMINISTIC = "shared-16k,rollout,4x64+32704:64,nothing-shared"
"""What `bench serve --deterministic` times; the third is where FlashAttention-3 misses its splits.
"""
_SPEC = re.compile(
    r"(?:(?P<model>[^/]+)/)?(?:(?P<groups>\d+)\*)?(?P<sequences>\d+)x(?P<prefix>\d+)"
    r"\+(?P<unique>\d+):(?P<output>\d+)"
)


def parse_workload(text: str) -> Workload:
    """A preset's name or a spec (`Workload.spec`); ValueError for anything else."""
    if text in PRESETS:
        return PRESETS[text]
    match = _SPEC.fullmatch(text)
    if match is None:
        raise ValueError(
            f"unknown workload {text!r}: one of {', '.join(PRESETS)}, or "
            "[MODEL/][GROUPS*]SEQUENCESxPREFIX+UNIQUE:OUTPUT such as 64x16384+512:128"
        )
    fields = ("sequences", "prefix", "unique", "output")
    numbers = {field: int(match[field]) for field in fields}
    return Workload(text, groups=int(match["groups"] or 1), model=match["model"], **numbers)


class Prompts:
    """Token ids of a workload's prompts. The prefixes stay; every call makes new unique parts.

    No two unique parts begin with the same token, so that a prefix cache finds the prefix and not a
    token more.
    """

    def __init__(self, workload: Workload, vocab: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._workload = workload
        self._ids = (RESERVED_IDS, vocab)
        self._first = self._rng.permutation(np.arange(RESERVED_IDS, vocab))
        self._drawn = 0
        firsts = self._take_first(workload.groups) if workload.prefix else []
        self.prefixes = [[first, *self._random(workload.prefix - 1)] for first in firsts]

    def batch(self) -> list[list[int]]:
        """One prompt a sequence: group after group."""
        w = self._workload
        prompts = []
        for group in range(w.groups):
            prefix = self.prefixes[group] if w.prefix else []
            for _ in range(w.sequences):
                prompts.append(prefix + self._unique())
        return prompts

    def _unique(self) -> list[int]:
        if not self._workload.unique:
            return []
        return [*self._take_first(1), *self._random(self._workload.unique - 1)]

    def _take_first(self, count: int) -> list[int]:
        if self._drawn + count > len(self._first):
            raise ValueError(
                f"workload {self._workload.name}: all {len(self._first)} distinct first tokens are "
                "used up; ask for fewer repeats"
            )
        taken = self._first[self._drawn : self._drawn + count]
        self._drawn += count
        return [int(token) for token in taken]

    def _random(self, count: int) -> list[int]:
        values: list[int] = self._rng.integers(*self._ids, count).tolist()
        return values
