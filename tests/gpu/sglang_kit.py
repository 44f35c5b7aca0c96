"""SGLang's own attention test kit, which is in its wheel, on the backend `flashcore`.

    python tests/gpu/sglang_kit.py --jobs 6 --log kit.log

Every case the kit has for a backend of its kind: eager, sliding windows, decode in CUDA graphs,
prefill graphs, target verify as a chain and as a tree; the same for gated delta networks, whose
layers are SGLang's own beside this backend; and longer contexts with 32/8 heads. Its K and V have
one head_dim; narrower V is tested in tests/sglang and tests/gpu. On the CPU only what is eager
runs, and no gated delta network, which has Triton kernels alone. To import SGLang takes a process
half a minute, which --jobs spends side by side. It exits with 1 if a case fails; a case that is
skipped fails.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

LAYOUTS = ("shuffled_pages", "interleaved_pages", "non_monotonic_extend", "contiguous")
EXTEND_ONLY = "non_monotonic_extend"  # scatters new tokens one by one
PAGES = (1, 16, 64, 128)
GDN_HEAD_DIMS = (64, 128)  # of the linear layers' keys in real models
CONTEXT = {"max_context_len": 256}  # whole pages of every size


class Case(NamedTuple):
    """run(testcase, case, **options) of the kit."""

    name: str
    run: Any
    case: Any
    options: dict[str, Any]


def main() -> int:
    """Run all cases for each dtype and head_dim; 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="flashcore")
    parser.add_argument("--head-dims", default="64,80,96,112,128,256")
    parser.add_argument("--dtypes", default="bfloat16,float16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="dtypes and head_dims at a time")
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    pairs = [
        (args.backend, args.device, dtype, int(dim))
        for dtype, dim in itertools.product(args.dtypes.split(","), args.head_dims.split(","))
    ]
    if args.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            results = pool.starmap(run_cases, pairs, chunksize=1)
    else:
        results = [run_cases(*pair) for pair in pairs]
    lines = [line for result in results for line in result.lines]
    passed, failed = sum(r.passed for r in results), sum(r.failed for r in results)
    head = f"SGLang {version()}, torch {torch.__version__}, {device_name(args.device)}"
    last = f"{passed} passed, {failed} failed"
    print(f"{head}: {last}")
    if args.log:
        args.log.write_text("\n".join([head, *lines, last]) + "\n")
    return 1 if failed else 0


class Result(NamedTuple):
    """Of one dtype and head_dim: a line for each case."""

    lines: list[str]
    passed: int
    failed: int


def run_cases(backend: str, device: str, dtype: str, head_dim: int) -> Result:
    """Every case of the kit for one dtype and head_dim, one after the other."""
    from flashcore.integrations.sglang.register import register

    register()
    on_gpu = device == "cuda"
    cases = [*eager_cases(backend), *verify_cases(backend, graphs=on_gpu)]
    if on_gpu:
        cases += graph_cases(backend)
        if head_dim in GDN_HEAD_DIMS:
            cases += gdn_cases(backend)
    base = {"head_dim": head_dim, "hidden_size": 256, "dtype": getattr(torch, dtype)}
    lines, passed = [], 0
    for case in cases:
        outcome, seconds = outcome_of(case, {**base, "device": device})
        passed += outcome == "pass"
        lines.append(f"{dtype} {head_dim} {case.name:70} {outcome} ({seconds:.1f}s)")
        print(lines[-1], flush=True)
    return Result(lines, passed, len(lines) - passed)


def outcome_of(case: Case, base: dict[str, Any]) -> tuple[str, float]:
    """What became of it, on one line: pass, or FAIL and why; and seconds."""
    started = time.monotonic()
    try:
        with torch.no_grad():
            case.run(unittest.TestCase(), case.case, **base, **case.options)
        outcome = "pass"
    except (Exception, unittest.SkipTest) as error:  # of whatever kind: the next case runs
        outcome = f"FAIL {type(error).__name__}: " + " ".join(str(error).split())[:300]
    return outcome, time.monotonic() - started


def eager_cases(backend: str) -> Iterator[Case]:
    """Without graphs: layouts of pages and heads, windows, and contexts of hundreds of tokens."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention as kit

    kit._SWA_DECODE_EXTEND_WINDOW |= {backend}  # the kit wants to know how a window counts
    run = kit.run_dense_attention_case
    for case, layout in itertools.product(kit.make_dense_cases(backend), LAYOUTS):
        if layout != EXTEND_ONLY or not (case.forward_mode.is_decode() or case.page_size > 1):
            yield Case(f"eager {case.name} {layout}", run, case, {"loc_layout": layout})
    windows = kit.make_swa_no_prefix_input_config_cases, kit.make_swa_prefix_input_config_cases
    for case in (case for make in windows for case in make(backend)):
        yield Case(f"window {case.name}", run, case, {})
    for page in PAGES:
        for mode, prefixes, new in (
            (ForwardMode.DECODE, (700, 1, 511, 512, 513, 1000), ()),
            (ForwardMode.EXTEND, (512, 0, 100), (130, 65, 1)),
        ):
            name = f"gqa_32_8_{mode.name.lower()}_page_{page}"
            lens = {"prefix_lens": prefixes, "extend_lens": new}
            case = case_of(backend, name, mode, (32, 8), page, **lens)
            yield Case(f"eager {name}", run, case, {"max_context_len": 1024})


def verify_cases(backend: str, graphs: bool) -> Iterator[Case]:
    """Three draft tokens for each of two requests, as a chain and as a tree."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.test.kits.attention_unittest.runner_modes import (
        speculative_target_verify_runner as verify,
    )

    for topk, page in itertools.product((1, 2), PAGES):
        name = f"verify {'chain' if topk == 1 else 'tree'} page {page}"
        lens = {"prefix_lens": (4, 7), "extend_lens": (3, 3)}
        case = case_of(backend, name, ForwardMode.TARGET_VERIFY, (4, 4), page, **lens)
        options = {"topk": topk, **CONTEXT}
        yield Case(f"eager {name}", verify.run_dense_spec_verify_case, case, options)
        if graphs:
            run = verify.run_dense_spec_verify_cuda_graph_case
            yield Case(f"graph {name}", run, case, options)


def graph_cases(backend: str) -> Iterator[Case]:
    """Decode captured and replayed with padding; prefill at the breaks of graphs."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.test.kits.attention_unittest.runner_modes import (
        cuda_graph_decode_runner,
        split_op_runner,
    )

    run = cuda_graph_decode_runner.run_dense_cuda_graph_decode_case
    for heads, page in itertools.product(((4, 4), (4, 2), (4, 1), (32, 8)), PAGES):
        name = f"graph decode {heads[0]}/{heads[1]} page {page}"
        lens = {"prefix_lens": (14, 15, 16)}
        case = case_of(backend, name, ForwardMode.DECODE, heads, page, **lens)
        yield Case(name, run, case, CONTEXT)
    run = split_op_runner.run_dense_split_op_extend_case
    for breakable, page in itertools.product((False, True), PAGES):
        name = f"graph prefill {'breakable' if breakable else 'piecewise'} page {page}"
        lens = {"prefix_lens": (0, 8, 16), "extend_lens": (15, 8, 1)}
        case = case_of(backend, name, ForwardMode.EXTEND, (4, 2), page, **lens)
        options = {"breakable": breakable, "static_num_tokens": 32, **CONTEXT}
        yield Case(name, run, case, options)


def gdn_cases(backend: str) -> Iterator[Case]:
    """Hybrid models: linear layers of SGLang behind its wrapper, metadata of both sides."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.test.kits.attention_unittest.attention_methods import gdn_attention as kit
    from sglang.test.kits.attention_unittest.runner_modes import (
        cuda_graph_decode_runner,
        split_op_runner,
    )
    from sglang.test.kits.attention_unittest.runner_modes import (
        speculative_target_verify_runner as verify,
    )

    def case_of_gdn(name: str, mode: Any, page: int, **lens: Any) -> Any:
        heads = {"num_k_heads": 2, "num_v_heads": 2}
        return kit.GDNAttentionCase(
            name=name, backend=backend, forward_mode=mode, page_size=page, **heads, **lens
        )

    run = gdn(kit.run_gdn_attention_case)
    for case in kit.make_gdn_cases(backend):
        yield Case(f"eager {case.name}", run, case, {})
    for page in PAGES:
        case = case_of_gdn("gdn", ForwardMode.DECODE, page, prefix_lens=(14, 15, 16))
        run = gdn(cuda_graph_decode_runner.run_gdn_cuda_graph_decode_case)
        yield Case(f"graph gdn decode page {page}", run, case, CONTEXT)
        lens = {"prefix_lens": (0, 8, 16), "extend_lens": (15, 8, 1)}
        case = case_of_gdn("gdn", ForwardMode.EXTEND, page, **lens)
        run = gdn(split_op_runner.run_gdn_split_op_extend_case)
        for breakable in (False, True):
            options = {"breakable": breakable, "static_num_tokens": 32, **CONTEXT}
            name = f"graph gdn prefill {'breakable' if breakable else 'piecewise'} page {page}"
            yield Case(name, run, case, options)
        lens = {"prefix_lens": (4, 7), "extend_lens": (3, 3)}
        case = case_of_gdn("gdn", ForwardMode.TARGET_VERIFY, page, **lens)
        for topk, kind in ((1, "chain"), (2, "tree")):
            options = {"topk": topk, **CONTEXT}
            run = gdn(verify.run_gdn_eagle_verify_case)
            yield Case(f"eager gdn verify {kind} page {page}", run, case, options)
            run = gdn(verify.run_gdn_eagle_verify_cuda_graph_case)
            yield Case(f"graph gdn verify {kind} page {page}", run, case, options)


def gdn(run: Any) -> Any:
    """A run of the kit that wants the heads of linear layers: as large as those of attention."""

    def run_case(
        testcase: Any, case: Any, *, head_dim: int, hidden_size: int, **options: Any
    ) -> None:
        run(testcase, case, head_k_dim=head_dim, head_v_dim=head_dim, **options)

    return run_case


def case_of(
    backend: str, name: str, mode: Any, heads: tuple[int, int], page: int, **lens: Any
) -> Any:
    """The kit's description of a case."""
    from sglang.test.kits.attention_unittest.attention_methods.dense_attention import (
        DenseAttentionCase,
    )

    return DenseAttentionCase(
        name=name,
        backend=backend,
        forward_mode=mode,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        page_size=page,
        **lens,
    )


def version() -> str:
    """SGLang's."""
    import sglang

    return str(sglang.__version__)


def device_name(device: str) -> str:
    """For the head of the log."""
    return torch.cuda.get_device_name(0) if device == "cuda" else device


if __name__ == "__main__":
    sys.exit(main())
