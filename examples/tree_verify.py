"""Speculative decoding: verify a tree of draft tokens of each sequence in one call."""

import torch

import flashcore
from flashcore.reference import paged_attention_reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
q_heads, kv_heads, head_dim, page_tokens, batch = 8, 2, 64, 16, 3

# A tree of five drafts: 0 -> 1, 2; 1 -> 3; 2 -> 4. A draft sees itself and its ancestors.
parents = [-1, 0, 0, 1, 2]
tree = torch.zeros(len(parents), len(parents), dtype=torch.bool)
for draft, parent in enumerate(parents):
    tree[draft] = tree[parent] if parent >= 0 else False
    tree[draft, draft] = True

# Cached tokens, then the drafts, whose K and V are in the cache already.
seq_lens = torch.tensor([40, 75, 33], dtype=torch.int32, device=device) + len(parents)
columns = -(-int(seq_lens.max()) // page_tokens)
page_table = torch.randperm(batch * columns, device=device).int().view(batch, columns)
shape = (batch * columns, page_tokens, kv_heads, head_dim)
k_pages = torch.randn(shape, device=device, dtype=dtype)
v_pages = torch.randn(shape, device=device, dtype=dtype)
q = torch.randn(batch * len(parents), q_heads, head_dim, device=device, dtype=dtype)

layout = flashcore.layout_from_page_table(page_table, seq_lens, page_tokens=page_tokens)
q_lens = [len(parents)] * batch
plan = flashcore.plan(
    layout,
    q_lens=q_lens,
    num_q_heads=q_heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    page_tokens=page_tokens,
)
tree_mask = tree.repeat(batch, 1).to(device)  # [total_q, drafts]: among its sequence's drafts
out = flashcore.paged_attention(q, k_pages, v_pages, plan, tree_mask=tree_mask)

expected, _ = paged_attention_reference(q, k_pages, v_pages, layout, q_lens, tree_mask=tree_mask)
error = (out.double() - expected).norm() / expected.norm()
print(f"{batch} trees of {len(parents)} drafts verified, error {error:.1e}")
assert error < 5e-3
