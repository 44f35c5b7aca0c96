"""`flashcore replay TRACE`: what a batch of real traffic shares."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore.cli import replay_fleet
from flashcore.cli.files import prepare_output, writing
from flashcore.cli.progress import ProgressBar
from flashcore.cli.results import head

if TYPE_CHECKING:
    from flashcore.replay.report import ModelShape, Report
    from flashcore.replay.sample import SampleSettings
    from flashcore.replay.simulate import Engine, EngineSettings
    from flashcore.replay.trace import Trace

_DEFAULT_CACHE_GIB = 64.0
# Not given and given are told apart: a fleet times nothing, so it refuses them.
_DEFAULT_SAMPLE_EVERY = 256
_DEFAULT_HEADS = (4, 1, 64)


class _UsageError(ValueError):
    """Options that cannot be carried out; the message says which and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore replay` to its parser."""
    parser.description = (
        "Replay a request trace through a simulated engine with continuous batching and a prefix "
        "cache, and report how many KV tokens each step reads per sequence and once per batch."
    )
    parser.add_argument(
        "trace",
        metavar="TRACE",
        help="Mooncake's format: one JSON object a line with timestamp, input_length, "
        "output_length (tokens), hash_ids (one for each block of input tokens), further keys "
        "ignored; - is standard input",
    )
    parser.add_argument(
        "--block-tokens",
        type=_count,
        default=512,
        metavar="N",
        help="input tokens of a hash id: 512 in Mooncake's traces (the default), 16 in "
        "Qwen-Bailian's",
    )
    parser.add_argument(
        "--time-unit",
        choices=("s", "ms"),
        default="ms",
        help="of timestamps: ms in Mooncake's traces (the default), s in Qwen-Bailian's",
    )
    parser.add_argument(
        "--requests", type=_count, metavar="N", help="only the first N requests (default: all)"
    )
    _add_engine_arguments(parser.add_argument_group("engine"))
    replay_fleet.add_arguments(parser)
    _add_sample_arguments(parser.add_argument_group("timing of layout, plan and attention"))
    _add_output_arguments(parser.add_argument_group("output"))


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--page-tokens",
        type=_count,
        default=128,
        metavar="P",
        help="tokens of a KV page; divides --block-tokens or is a multiple of it (default: 128)",
    )
    cache = group.add_mutually_exclusive_group()
    cache.add_argument("--cache-pages", type=_count, metavar="C", help="KV cache size in pages")
    cache.add_argument("--cache-tokens", type=_count, metavar="C", help="KV cache size in tokens")
    cache.add_argument(
        "--cache-gib",
        type=_positive,
        metavar="C",
        help="KV cache size in GiB at --model-shape (default: 64)",
    )
    group.add_argument(
        "--model-shape",
        type=_shape,
        default=(32, 8, 128),
        metavar="LxHxD",
        help="layers x KV heads x head dimension, for bytes (default: 32x8x128)",
    )
    group.add_argument(
        "--element-bytes",
        type=_count,
        default=2,
        metavar="E",
        help="bytes of one K or V element (default: 2)",
    )
    group.add_argument(
        "--max-batch",
        type=_count,
        default=256,
        metavar="B",
        help="sequences that may run at once (default: 256)",
    )
    group.add_argument(
        "--prefill-chunk",
        type=_count,
        default=2048,
        metavar="T",
        help="prompt tokens a step may compute (default: 2048)",
    )
    group.add_argument(
        "--step-ms",
        type=_positive,
        default=25.0,
        metavar="MS",
        help="time of a step without its prompt tokens (default: 25)",
    )
    group.add_argument(
        "--prefill-rate",
        type=_positive,
        default=20_000.0,
        metavar="R",
        help="prompt tokens computed in a second (default: 20000)",
    )
    group.add_argument(
        "--time-scale",
        type=_not_negative,
        default=1.0,
        metavar="X",
        help="multiply arrival times: 0.5 doubles the load, 0 lets all arrive at once (default: 1)",
    )


def _add_sample_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sample-every",
        type=_count_or_zero,
        metavar="K",
        help="time layout and plan of each K-th step, 0 for none (default: 256)",
    )
    group.add_argument(
        "--attention", action="store_true", help="also time attention, on random keys and values"
    )
    group.add_argument(
        "--heads",
        type=_shape,
        metavar="QxHxD",
        help="query heads x KV heads x head dimension of plan and attention (default: 4x1x64)",
    )
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    group.add_argument(
        "--seed",
        type=_count_or_zero,
        default=0,
        help="of the random tensors, and of what copies of a trace draw (default: 0)",
    )


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="print one JSON object, no table")
    group.add_argument("--commit", help="commit to record where the package is no git checkout")
    group.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw reuse and batch size over time, or of fleets over the number of engines",
    )
    group.add_argument(
        "--steps-csv", type=Path, metavar="FILE", help="write one line for each simulated step"
    )
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress bar on standard error (default: on a terminal)",
    )


def run(args: argparse.Namespace) -> int:
    """Replay; returns 0, or 2 after one line on standard error that says what is wrong."""
    from flashcore.replay.trace import TraceFormat, read_trace

    try:
        _check_outputs(args)
        shape, engine_settings, sample_settings = _settings(args)
        form = TraceFormat(args.block_tokens, args.time_unit)
        trace = read_trace(args.trace, args.requests, form)
        if args.engines is not None:
            fleets = replay_fleet.replay_fleets(args, trace, shape, engine_settings)
            replay_fleet.write_outputs(args, fleets)
            return 0
        report, engine = _replay(trace, shape, engine_settings, sample_settings, args.progress)
        if args.device == "cuda":
            report = {**head(args.commit), **report}
        _write_outputs(args, engine, report)
    except (ValueError, MemoryError) as error:
        print(f"flashcore replay: {error}", file=sys.stderr)
        return 2
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Find out before the long work what would fail after it."""
    if args.engines is None:
        replay_fleet.refuse_without_engines(args)
    else:
        replay_fleet.check_outputs(args)
    for option, path in (("--plot", args.plot), ("--steps-csv", args.steps_csv)):
        prepare_output(option, path, [args.trace])
    if args.plot is not None and args.plot == args.steps_csv:
        raise _UsageError(f"--plot and --steps-csv both name {args.plot}")
    if args.plot is not None:
        if args.plot.suffix not in (".png", ".pdf", ".svg"):
            raise _UsageError(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")
        if importlib.util.find_spec("matplotlib") is None:
            raise _UsageError("--plot needs matplotlib; install flashcore-attention[bench]")
    if args.device == "cuda":
        import torch

        from flashcore.dispatch import PROVIDERS, device_path

        if not torch.cuda.is_available():
            raise _UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if args.attention and (path := device_path(torch.device("cuda"))).name not in PROVIDERS:
            raise _UsageError(
                f"--device cuda --attention times kernels, which do not run here: {path.reason}"
            )


def _settings(args: argparse.Namespace) -> tuple[ModelShape, EngineSettings, SampleSettings]:
    from flashcore.replay.report import ModelShape
    from flashcore.replay.sample import SampleSettings
    from flashcore.replay.simulate import EngineSettings

    layers, kv_heads, head_dim = args.model_shape
    shape = ModelShape(layers, kv_heads, head_dim, args.element_bytes)
    num_q_heads, num_kv_heads, head_dim = args.heads or _DEFAULT_HEADS
    if num_q_heads % num_kv_heads:
        raise _UsageError(f"--heads: {num_q_heads} query heads, no multiple of {num_kv_heads}")
    try:
        engine = EngineSettings(
            page_tokens=args.page_tokens,
            block_tokens=args.block_tokens,
            cache_pages=_cache_pages(args, shape),
            max_batch=args.max_batch,
            prefill_chunk=args.prefill_chunk,
            step_ms=args.step_ms,
            prefill_tokens_per_s=args.prefill_rate,
            time_scale=args.time_scale,
        )
    except ValueError as error:
        raise _UsageError(str(error)) from error
    samples = SampleSettings(
        every=_DEFAULT_SAMPLE_EVERY if args.sample_every is None else args.sample_every,
        attention=args.attention,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        device=args.device,
        seed=args.seed,
    )
    return shape, engine, samples


def _cache_pages(args: argparse.Namespace, shape: ModelShape) -> int:
    if args.cache_pages is not None:
        return int(args.cache_pages)
    tokens = args.cache_tokens
    if tokens is None:
        gib = _DEFAULT_CACHE_GIB if args.cache_gib is None else args.cache_gib
        tokens = int(gib * 2**30) // shape.token_bytes
    if tokens < args.page_tokens:
        raise _UsageError(
            f"the cache holds {tokens} tokens; one page of {args.page_tokens} is the least"
        )
    return int(tokens // args.page_tokens)


def _replay(
    trace: Trace,
    shape: ModelShape,
    engine_settings: EngineSettings,
    sample_settings: SampleSettings,
    progress: bool | None,
) -> tuple[Report, Engine]:
    from flashcore.replay.report import build_report
    from flashcore.replay.sample import StepSampler
    from flashcore.replay.simulate import Engine

    started = time.perf_counter()
    engine = Engine(trace.requests, engine_settings)
    sampler = StepSampler(sample_settings)
    with ProgressBar("replay", len(trace.requests), shown=progress) as bar:
        engine.run(on_step=sampler, on_progress=bar.update)
    wall_s = time.perf_counter() - started
    return build_report(trace, engine, sampler, shape, wall_s), engine


def _write_outputs(args: argparse.Namespace, engine: Engine, report: Report) -> None:
    from flashcore.replay.plot import draw_plot
    from flashcore.replay.report import format_report

    if (args.plot or args.steps_csv) and not len(engine.log):
        raise _UsageError("every request was refused, nothing to draw; enlarge the cache")
    if args.steps_csv is not None:
        with writing(args.steps_csv):
            engine.log.write_csv(args.steps_csv)
    if args.plot is not None:
        with writing(args.plot):
            draw_plot(engine.log, report, args.plot)
    print(json.dumps(report) if args.json else format_report(report))


def _count(text: str) -> int:
    return _integer(text, least=1)


def _count_or_zero(text: str) -> int:
    return _integer(text, least=0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer from {least} to 2^31 - 1")
    return value


def _positive(text: str) -> float:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number of 0 or above")
    return value


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not three integers like 32x8x128")
    first, second, third = map(int, parts)
    return first, second, third
