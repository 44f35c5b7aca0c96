"""A CTA's shared memory, and the rings that it holds."""

# Annotations of a cute.struct are read as objects, so they are not postponed here.

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8

from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.kernels.attention.paged.work_loop import SLOT_WORDS
from flashcore.sm90.kernels.attention.parts import matmul, pipelines


class Layouts(NamedTuple):
    """Of tiles in shared memory: those that products read, and those of fp8 that are converted."""

    q: cute.ComposedLayout | None
    k: cute.ComposedLayout  # (tile_n, columns, stage)
    v: cute.ComposedLayout
    narrow_k: cute.Layout | cute.ComposedLayout | None
    narrow_v: cute.Layout | cute.ComposedLayout | None

    @property
    def loaded(self) -> tuple[Any, Any]:
        """Of K and V as they come from the pages."""
        return (self.k, self.v) if self.narrow_k is None else (self.narrow_k, self.narrow_v)


def layouts_of(config: PagedConfig, dtype) -> Layouts:
    """dtype: of the products."""
    c = config
    k_stages, v_stages = c.product_stages
    narrow: list[Any] = [None, None]
    if c.kv_dtype:
        narrow = [narrow_layout(c, columns) for columns in (c.k_columns, c.v_columns)]
    return Layouts(
        None if c.q_registers else matmul.smem_layout(dtype, c.tile_m, c.k_columns),
        matmul.smem_layout(dtype, c.tile_n, c.k_columns, k_stages),
        matmul.smem_layout(dtype, c.tile_n, c.v_columns, v_stages),
        *narrow,
    )


def narrow_layout(config: PagedConfig, columns: int) -> cute.Layout | cute.ComposedLayout:
    """Stages of fp8: rows one after the other, swizzled only where ldmatrix reads them."""
    if config.few_rows:
        return matmul.narrow_smem_layout(config.tile_n, columns, config.stages)
    tile = config.tile_n * columns
    return cute.make_layout((config.tile_n, columns, config.stages), stride=(columns, 1, tile))


def storage_of(config: PagedConfig, dtype, layouts: Layouts) -> Any:
    """The struct of a CTA; what is not converted has no bytes of fp8."""
    k_stages, v_stages = config.product_stages
    narrow_stages, k_bytes, v_bytes = 0, 0, 0
    q_elements = 0 if layouts.q is None else cute.cosize(layouts.q)
    if config.kv_dtype:
        narrow_stages = config.stages
        k_bytes, v_bytes = cute.cosize(layouts.narrow_k), cute.cosize(layouts.narrow_v)

    @cute.struct
    class Storage:
        narrow_k_barriers: cute.struct.MemRange[Int64, 2 * narrow_stages]
        narrow_v_barriers: cute.struct.MemRange[Int64, 2 * narrow_stages]
        k_barriers: cute.struct.MemRange[Int64, 2 * k_stages]
        v_barriers: cute.struct.MemRange[Int64, 2 * v_stages]
        slot_barriers: cute.struct.MemRange[Int64, 2]
        slot: cute.struct.MemRange[Int32, SLOT_WORDS]
        row_totals: cute.struct.MemRange[Float32, config.total_rows]
        few_totals: cute.struct.Align[cute.struct.MemRange[Float32, config.few_totals], 16]
        q: cute.struct.Align[cute.struct.MemRange[dtype, q_elements], 1024]
        k: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layouts.k)], 1024]
        v: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layouts.v)], 1024]
        narrow_k: cute.struct.Align[cute.struct.MemRange[Uint8, k_bytes], 1024]
        narrow_v: cute.struct.Align[cute.struct.MemRange[Uint8, v_bytes], 1024]
        totals: cute.struct.Align[cute.struct.MemRange[Float32, config.total_elements], 16]

    return Storage


class Rings(NamedTuple):
    """Of stages that products read, and of those that loads fill: the same where nothing is
    converted."""

    k: Any
    v: Any
    loaded_k: Any
    loaded_v: Any


def rings_of(config: PagedConfig, dtype, storage: Any, layouts: Layouts) -> Rings:
    """Rings in the struct `storage`, their barriers initialised by the calling CTA's threads."""
    c = config
    consumers = 4 * c.num_consumer_warpgroups
    if not c.kv_dtype:
        barriers = storage.k_barriers, storage.v_barriers
        return Rings(*2 * _load_rings(c, dtype, barriers, layouts, consumers))
    narrow = storage.narrow_k_barriers, storage.narrow_v_barriers
    converted = (
        pipelines.converted_ring(barriers.data_ptr(), stages, c.converted_parts, consumers)
        for barriers, stages in zip(
            (storage.k_barriers, storage.v_barriers), c.product_stages, strict=True
        )
    )
    return Rings(*converted, *_load_rings(c, Uint8, narrow, layouts, c.readers))


def _load_rings(
    config: PagedConfig, dtype, barriers: tuple[Any, Any], layouts: Layouts, readers: int
) -> tuple[Any, Any]:
    """Of K and of V, filled by TMA or cp.async, each stage freed by so many warps."""
    c = config
    if c.kv_load == "gather":
        products = not c.kv_dtype
        k, v = (pipelines.gather_ring(b.data_ptr(), c.stages, readers, products) for b in barriers)
        return k, v
    # Of a whole stage: TMA counts the zeros that it fills in too.
    k, v = (
        pipelines.tma_ring(
            b.data_ptr(),
            c.stages,
            cute.size_in_bytes(dtype, cute.select(layout, mode=[0, 1])),
            readers,
        )
        for b, layout in zip(barriers, layouts.loaded, strict=True)
    )
    return k, v
