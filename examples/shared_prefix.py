"""What sharing saves: the plan of a batch with a common prefix, beside one that ignores it."""

import torch

import flashcore

batch, prefix, own, page_tokens = 32, 8192, 200, 64
heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}

# Nobody declares the prefix: the page table says which pages are the same.
shared, columns = prefix // page_tokens, -(-(prefix + own) // page_tokens)
page_table = torch.empty(batch, columns, dtype=torch.int32)
page_table[:, :shared] = torch.arange(shared)
page_table[:, shared:] = shared + torch.arange(batch * (columns - shared)).view(batch, -1)
seq_lens = torch.full((batch,), prefix + own, dtype=torch.int32)

layout = flashcore.layout_from_page_table(page_table, seq_lens, page_tokens=page_tokens)
for share in (False, True):
    plan = flashcore.plan(layout, page_tokens=page_tokens, share=share, **heads)
    stats = plan.stats()
    print(
        f"share={share}: {plan.groups.shape[0]} groups, {stats.tokens_once} of "
        f"{stats.tokens_per_sequence} tokens read, {stats.reuse:.1f} times less"
    )
