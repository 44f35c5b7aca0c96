"""vLLM's GPU worker with what the benchmark adds to it: made-up weights, and no warm-up of kernels
of other models."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.warmup import kernel_warmup
from vllm.v1.worker.gpu_worker import Worker

from flashcore.bench.serve import weights
from flashcore.bench.serve.scheduler import announced


class MadeUpWeights:
    """Of a worker, started by vLLM in a process of its own; `announced` says what is asked for."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        deviation = announced().score_deviation
        if deviation is not None:
            weights.install_in_vllm(deviation)
        return super().load_model(*args, **kwargs)  # type: ignore[misc]


class BenchWorker(MadeUpWeights, Worker):
    """On a GPU."""

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Where the CuTe DSL can be imported vLLM compiles routers of mixtures for minutes."""
        kernel_warmup._warmup_ll_bf16_router_gemm = lambda *_: None
        return super().compile_or_warm_up_model(*args, **kwargs)
