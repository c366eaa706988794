"""A small run of each operator for compute-sanitizer: see `make sanitize`.

compute-sanitizer --tool memcheck python tests/sanitize.py [attention] [acceptance] [compaction]
"""

import sys

import torch

from medusa_kernels import TokenTree, accept_candidates, compact_kv_cache, tree_attention

torch.manual_seed(0)
device = "cuda"


def attention(heads, heads_kv, head_dim, dtype, lengths, nodes, block_size=0, append=True, **options):
    batch, size = len(lengths), max(nodes)
    parents = torch.tensor([-1] + [(i - 1) // 3 for i in range(1, size)], dtype=torch.int32)
    tree = (
        TokenTree.from_parents(parents).to(device).with_num_nodes(torch.tensor(nodes, dtype=torch.int32, device=device))
    )
    room = max(lengths) + size
    table = None
    shape = (batch, room, heads_kv, head_dim)
    if block_size:
        per = -(-room // block_size)
        table = torch.randperm(batch * per).view(batch, per).int().to(device)
        shape = (batch * per, block_size, heads_kv, head_dim)
    k_cache, v_cache = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    q = torch.randn(batch, size, heads, head_dim, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, size, heads_kv, head_dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    new = {"k": k, "v": v} if append else {}
    out = tree_attention(q, k_cache, v_cache, tree, lens, block_table=table, **new, **options)
    assert out.isfinite().all()


def acceptance(mode, batch, size, vocab, dtype):
    tree = TokenTree.from_parents(torch.tensor([-1] + [(i - 1) // 3 for i in range(1, size)], dtype=torch.int32)).to(
        device
    )
    logits = torch.randn(batch, size, vocab, device=device).to(dtype)
    tokens = torch.randint(vocab, (batch, size), device=device)
    tokens[:, 1:] = logits[:, tree.parents[1:].long()].argmax(-1)
    seed = torch.tensor([1, 0], device=device)
    result = accept_candidates(logits, tokens, tree, mode=mode, top_p=0.9, seed=seed, eos_token_id=3)
    assert (result.accept_length >= 0).all()
    for _ in range(2):  # planned, then made again
        seed.copy_(torch.tensor([1, 0]))
        out = type(result)(*map(torch.empty_like, result))
        accept_candidates(logits, tokens, tree, mode=mode, top_p=0.9, seed=seed, eos_token_id=3, out=out)
        assert all(torch.equal(x, y) for x, y in zip(out, result))
    return result


def run_attention():
    attention(8, 2, 128, torch.bfloat16, [100, 5, 0], [20, 20, 0])
    attention(4, 4, 64, torch.bfloat16, [300, 64], [20, 7], block_size=16, window=30, softcap=5.0)
    attention(4, 2, 128, torch.float8_e4m3fn, [100, 70], [20, 20])
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):  # more splits than are merged at once
        attention(4, 1, 128, dtype, [12000], [20])
    attention(9, 3, 64, torch.bfloat16, [900, 40], [20, 7])  # splits merge in clusters
    attention(8, 2, 128, torch.bfloat16, [700], [20], block_size=16)
    attention(160, 40, 128, torch.float8_e4m3fn, [400, 130, 64], [64, 64, 1])
    attention(160, 40, 128, torch.bfloat16, [400, 130, 64], [64, 64, 1])  # Hopper's own kernel
    attention(160, 40, 128, torch.bfloat16, [400, 130, 64], [64, 64, 1], block_size=16)
    attention(8, 2, 128, torch.bfloat16, [600, 70], [20, 7], batch_invariant=True)
    attention(4, 4, 64, torch.bfloat16, [300, 64], [20, 7], block_size=16, batch_invariant=True)


def run_acceptance():
    for mode in ("greedy", "typical", "sampling"):
        acceptance(mode, 2, 13, 1000, torch.float32)
        acceptance(mode, 3, 40, 32000, torch.bfloat16)


def run_compaction():
    result = acceptance("sampling", 3, 40, 1000, torch.bfloat16)
    kv = torch.randn(3, 2, 3, 200, 4, 64, device=device, dtype=torch.float16)
    lens = torch.tensor([100, 5, 0], dtype=torch.int32, device=device)
    for _ in range(2):  # planned, then made again
        compact_kv_cache(kv, result.path, result.accept_length, lens)
    layers = [(torch.randn(12, 16, 2, 64, device=device), torch.randn(12, 16, 2, 64, device=device)) for _ in range(2)]
    table = torch.randperm(12).view(3, 4).int().to(device)
    compact_kv_cache(layers, result.path, result.accept_length, lens.clamp(max=20), block_table=table)


runs = {"attention": run_attention, "acceptance": run_acceptance, "compaction": run_compaction}
for name in sys.argv[1:] or runs:
    runs[name]()
torch.cuda.synchronize()
print("ok")
