"""Prefill of a transformers model: python benchmarks/transformers_prefill.py [--json FILE]

Decoder layers of Llama-3.1-8B with random weights in bf16, without a head and without a cache:
attn_implementation="flashcore" beside sdpa, transformers' flash attention where it is installed,
and FlashAttention-3's forward where only that is. All take turns in one run. `forward_ms` is all
layers, `attention_ms` one layer's attention with what transformers gave it, `error` the relative
error of the hidden states against sdpa in fp32, over the tokens that are no padding.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flashcore.integrations.transformers  # registers "flashcore"
from flashcore.bench.problems import DenseProblem
from flashcore.bench.providers import Provider, dense_providers, version_of
from flashcore.bench.timing import Contestant, Timing, cuda_elapsed_ms, time_interleaved
from flashcore.cli.results import head

BATCH, LONGEST = 8, 4096
NOTHING = "no attention"  # the layers' other work

Elapsed = Callable[[Contestant, int], float]


@dataclass(frozen=True)
class Workload:
    """What a forward is given."""

    name: str
    inputs: dict[str, torch.Tensor]
    real: torch.Tensor  # bool [batch, positions]: tokens that are no padding
    lengths: list[int]


def llama_8b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
    )


def workloads(batch: int, longest: int, vocabulary: int, device: str) -> list[Workload]:
    """All of one length; lengths from 1/batch to all of it, padded on the left; those packed."""
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(vocabulary, (batch, longest), generator=generator, device=device)
    lengths = [longest * (row + 1) // batch for row in range(batch)]
    starts = longest - torch.tensor(lengths, device=device)[:, None]
    mask = torch.arange(longest, device=device)[None] >= starts
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    packed = ids[mask][None]
    return [
        Workload("full", {"input_ids": ids}, torch.ones_like(mask), [longest] * batch),
        Workload("padded", {"input_ids": ids, "attention_mask": mask.long()}, mask, lengths),
        Workload(
            "packed",
            {"input_ids": packed, "position_ids": positions},
            torch.ones_like(packed, dtype=torch.bool),
            lengths,
        ),
    ]


# Implementations


def register_peers() -> dict[str, str]:
    """Version of each implementation that a model can be set to here, by its name."""
    from transformers import utils

    found = {"flashcore": flashcore.__version__, "sdpa": f"torch {torch.__version__}"}
    for number in (2, 3):
        installed = getattr(utils, f"is_flash_attn_{number}_available", None)
        if installed is not None and installed():
            package = "flash-attn" if number == 2 else "flash-attn-3"
            found[f"flash_attention_{number}"] = version_of(package)
    if torch.cuda.is_available():
        for provider in dense_providers()[0]:
            if provider.kernel == "fa3":
                _register(provider.name, _dense_attention(provider))
                found[provider.name] = provider.version
    _register(NOTHING, lambda module, query, *_, **__: (query.transpose(1, 2).contiguous(), None))
    found[NOTHING] = ""
    return found


def _register(name: str, attention: Callable[..., Any]) -> None:
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    # Its mask is the padding mask as it came, or None where there is no padding.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


def _dense_attention(provider: Provider) -> Callable[..., tuple[torch.Tensor, None]]:
    """A dense provider as a layer's attention, for batches without padding and packing."""

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        batch, seqlen, heads, head_dim = q.shape
        problem = DenseProblem(batch, heads, k.shape[2], seqlen, head_dim, True, "bf16")
        return provider.prepare(problem, q, k, v)(), None

    return attend


def serves(implementation: str, workload: Workload) -> bool:
    """Those that are not transformers' own know neither padding nor packing."""
    own = implementation in ("flashcore", "sdpa") or implementation.startswith("flash_attention")
    return own or workload.name == "full" or implementation == NOTHING


@contextmanager
def using(model: LlamaModel, implementation: str) -> Iterator[None]:
    """The name alone: it was accepted when the error was measured."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    yield
    model.config._attn_implementation = before


def layer_call(model: LlamaModel, name: str, workload: Workload) -> Callable[[], Any]:
    """The attention of the first layer, with the arguments that transformers gives it."""
    attention = ALL_ATTENTION_FUNCTIONS[name]
    recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        recorded.append((args, kwargs))
        return attention(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = record
    try:
        with using(model, name):
            model(**workload.inputs, use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = attention
    args, kwargs = recorded[0]
    return lambda: attention(*args, **kwargs)


# Measurement


def hidden_states(model: LlamaModel, workload: Workload) -> torch.Tensor:
    out: torch.Tensor = model(**workload.inputs, use_cache=False).last_hidden_state[workload.real]
    return out.float()


def measure(
    model: LlamaModel, workload: Workload, versions: dict[str, str], rounds: int, elapsed: Elapsed
) -> list[dict[str, Any]]:
    """A row for each implementation; `model` is in fp32 and its weights are bf16's."""
    model.set_attn_implementation("sdpa")
    truth = hidden_states(model.float(), workload)
    model.bfloat16()
    rows: dict[str, dict[str, Any]] = {}
    for name, version in versions.items():
        if not serves(name, workload):
            continue
        try:
            model.set_attn_implementation(name)
            error = (hidden_states(model, workload) - truth).norm() / truth.norm()
        except Exception as problem:  # a peer that cannot run it leaves a note, not a gap
            if name == "flashcore":
                raise
            print(f"{name}, {workload.name}: {type(problem).__name__}: {problem}")
            continue
        rows[name] = {"implementation": name, "version": version, "error": round(float(error), 6)}
    del truth
    forwards = _time(
        {name: lambda: model(**workload.inputs, use_cache=False) for name in rows},
        lambda name: using(model, name),
        rounds,
        elapsed,
    )
    layers = _time(
        {name: layer_call(model, name, workload) for name in rows if name != NOTHING},
        lambda name: nullcontext(),
        rounds,
        elapsed,
    )
    rows[NOTHING].pop("error")
    for name, row in rows.items():
        row["forward_ms"] = _rounded(forwards[name])
        if name in layers:
            row["attention_ms"] = _rounded(layers[name])
            row["tflops"] = round(_flops(model.config, workload) / layers[name].median_ms / 1e9, 1)
            for peer in sorted(rows.keys() & layers.keys() - {name}):
                row[f"of_{peer}"] = {
                    "forward": round(forwards[name].median_ms / forwards[peer].median_ms, 4),
                    "attention": round(layers[name].median_ms / layers[peer].median_ms, 4),
                }
    about = {"workload": workload.name, "lengths": workload.lengths}
    return [{**about, **row} for row in rows.values()]


def _time(
    calls: dict[str, Callable[[], Any]],
    context: Callable[[str], Any],
    rounds: int,
    elapsed: Elapsed,
) -> dict[str, Timing]:
    contestants = [
        Contestant(name, call, lambda name=name: context(name))  # type: ignore[misc]
        for name, call in calls.items()
    ]
    return time_interleaved(contestants, rounds=rounds, sample_ms=100, elapsed_ms=elapsed)


def _flops(config: LlamaConfig, workload: Workload) -> float:
    """Of one layer's attention; a causal mask counts as half."""
    heads = config.num_attention_heads
    return sum(
        DenseProblem(1, heads, heads, length, config.head_dim, True, "bf16").flops
        for length in workload.lengths
    )


def _rounded(timing: Timing) -> dict[str, float]:
    values = {"median": timing.median_ms, "p10": timing.p10_ms, "p90": timing.p90_ms}
    return {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--layers", type=int, default=4, help="of the model's 32 (default: 4)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--commit", help="to record where the package is no git checkout")
    options = parser.parse_args()
    config = llama_8b(options.layers)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaModel(config).eval().bfloat16()
    versions, result = register_peers(), []
    for workload in workloads(BATCH, LONGEST, config.vocab_size, "cuda"):
        for row in measure(model, workload, versions, options.rounds, cuda_elapsed_ms):
            print(row, flush=True)
            result.append(row)
    if options.json:
        words = (Path(word).name for word in sys.argv[1:])
        about = {
            **head(options.commit),
            "command": shlex.join(["python", "benchmarks/transformers_prefill.py", *words]),
            "model": f"Llama-3.1-8B's shape, {options.layers} of 32 layers, random weights",
        }
        options.json.write_text(json.dumps({**about, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
