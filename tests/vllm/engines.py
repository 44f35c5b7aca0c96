"""Whole engines, where vLLM has its compiled parts: `make test-vllm-engine` installs them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flashcore.bench.serve import weights
from flashcore.bench.serve.shapes import SHAPES
from flashcore.integrations.vllm import register
from flashcore.integrations.vllm.backend import FlashcoreBackend

HAS_ENGINE = any(
    importlib.util.find_spec(f"vllm.{name}") for name in ("_C", "_C_AVX512", "_C_AVX2")
)


class OnCpu(FlashcoreBackend):
    """In the place of vLLM's own backend, which its platform for CPUs takes whatever is said."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


def decode(ours: bool, folder: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Tokens of an engine with flashcore or with vLLM's own backend; the last of two runs, whose
    prompts lie in the prefix cache."""
    from vllm import LLM, SamplingParams

    if ours:
        register()
        register_backend(AttentionBackendEnum.CPU_ATTN, "tests.vllm.engines.OnCpu")
    weights.install_in_vllm(2.5)
    config = {**SHAPES["tiny"].config(), "torch_dtype": "float32", **options.pop("config", {})}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
        **options,
    }
    llm = LLM(**arguments)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    texts: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    for _ in range(2):
        answers = llm.generate(texts, params, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    Path(told["out"]).write_text(
        json.dumps(decode(told["ours"], Path(told["folder"]), told["prompts"], **told["options"]))
    )
