"""The time that a step would take by what it reads and computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashcore.replay.fleet.tally import Tally


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of a step: (weights + keys and values) / bandwidth + prompt tokens / prefill rate.

    A ValueError names what is out of range.

    The weights are read once a step, whatever the batch. Keys and values are either read once per
    batch, each distinct page, or per sequence, each page as often as sequences use it. The defaults
    are Llama-3.1-8B in bf16 (8.03 billion parameters; 32 layers, 8 KV heads of 128) on an H100 that
    streams 3.05 TB/s. Left out: activations, kernel launches, the host, what engines tell each
    other. The simulated clock runs by its own fixed times, so batches are the same for both.
    """

    weight_gb: float = 16.06  # 10^9 bytes
    bandwidth_tb_s: float = 3.05  # 10^12 bytes
    token_bytes: int = 131_072  # keys and values of a token, all layers
    prefill_tokens_per_s: float = 20_000.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight_gb < math.inf:
            raise ValueError(f"weight_gb is {self.weight_gb}; it must be 0 or above")
        for name in ("bandwidth_tb_s", "token_bytes", "prefill_tokens_per_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    def busy_s(self, tally: Tally, kv_tokens: int) -> float:
        """Of all steps of a tally, in which so many tokens' keys and values are read."""
        bytes_read = tally.steps * self.weight_gb * 1e9 + kv_tokens * self.token_bytes
        prefill_s = tally.sums["prefill_tokens"] / self.prefill_tokens_per_s
        return bytes_read / (self.bandwidth_tb_s * 1e12) + prefill_s
