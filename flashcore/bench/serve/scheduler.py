"""SGLang's scheduler process with what the benchmark adds to it: weights, clock, counts.

An engine starts its schedulers as processes of their own. `run` stands in for SGLang's function
that is their first: it does what `Additions` ask for, and goes on with SGLang's.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "FLASHCORE_BENCH_SCHEDULER"


@dataclass(frozen=True)
class Additions:
    """What the schedulers of an engine do besides. All None: nothing."""

    score_deviation: float | None = None  # weights of unit gain instead of the dummy ones
    clock: str | None = None  # file for the steps' times
    counts: str | None = None  # file for evictions and loads of the hierarchical cache

    def announce(self) -> None:
        """Tell the processes that this one starts from now on."""
        os.environ[VARIABLE] = json.dumps(asdict(self))


def announced() -> Additions:
    """What the process that started this one asks for."""
    return Additions(**json.loads(os.environ.get(VARIABLE, "{}")))


def run(*args: Any, **kwargs: Any) -> Any:
    """`run_scheduler_process` of SGLang, after the additions."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()  # theirs first: they may replace what is wrapped here
    wanted = announced()
    if wanted.score_deviation is not None:
        from flashcore.bench.serve import weights

        weights.install(wanted.score_deviation)
    if wanted.clock is not None:
        from flashcore.bench.serve import clock

        clock.install(wanted.clock)
    if wanted.counts is not None:
        from flashcore.bench.serve import hicache

        hicache.install(wanted.counts)
    return run_scheduler_process(*args, **kwargs)
