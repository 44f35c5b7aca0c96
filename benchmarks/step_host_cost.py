"""What the host does for a forward outside its graph: python benchmarks/step_host_cost.py

Microseconds of SGLang's calls into an attention backend, by SGLang's own batches: the metadata of a
replayed decode graph, of an eager prefill, and one layer's call. With a Hopper GPU the backend runs
as it serves, beside fa3; without one, and with --stub, our compiled functions and the fill of the
page tables do nothing. Run it from the repository's root, with it and SGLang on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.bench.machine import describe_device, package_versions, source_commit
from flashcore.sm90.available import available

REPEATS = 15
WINDOWS: dict[str, dict[str, Any]] = {
    "full attention": {},
    "with windows": {"window": 1023},
    "with windows, two pools": {"window": 1023, "two_pools": True},
}


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Host time of one call: the least of several loops, each begun with an idle GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    best = float("inf")
    for _ in range(REPEATS):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - started)
    wait()
    return round(best / calls * 1e6, 2)


def costs(name: str, device: str, options: dict[str, Any], batch: int) -> dict[str, float]:
    """Of one backend, by name, with one kind of model."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from tests.sglang.batches import (
        Request,
        Setup,
        graph_buffers,
        graph_view,
        make_engine,
        make_forward,
    )

    setup = Setup(
        64,
        heads=(32, 8),
        head_dim=64,
        dtype=torch.bfloat16,
        device=device,
        max_context=4096,
        **options,
    )
    engine = make_engine(setup, max_batch=batch, name=name)
    backend = engine.backend
    backend.init_cuda_graph_state(batch, batch)
    requests = [Request(200 + i % 50, 1, shared=128) for i in range(batch - 3)]
    decode = make_forward(engine, ForwardMode.DECODE, requests)
    view = graph_view(engine, decode, batch, graph_buffers(engine, batch))
    view.positions = decode.batch.positions
    capture = graph_view(engine, decode, batch, graph_buffers(engine, batch))
    capture.positions = torch.zeros(batch, dtype=torch.int64, device=device)
    capture.spec_info = view.spec_info = None
    capture.seq_lens_sum = view.seq_lens_sum = None  # as SGLang's scheduler has it with overlap
    backend.init_forward_metadata_out_graph(capture, in_capture=True)
    found = {
        "decode graph: metadata": microseconds(
            lambda: backend.init_forward_metadata_out_graph(view), 200
        )
    }
    fb = make_forward(engine, ForwardMode.EXTEND, [Request(128, 64, shared=128)] * 8)
    fb.batch.extend_prefix_lens = fb.batch.seq_lens - fb.batch.extend_seq_lens
    found["prefill: metadata"] = microseconds(lambda: backend.init_forward_metadata(fb.batch), 100)
    q, layer = fb.q[0].flatten(1), engine.layers[0]
    found["prefill: one layer"] = microseconds(
        lambda: backend.forward(q, fb.k[0], fb.v[0], layer, fb.batch, save_kv_cache=False), 100
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--stub", action="store_true", help="time the host code alone, on the CPU")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--commit", help="to record where the package is no git checkout")
    options = parser.parse_args()
    stub = options.stub or not available("cuda")[0]
    if stub:
        from tests.sglang import standins

        standins.install()
    from sglang.srt.runtime_context import get_parallel

    from flashcore.integrations.sglang.register import NAME, register
    from flashcore.serving import page_tables
    from tests.sglang import fake_kernels

    register()
    result: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, get_parallel().override(attn_tp_rank=0):
        if stub:
            fake_kernels.install(patch)
            patch.setattr(page_tables, "fill", lambda *arguments: None)
        for kind, windows in WINDOWS.items():
            for name in (NAME,) if stub else (NAME, "fa3"):
                try:
                    found: Any = costs(name, "cpu" if stub else "cuda", windows, options.batch)
                except Exception as error:
                    if name == NAME:
                        raise
                    found = f"{type(error).__name__}: {error}"  # peers fail in many ways
                result[f"{name}, {kind}"] = found
                print(f"{name}, {kind}: {found}", flush=True)
    if options.json:
        about = {} if stub else describe_device()
        about |= {"versions": package_versions(), "commit": options.commit or source_commit()}
        options.json.write_text(json.dumps({**about, "microseconds": result}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
