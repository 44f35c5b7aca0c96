"""Our kernel and its peers behind one interface. Every peer is optional.

`Provider.prepare` is outside the timing: it may make views and allocate what a caller would keep.
What it returns is called in the timed loop and does the whole of one attention call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.bench.problems import DenseProblem

if TYPE_CHECKING:
    import torch

Call = Callable[[], "torch.Tensor"]  # out [batch, seqlen, heads, head_dim]
Prepare = Callable[[DenseProblem, "torch.Tensor", "torch.Tensor", "torch.Tensor"], Call]


class UnsupportedError(Exception):
    """A provider cannot run a problem; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One implementation. Several may be builds of the same kernel."""

    name: str  # unique
    kernel: str  # flashcore, fa3, fa4, cudnn or fa2
    version: str
    prepare: Prepare
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # around the timed loop


def dense_providers() -> tuple[list[Provider], dict[str, str]]:
    """(providers that can be imported, name of each other -> why not)."""
    makers = {
        "flashcore": _flashcore,
        "fa3_fwd": _fa3_fwd,
        "sgl_kernel": _sgl_kernel,
        "fa4": _fa4,
        "cudnn": _cudnn,
        "fa2": _fa2,
    }
    found, missing = [], {}
    for name, make in makers.items():
        try:
            found.append(make())
        except (
            Exception
        ) as error:  # peers fail to import in many ways: absent, wrong GPU, wrong ABI
            first_line = next(iter(str(error).splitlines()), "")
            missing[name] = f"{type(error).__name__}: {first_line}"
    return found, missing


def _flashcore() -> Provider:
    from flashcore import __version__, attention
    from flashcore.sm90.available import available

    usable, reason = available("cuda")
    if not usable:
        raise UnsupportedError(reason)

    def prepare(problem: DenseProblem, q: Any, k: Any, v: Any) -> Call:
        return lambda: attention(q, k, v, causal=problem.causal, impl="auto")

    return Provider("flashcore", "flashcore", __version__, prepare)


def _fa3_fwd() -> Provider:
    attend = import_module("fa3_fwd_interface").flash_attn_func

    def prepare(problem: DenseProblem, q: Any, k: Any, v: Any) -> Call:
        if problem.dtype != "bf16":
            raise UnsupportedError("this build of FlashAttention-3 has bf16 only")
        return lambda: _first(attend(q, k, v, causal=problem.causal))

    return Provider("fa3_fwd", "fa3", version_of("fa3-fwd"), prepare)


def _sgl_kernel() -> Provider:
    """The operator itself, on unpacked tensors: faster than the package's varlen function."""
    forward, number = load_flash_ops()

    def prepare(problem: DenseProblem, q: Any, k: Any, v: Any) -> Call:
        # Between the tensors and the scale: new keys, output, lengths, page table, rotary, scales.
        lengths = (problem.seqlen, problem.seqlen)
        unused = ([None] * 9, [None] * 9)
        scale = problem.head_dim**-0.5
        options = {
            "is_rotary_interleaved": False,
            "scheduler_metadata": None,
            "num_splits": 1,
            "pack_gqa": None,
            "sm_margin": 0,
            "sinks": None,
            "sparse_mask_fine": None,
            "only_qv": False,
        }
        arguments = (*unused[0], *lengths, *unused[1], scale, problem.causal, -1, -1, 0, 0.0)
        return lambda: _first(forward(q, k, v, *arguments, **options))

    return Provider("sgl_kernel", "fa3", number, prepare)


def load_flash_ops() -> tuple[Any, str]:
    """FlashAttention-3's forward operator in sgl_kernel, and the version of that package.

    The library alone is loaded: the package's own import wants kernels for other purposes too.
    """
    import torch

    spec = find_spec("sgl_kernel")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError("sgl_kernel is not installed")
    library = Path(next(iter(spec.submodule_search_locations))) / "flash_ops.abi3.so"
    load_library: Any = torch.ops.load_library
    load_library(str(library))
    return torch.ops.sgl_kernel.fwd.default, version_of("sglang-kernel", "sgl-kernel")


def _fa4() -> Provider:
    attend = import_module("flash_attn.cute").flash_attn_func

    def prepare(problem: DenseProblem, q: Any, k: Any, v: Any) -> Call:
        return lambda: _first(attend(q, k, v, causal=problem.causal))

    return Provider("fa4", "fa4", version_of("flash-attn-4", "fa4", "flash-attn"), prepare)


def _cudnn() -> Provider:
    import torch

    cudnn: Any = torch.backends.cudnn  # untyped in some versions of torch
    number = cudnn.version()
    if number is None:
        raise UnsupportedError("torch was built without cuDNN")
    return _torch_sdpa("cudnn", "CUDNN_ATTENTION", str(number))


def _fa2() -> Provider:
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError("torch sees no CUDA device")
    return _torch_sdpa("fa2", "FLASH_ATTENTION", f"torch {torch.__version__}")


def _torch_sdpa(name: str, backend: str, number: str) -> Provider:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    chosen = getattr(SDPBackend, backend)

    def prepare(problem: DenseProblem, q: Any, k: Any, v: Any) -> Call:
        qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
        grouped = problem.heads != problem.kv_heads

        def call() -> torch.Tensor:
            out = scaled_dot_product_attention(
                qt, kt, vt, is_causal=problem.causal, enable_gqa=grouped
            )
            return out.transpose(1, 2)

        return call

    return Provider(name, name, number, prepare, lambda: sdpa_kernel(chosen))


def _first(result: Any) -> torch.Tensor:
    """The output, where a library also returns the LSE."""
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


def version_of(*distributions: str) -> str:
    """Version of the first of these distributions that is installed, or "unknown"."""
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"
