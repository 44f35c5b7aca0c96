"""Evictions and loads of SGLang's hierarchical cache, counted in its scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Nodes of the prefix tree whose device pages were given up while the host kept a copy; nodes
# dropped for good; times that pages came back from the host; and tokens of each.
COUNTS = ("evictions", "evicted_tokens", "dropped", "dropped_tokens", "loads", "loaded_tokens")


def read_counts(path: Path) -> dict[str, int] | None:
    """The counts so far; None where no scheduler has written any."""
    if not path.exists() or path.stat().st_size < 8 * len(COUNTS):
        return None
    values = np.memmap(path, np.int64, "r", shape=(len(COUNTS),))
    return {name: int(value) for name, value in zip(COUNTS, values, strict=True)}


def install(file: str) -> None:
    """Have this process's prefix cache count into `file`; the first process that asks."""
    try:
        Path(file).open("xb").close()
    except FileExistsError:
        return
    values = np.memmap(file, np.int64, "w+", shape=(len(COUNTS),))

    def count(name: str, tokens: int) -> None:
        place = COUNTS.index(name)
        values[place] += 1
        values[place + 1] += tokens

    watch(count)


def watch(count: Callable[[str, int], None]) -> None:
    """Call `count(name, tokens)` at every eviction and load of this process's caches."""
    from sglang.srt.mem_cache import unified_radix_cache as unified

    try:
        from sglang.srt.mem_cache.hiradix_cache import HiRadixCache
    except ImportError:  # later versions have the other one only
        pass
    else:
        _after(HiRadixCache, "_detach_backuped", lambda n: count("evictions", n))
        _after(HiRadixCache, "_evict_regular", lambda n: count("dropped", n))
        _after(
            HiRadixCache,
            "load_back",
            lambda slots: None if slots is None else count("loads", len(slots)),
        )
    # Here a load says only whether it was made.
    cache = unified.UnifiedRadixCache
    _after(cache, "load_back", lambda done: count("loads", _tokens(done)) if _made(done) else None)
    for name in ("_demote", "_evict_to_host"):
        if hasattr(cache, name):
            _after(cache, name, lambda _: count("evictions", 0))


def _made(answer: Any) -> bool:
    return answer is not None and answer is not False


def _tokens(answer: Any) -> int:
    return len(answer) if hasattr(answer, "__len__") else 0


def _after(owner: type, name: str, told: Callable[[Any], None]) -> None:
    """Tell `told` what `owner.name` returns."""
    method = getattr(owner, name)

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = method(self, *args, **kwargs)
        told(answer)
        return answer

    setattr(owner, name, watched)
