"""What the plugin adds when SGLang resolves arguments: lists of names, defaults, early refusals."""

from __future__ import annotations

import argparse
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from flashcore.integrations.sglang import adjust, hooks, register
from flashcore.serving.shapes import NotServed
from tests.sglang import families
from tests.sglang.families import arguments, resolved

register()

NO_PAGES = {"lfm2"}  # its prefix cache holds a state for each token
NAMED = {"gpt-oss": "GptOssForCausalLM", "exaone4": "Exaone4ForCausalLM"}


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    families.without_a_gpu(monkeypatch)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("flashcore")]


@pytest.mark.parametrize("name", families.NAMES)
def test_families_resolve(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Past the lists of names, and with the page size that the model's cache can have."""
    with caplog.at_level(logging.INFO):
        args = arguments(name)
    assert resolved(args, "attention_backend") == "flashcore"
    assert resolved(args, "page_size") == (1 if name in NO_PAGES else 64)
    assert any("page size" in line or "page-size" in line for line in told(caplog))
    counts = [line for line in told(caplog) if "counts as fa3" in line]
    assert len(counts) == (name in NAMED)
    assert all(NAMED[name] in line for line in counts)


SPLIT = [
    {"attention_backend": "fa3", "decode_attention_backend": "flashcore"},
    {"attention_backend": "fa3", "prefill_attention_backend": "flashcore"},
]


@pytest.mark.parametrize("options", SPLIT)
@pytest.mark.parametrize("name", ["gpt-oss", "llama"])
def test_one_of_two_backends(name: str, options: dict[str, str]) -> None:
    args = arguments(name, **options)
    assert resolved(args, "attention_backend") == "fa3"
    assert resolved(args, "page_size") == 64


def test_other_backends_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        args = arguments("llama", attention_backend="fa3")
        with pytest.raises(AssertionError, match="GptOssForCausalLM requires"):
            arguments("gpt-oss", attention_backend="torch_native")
    assert resolved(args, "page_size") == 1
    assert not told(caplog)


PAGES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "explicit": ("llama", {"page_size": 16}, 16, ""),
    "explicit_one": ("llama", {"page_size": 1}, 1, ""),
    "chunks": ("llama", {"chunked_prefill_size": 1000}, 1, "--chunked-prefill-size 1000"),
    "no_chunks": ("llama", {"chunked_prefill_size": -1}, 64, ""),
    "ngram_tree": (
        "llama",
        {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 4},
        1,
        "n-gram trees",
    ),
    "ngram_chain": (
        "llama",
        {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1},
        64,
        "",
    ),
    "no_buffer": ("qwen3-next", {"mamba_radix_cache_strategy": "no_buffer"}, 1, "no_buffer"),
    "interval": ("qwen3-next", {"mamba_track_interval": 96}, 1, "--mamba-track-interval 96"),
    "no_prefix_cache": ("lfm2", {"disable_radix_cache": True}, 64, ""),
}


@pytest.mark.parametrize("case", PAGES)
def test_page_size(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """What the operator says, and 64 only where nothing in SGLang is against it."""
    name, options, tokens, reason = PAGES[case]
    if "mamba_radix_cache_strategy" in options:
        options = {**options, "disable_overlap_schedule": True}
    with caplog.at_level(logging.INFO):
        args = arguments(name, **options)
    assert resolved(args, "page_size") == tokens
    assert reason in " ".join(told(caplog))


DRAFTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "eagle": ({"speculative_algorithm": "EAGLE"}, "fa3"),
    "nextn": ({"speculative_algorithm": "NEXTN"}, "fa3"),
    "named": (
        {"speculative_algorithm": "EAGLE", "speculative_draft_attention_backend": "triton"},
        "triton",
    ),
    "ngram": (
        {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1},
        None,
    ),
    "other_target": ({"speculative_algorithm": "EAGLE", "attention_backend": "fa3"}, None),
}


@pytest.mark.parametrize("case", DRAFTS)
def test_draft_backend(case: str, caplog: pytest.LogCaptureFixture) -> None:
    options, backend = DRAFTS[case]
    if options["speculative_algorithm"] != "NGRAM":
        draft = str(families.MODELS / "llama")
        steps = {"speculative_num_steps": 3, "speculative_eagle_topk": 1}
        options = {"speculative_draft_model_path": draft, **steps, **options}
        options["speculative_num_draft_tokens"] = 4
    with caplog.at_level(logging.INFO):
        args = arguments("llama", **options)
    assert resolved(args, "speculative_draft_attention_backend") == backend
    defaulted = backend == "fa3"
    assert defaulted == any("--speculative-draft-attention-backend fa3" in x for x in told(caplog))


TREE = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 4,
    "speculative_num_draft_tokens": 8,
    "speculative_draft_model_path": str(families.MODELS / "llama"),
}


def test_draft_trees_over_pages(caplog: pytest.LogCaptureFixture) -> None:
    """Where SGLang lets fa3; other backends stay refused."""
    with caplog.at_level(logging.INFO):
        args = arguments("llama", **TREE)
    assert resolved(args, "page_size") == 64
    assert resolved(args, "attention_backend") == "flashcore"
    assert any("draft trees over pages" in line for line in told(caplog))
    with pytest.raises(ValueError, match="only supported on"):
        arguments("llama", attention_backend="torch_native", page_size=64, **TREE)


def test_draft_model_on_this_backend_is_refused() -> None:
    with pytest.raises(NotServed, match="--speculative-draft-attention-backend fa3"):
        arguments("llama", **TREE, speculative_draft_attention_backend="flashcore")


def config(folder: Path, like: str, **changes: Any) -> str:
    """A folder with a family's configuration, changed."""
    fields = json.loads((families.MODELS / like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    return str(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama4": ({"architectures": ["Llama4ForCausalLM"]}, "chunked local attention"),
    "gemma4": ({"architectures": ["Gemma4ForCausalLM"]}, "head_dim 512"),
    "mla": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 1,
        },
        "latent attention",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_weights_are_loaded(case: str, tmp_path: Path) -> None:
    changes, words = REFUSED[case]
    model = config(tmp_path, "llama", rope_scaling=None, **changes)
    with pytest.raises(NotServed, match=words) as raised:
        arguments(model)
    assert "\n" not in str(raised.value)
    assert "; use --attention-backend" in str(raised.value)


def test_a_quantised_cache_is_refused_before_the_weights_are_loaded() -> None:
    for dtype in ("mxfp8", "nvfp4", "fp4_mx_block16"):
        with pytest.raises(NotServed, match=f"--kv-cache-dtype {dtype}; use .* fp8_e4m3 or fp8_e5"):
            arguments("llama", kv_cache_dtype=dtype)


@pytest.mark.parametrize("architecture", sorted(adjust.NOT_SERVED))
def test_refused_by_name(architecture: str) -> None:
    what, instead = adjust.NOT_SERVED[architecture]
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    with pytest.raises(NotServed, match=re.escape(f"does not serve {what}; {instead}")):
        adjust.check_model(config)


def test_launchers_with_a_parser_of_their_own() -> None:
    """After the public call, which may be made again, SGLang's arguments take the name."""
    register()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    argv = ["--model-path", str(families.MODELS / "llama"), "--attention-backend", "flashcore"]
    assert parser.parse_args(argv).attention_backend == "flashcore"


def test_installed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is registered, a step runs its addition once."""
    calls = []
    monkeypatch.setattr(adjust, "default_page_size", lambda *_: calls.append(1) or {})
    register()
    hooks.install()
    arguments("llama")
    assert len(calls) == 1


def test_view_says_fa3_only_while_names_are_compared() -> None:
    args = arguments("llama")
    overrides = hooks._overrides()
    with hooks.counted_as_fa3():
        assert overrides.resolved_view(args).attention_backend == "fa3"
    assert overrides.resolved_view(args).attention_backend == "flashcore"
