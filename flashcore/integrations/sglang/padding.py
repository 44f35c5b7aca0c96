"""Which sequences of a batch are real: graphs and data parallelism pad batches, each in its way."""

from __future__ import annotations

from typing import Any

from flashcore.integrations.sglang.speculation import is_tree, sequences_of_mask


def real_sequences(fb: Any) -> int:
    """How many of the first sequences of a forward's batch are real; the others pad it.

    Graphs say by how many they pad. Data parallelism pads eager batches to a multiple of ranks, an
    idle rank's with a made-up request, and keeps the number before. Where neither is told (the
    halves of a batch whose communication overlaps), a tree's mask tells.
    """
    batch = int(fb.batch_size)
    padding = getattr(fb, "num_padding", None)
    if padding is not None:
        return batch - int(padding)
    before = getattr(fb, "_original_batch_size", None)
    if before is not None:
        return min(batch, int(before))
    lengths = getattr(fb, "seq_lens_cpu", None)
    if lengths is None or not is_tree(fb):
        return batch
    spec = fb.spec_info
    return sequences_of_mask(
        spec.custom_mask.numel(), lengths[:batch].tolist(), int(spec.draft_token_num)
    )
