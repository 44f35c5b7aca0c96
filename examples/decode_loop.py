"""A decode loop over a paged KV cache: four sequences with a common prompt, eight steps."""

import torch

import flashcore

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
layers, q_heads, kv_heads, head_dim = 2, 8, 2, 64
page_tokens, num_pages, batch, prompt, steps = 16, 64, 4, 100, 8

# One pool of K and of V pages for each layer; rows are tokens of a page.
shape = (num_pages, page_tokens, kv_heads, head_dim)
k_pages = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
v_pages = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]

# Page tables: the six full pages of the prompt are everybody's, the rest each sequence's own.
shared = prompt // page_tokens
own = -(-(prompt + steps) // page_tokens) - shared
page_table = torch.empty(batch, shared + own, dtype=torch.int32, device=device)
page_table[:, :shared] = torch.arange(shared)
page_table[:, shared:] = shared + torch.arange(batch * own).view(batch, own)


def attend(q_lens: list[int], seq_lens: torch.Tensor) -> float:
    """One forward: plan once, then every layer writes its new K and V and attends."""
    layout = flashcore.layout_from_page_table(page_table, seq_lens, page_tokens=page_tokens)
    plan = flashcore.plan(
        layout,
        q_lens=q_lens,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        fold=False,  # share however little: the batch is small
    )
    new = sum(q_lens)
    for layer in range(layers):
        q, k, v = (  # what a model's projections would give
            torch.randn(new, heads, head_dim, device=device, dtype=dtype)
            for heads in (q_heads, kv_heads, kv_heads)
        )
        flashcore.append_kv(
            *(k, v, k_pages[layer], v_pages[layer]),
            page_table=page_table,
            seq_lens=seq_lens,
            q_lens=q_lens,
        )
        out = flashcore.paged_attention(q, k_pages[layer], v_pages[layer], plan)
        assert out.shape == q.shape
    return plan.stats().reuse


# Prefill: the first sequence computes the prompt; the others only their part of its last page.
seq_lens = torch.full((batch,), prompt, dtype=torch.int32, device=device)
attend([prompt] + [prompt - shared * page_tokens] * (batch - 1), seq_lens)
for _ in range(steps):
    seq_lens = seq_lens + 1  # lengths count the new token
    reuse = attend([1] * batch, seq_lens)
print(f"{batch} sequences of {int(seq_lens[0])} tokens: KV read {reuse:.2f} times less")
