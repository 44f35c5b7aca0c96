"""Plan and attention in one CUDA graph: it serves whatever page tables are written before."""

import torch

import flashcore

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    print("this example needs a Hopper GPU: plans are made by its kernels")
    raise SystemExit

torch.manual_seed(0)
q_heads, kv_heads, head_dim, page_tokens, num_pages, batch = 32, 8, 128, 64, 4096, 16
pool = (num_pages, page_tokens, kv_heads, head_dim)
k_pages = torch.randn(pool, device="cuda", dtype=torch.bfloat16)
v_pages = torch.randn(pool, device="cuda", dtype=torch.bfloat16)
q = torch.randn(batch, q_heads, head_dim, device="cuda", dtype=torch.bfloat16)

# Buffers that the graph reads; a planner with room for any batch within its capacities.
columns = 64
page_table = torch.zeros(batch, columns, dtype=torch.int32, device="cuda")
seq_lens = torch.zeros(batch, dtype=torch.int32, device="cuda")
q_lens = torch.ones(batch, dtype=torch.int32, device="cuda")
planner = flashcore.DevicePlanner(
    flashcore.Capacities(max_batch=batch, max_entries=batch * columns, max_q=batch),
    num_pages=num_pages,
    num_q_heads=q_heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    page_tokens=page_tokens,
)


def step() -> torch.Tensor:
    plan = planner.update(page_table, seq_lens, q_lens)
    return flashcore.paged_attention(q, k_pages, v_pages, plan)


def write_batch(shared_pages: int) -> None:
    """Other sequences, in the same buffers: the first pages are one for all."""
    page_table.copy_(torch.randperm(num_pages)[: batch * columns].view(batch, columns))
    page_table[:, :shared_pages] = page_table[0, :shared_pages]
    seq_lens.copy_(torch.randint(shared_pages * page_tokens + 1, columns * page_tokens, (batch,)))


write_batch(32)
step()  # compiles what is not in the cache; a capture must not
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = step()
for shared_pages in (0, 16, 60):
    write_batch(shared_pages)
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, step())
    print(f"{shared_pages} pages shared: the graph's result is that of a call")
faults, _, _ = planner.faults_seen()
assert not faults  # sequences that cannot be planned would be named here
