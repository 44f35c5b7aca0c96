"""Which dense attention kernel runs: one frozen config, one legality predicate, one choice.

`DenseConfig` holds everything that determines the generated code and nothing else, so it is the
compile key. Imports neither torch nor the DSL.
"""

from __future__ import annotations

from dataclasses import dataclass

SMEM_BYTES_PER_SM90_CTA = 232_448
REGISTERS_PER_SM90_SM = 65_536
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = ("bf16", "fp16")
WARPGROUP_ROWS = 64
WARPGROUP_THREADS = 128


@dataclass(frozen=True)
class DenseConfig:
    """A compiled dense kernel: features, tile, schedule."""

    dtype: str  # "bf16" | "fp16": of q, k, v and out
    head_dim: int  # padded: one of HEAD_DIMS; the tensors may have fewer columns
    tile_m: int  # query rows of a tile, 64 for each consumer warpgroup
    tile_n: int  # keys of one K/V stage
    num_consumer_warpgroups: int
    stages: int  # depth of the K and of the V ring
    causal: bool = False  # bottom-right aligned; exclusive with local
    local: bool = False  # window_left / window_right are read at run time
    softcap: bool = False
    sinks: bool = False
    varlen: bool = False
    pack_gqa: int = 1  # query heads of one kv head stacked in the rows of a tile
    return_lse: bool = True
    q_stages: int = 1  # 2: the next tile's Q is loaded during this tile
    cluster_m: int = 1  # CTAs with neighbouring row tiles that share K/V by TMA multicast
    dynamic: bool = False  # tiles from an atomic counter, longest first: needs scheduler_scratch
    ping_pong: bool = True  # warpgroups take turns at the tensor cores
    own_blocks: bool = False  # a warpgroup passes over blocks that none of its rows sees
    rescale_log2: float = 8.0  # a row maximum may lag by this factor (log2) before O is rescaled
    producer_registers: int = 24
    consumer_registers: int = 240

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA; 1024 covers barriers, the work slot and alignment."""
        q = self.q_stages * self.tile_m * self.head_dim * 2
        kv = 2 * self.stages * self.tile_n * self.head_dim * 2
        return q + kv + 1024

    @property
    def threads(self) -> int:
        """Threads of one CTA: a producer warpgroup and the consumers."""
        return (1 + self.num_consumer_warpgroups) * WARPGROUP_THREADS


@dataclass(frozen=True)
class DenseProblem:
    """What the caller asks for, as far as it bears on the choice of a kernel."""

    dtype: str
    head_dim: int  # actual columns, any multiple of 8 up to 256
    batch: int
    seqlen_q: int  # longest sequence when varlen
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    causal: bool = False
    window_left: int = -1  # -1: unlimited
    window_right: int = -1
    softcap: bool = False
    sinks: bool = False
    varlen: bool = False
    return_lse: bool = False


def illegal_reason(config: DenseConfig) -> str | None:
    """Why `config` cannot run, or None. The single statement of the constraints."""
    c = config
    registers = WARPGROUP_THREADS * (
        c.producer_registers + c.num_consumer_warpgroups * c.consumer_registers
    )
    rules = (
        (c.dtype in DTYPES, f"dtype {c.dtype!r} is not one of {DTYPES}"),
        (c.head_dim in HEAD_DIMS, f"head_dim {c.head_dim} is not one of {HEAD_DIMS}"),
        (c.num_consumer_warpgroups in (1, 2, 3), "1 to 3 consumer warpgroups fit an SM"),
        (
            c.tile_m == WARPGROUP_ROWS * c.num_consumer_warpgroups,
            f"tile_m {c.tile_m} must be 64 rows for each consumer warpgroup",
        ),
        (c.tile_n % 16 == 0 and 16 <= c.tile_n <= 256, f"tile_n {c.tile_n}: 16 to 256, step 16"),
        (c.stages >= 1, "at least one K/V stage"),
        (c.q_stages in (1, 2), "one or two Q stages"),
        (not (c.causal and c.local), "causal with a window is local with window_right = 0"),
        (c.pack_gqa >= 1 and c.tile_m % c.pack_gqa == 0, "pack_gqa must divide tile_m"),
        (c.cluster_m in (1, 2), "clusters of 1 or 2 CTAs"),
        (
            c.cluster_m == 1 or not (c.causal or c.local or c.varlen or c.dynamic),
            "multicast needs neighbouring tiles with the same K/V range",
        ),
        (c.rescale_log2 >= 0.0, "rescale_log2 is a factor of at least 1"),
        (
            c.producer_registers % 8 == 0 and c.consumer_registers % 8 == 0,
            "register budgets are multiples of 8",
        ),
        (registers <= REGISTERS_PER_SM90_SM, f"{registers} registers exceed 65536"),
        (
            c.smem_bytes <= SMEM_BYTES_PER_SM90_CTA,
            f"{c.smem_bytes} bytes of shared memory exceed {SMEM_BYTES_PER_SM90_CTA}",
        ),
    )
    return next((reason for ok, reason in rules if not ok), None)


def padded_head_dim(head_dim: int) -> int:
    """The smallest compiled head_dim that holds `head_dim`."""
    if head_dim % 8 or not 8 <= head_dim <= HEAD_DIMS[-1]:
        raise ValueError(f"head_dim must be a multiple of 8 from 8 to 256, got {head_dim}")
    return next(d for d in HEAD_DIMS if d >= head_dim)


def choose(problem: DenseProblem) -> DenseConfig:
    """The measured best config for `problem`."""
    p = problem
    head_dim = padded_head_dim(p.head_dim)
    local = p.window_left >= 0 or (p.window_right >= 0 and not (p.causal or p.window_right == 0))
    causal = not local and (p.causal or p.window_right == 0)
    full = not (causal or local)
    warpgroups, tile_n, q_stages = _tile(head_dim, full, local, p.seqlen_k)
    # With the counter and three stages 0.970 of FlashAttention-3, without 0.959 (S8192).
    long_64 = tile_n == 112
    config = DenseConfig(
        dtype=p.dtype,
        head_dim=head_dim,
        tile_m=WARPGROUP_ROWS * warpgroups,
        tile_n=tile_n,
        num_consumer_warpgroups=warpgroups,
        stages=3 if long_64 else 2,
        q_stages=q_stages,
        causal=causal,
        local=local,
        softcap=p.softcap,
        sinks=p.sinks,
        varlen=p.varlen,
        pack_gqa=_pack_gqa(p, WARPGROUP_ROWS * warpgroups),
        return_lse=p.return_lse,
        # Equal tiles need no counter: static order measured the same within 1 %. With 192 rows the
        # last tile of a head is often shorter, and the counter evens that out.
        dynamic=not full or p.varlen or warpgroups == 3,
        # Turns pay where softmax takes longer than the products (hd 64: 471 against 435 TFLOP/s
        # without) and cost 1 % at hd 96 and 128.
        ping_pong=head_dim not in (96, 128),
        # Of 192 rows a third to two thirds see nothing of the tile's last block of 128 keys: causal
        # 423 against 390 (2K), 509 against 492 (8K). At hd 256 (64 keys) it gained nothing. And of
        # 2K rows the last tile has 128: full 480 against 462; with more keys it weighs too little.
        own_blocks=warpgroups == 3 and not long_64,
        # Three consumer warpgroups leave 160 registers each; the varlen scheduler needs 40.
        producer_registers=32 if warpgroups == 3 else (40 if p.varlen else 24),
        consumer_registers=160 if warpgroups == 3 else (232 if p.varlen else 240),
    )
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(f"no kernel for {problem}: {reason}")
    return config


def _tile(head_dim: int, full: bool, local: bool, seqlen_k: int) -> tuple[int, int, int]:
    """(consumer warpgroups, tile_n, q_stages); TFLOP/s, attempts: docs/experiments/dense.md."""
    if head_dim == 64:
        # Two warpgroups leave the exponentials exposed: 397 against 454. Wider blocks spill.
        # Narrower ones need fewer registers: at 8K keys 533 against 526, at 2K 456 against 463.
        return 3, 112 if full and seqlen_k >= 4096 else 128, 2
    if head_dim == 96:
        return 2, 160 if full else 144, 2  # 586 against 542 with 128; causal 528 against 524
    if head_dim == 128:
        if not full:
            # Q of two tiles gains nothing here: 514 against 508. tile_n 160: 2 to 6 % slower.
            return 2, 128, 1
        # A wider block has fewer waits and shuffles, but rounds a short sequence up: at 2K keys
        # 612 against 606 for 128, at 32K 706 against 680 for 160.
        return 2, 160 if seqlen_k >= 4096 else 128, 2
    if head_dim == 192:
        return (2, 96, 1) if full else (2, 80, 2)  # 735 against 727; causal 603 against 600
    return 2, 64, 1  # 684 against 673 with 80, causal 585 against 584


def _pack_gqa(problem: DenseProblem, tile_m: int) -> int:
    """Stack the query heads of a kv head when one head's rows would leave most of a tile empty."""
    group = problem.num_heads // problem.num_kv_heads
    if group == 1 or tile_m % group or problem.seqlen_q >= tile_m:
        return 1
    return group


def num_tiles(config: DenseConfig, problem: DenseProblem) -> int:
    """Row tiles of a launch (an upper bound when varlen)."""
    rows = -(-problem.seqlen_q * config.pack_gqa // config.tile_m)
    rows = -(-rows // config.cluster_m) * config.cluster_m
    return rows * (problem.num_heads // config.pack_gqa) * problem.batch


def grid_size(config: DenseConfig, problem: DenseProblem, sm_count: int) -> int:
    """The `num_ctas` argument: persistent CTAs, whole clusters, at least one."""
    ctas = max(min(num_tiles(config, problem), sm_count), config.cluster_m)
    return ctas // config.cluster_m * config.cluster_m
