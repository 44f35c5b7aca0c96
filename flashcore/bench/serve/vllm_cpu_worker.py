"""vLLM's CPU worker with made-up weights."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from flashcore.bench.serve.vllm_worker import MadeUpWeights


class BenchCpuWorker(MadeUpWeights, CPUWorker):
    """On a CPU."""
