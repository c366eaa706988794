"""Tree attention whose result for a node is, bit for bit, a function of the node's query and of the keys and values at
positions 0 to its own: neither of the rest of the batch, nor of the tree's shape, nor of where a key lies.

Positions are cut into tiles of BLOCK_N and tiles into chunks of CHUNK, from position 0. What is computed for a row:
    a chunk:   its tiles in order, one `_step` each, from an empty state (m, norm, acc)
    the row:   the state of the chunk that holds its own position, then those of the chunks from 0 on folded into it
No other order is left open: a row's last tile holds its own position, and what lies behind that is masked, exactly: it
adds 0 and is no maximum. Tiles of committed tokens alone are the same for all nodes: `prefix_kernel` takes BLOCK_M rows
of any nodes and heads. From the first tile on that holds a node of the tree, each node has other keys: `tail_kernel`
takes one node, gathers the keys of its path by position, and goes on from the state where the prefix left off. Whether
a tile is of the one or of the other kind changes with the committed length, and must not change its bits:
    - both call `_step` with the same tile sizes and warps, so with the same matmul instructions and the same order in
      the sum of a row. Rows of a matmul are independent of each other and of their place; a column of `q @ k.T`, too.
    - all else is element by element, compiled without fusing multiplications with additions, so that the compiler's
      choice of what to fuse cannot differ between the two kernels and their variants.
    - tile sizes follow from the model and the GPU alone. Chunks are of a fixed size, so there is one partial result a
      chunk, as many as the context is long: that, and the gathered tail, are what this costs.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch as ordinary_launch
from .tree_attention import INTERPRET, LOG2E, _finish, _lengths, _row_starts, _tanh_of_scores, _to_cache

CHUNK = 512  # positions; more: fewer partial results, but fewer programs for a short context


@dataclass(frozen=True)
class TileConfig:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_config(head_dim: int, itemsize: int, arch: int) -> TileConfig:
    """Of nothing that differs between two calls on one model and one GPU."""
    if itemsize == 4:
        return TileConfig(16, 16 if head_dim > 128 else 32, 4, 2)
    if head_dim > 128:
        return TileConfig(64 if arch >= 90 else 32, 32, 8, 3)
    return TileConfig(64, 32, 4 if arch >= 90 else 8, 3)


@triton.jit
def _step(
    q, k, v, acc, m, norm, seen, qk_scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the online softmax in base 2; `qk_scale` holds log2(e)."""
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    else:
        k, v = k.to(q.dtype), v.to(q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        s = _tanh_of_scores(s, qk_scale, softcap, q.dtype == tl.float32)
        qk_scale = softcap * LOG2E
    s = s * qk_scale
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    norm = norm * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, norm


@triton.jit
def _first_tile(position, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first tile that a node at this position sees."""
    first = position * 0
    if HAS_WINDOW:
        first = tl.maximum(position - window + 1, 0) // BLOCK_N
    return first


@triton.jit
def prefix_kernel(
    q_ptr, k_ptr, v_ptr, new_k_ptr, new_v_ptr, depths_ptr, num_nodes_ptr, cache_seqlens_ptr, block_table_ptr,
    k_scale_ptr, v_scale_ptr,  # as in tree_attention_kernel
    acc_ptr,  # [B, Hkv, chunks, rows, D] fp32: of each chunk, up to the prefix's last whole tile
    m_ptr, norm_ptr,  # [B, Hkv, chunks, rows] fp32
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_nkb, stride_nkt, stride_nkh,
    stride_nvb, stride_nvt, stride_nvh,
    stride_db, stride_table, stride_scale,
    num_nodes, heads_kv, capacity, num_blocks, window, chunks, qk_scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, BLOCK_SIZE: tl.constexpr, APPEND: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_NUM_NODES: tl.constexpr, HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows over one chunk's tiles of committed tokens; writes the tree's K and V to the cache."""
    block_m = tl.program_id(0)
    chunk = tl.program_id(1)
    batch = (tl.program_id(2) // heads_kv).to(tl.int64)
    head_kv = tl.program_id(2) % heads_kv
    length, nodes = _lengths(cache_seqlens_ptr, num_nodes_ptr, batch, num_nodes, capacity, HAS_NUM_NODES)
    offs_d = tl.arange(0, BLOCK_D)
    dim_ok = offs_d < HEAD_DIM
    offs_n = tl.arange(0, BLOCK_N)
    k_base = k_ptr + head_kv * stride_kh + offs_d[None, :]
    v_base = v_ptr + head_kv * stride_vh + offs_d[None, :]
    k_scale = 1.0
    v_scale = 1.0
    if HAS_SCALES:
        k_scale = tl.load(k_scale_ptr + head_kv * stride_scale)
        v_scale = tl.load(v_scale_ptr + head_kv * stride_scale)
        qk_scale *= k_scale

    if APPEND and (block_m == 0) & (chunk == 0):
        for start in range(0, nodes, BLOCK_N):
            column = start + offs_n
            ok = (column < nodes)[:, None] & dim_ok[None, :]
            at_new_k, at_new_v = batch * stride_nkb + column * stride_nkt, batch * stride_nvb + column * stride_nvt
            k = tl.load(new_k_ptr + head_kv * stride_nkh + at_new_k[:, None] + offs_d[None, :], mask=ok, other=0.0)
            v = tl.load(new_v_ptr + head_kv * stride_nvh + at_new_v[:, None] + offs_d[None, :], mask=ok, other=0.0)
            at_k, at_v = _row_starts(length + column, batch, capacity, block_table_ptr, stride_table, num_blocks,
                                     stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE)  # fmt: skip
            tl.store(k_base + at_k[:, None], _to_cache(k, k_scale, k_ptr.dtype.element_ty, HAS_SCALES), mask=ok)
            tl.store(v_base + at_v[:, None], _to_cache(v, v_scale, v_ptr.dtype.element_ty, HAS_SCALES), mask=ok)

    lo = tl.maximum(chunk * TILES, _first_tile(length, window, HAS_WINDOW, BLOCK_N))
    hi = tl.minimum((chunk + 1) * TILES, length // BLOCK_N)
    if lo >= hi:
        return
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    node = row // GROUP
    real = node < nodes
    q_at = batch * stride_qb + node * stride_qt + (head_kv * GROUP + row % GROUP) * stride_qh
    q = tl.load(q_ptr + q_at[:, None] + offs_d[None, :], mask=real[:, None] & dim_ok[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    depth = node * 0
    if HAS_WINDOW:
        depth = tl.load(depths_ptr + batch * stride_db + node, mask=real, other=0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(lo, hi):
        slots = tile * BLOCK_N + offs_n
        at_k, at_v = _row_starts(slots, batch, capacity, block_table_ptr, stride_table, num_blocks,
                                 stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE)  # fmt: skip
        k = tl.load(k_base + at_k[:, None], mask=dim_ok[None, :], other=0.0)
        v = tl.load(v_base + at_v[:, None], mask=dim_ok[None, :], other=0.0)
        seen = slots[None, :] > (length + depth - window)[:, None]
        acc, m, norm = _step(q, k, v, acc, m, norm, seen, qk_scale, softcap, HAS_WINDOW, SOFTCAP, UPCAST, PRECISION)
    at = (tl.program_id(2).to(tl.int64) * chunks + chunk) * (num_nodes * GROUP) + row
    tl.store(acc_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=real[:, None] & dim_ok[None, :])
    tl.store(m_ptr + at, m, mask=real)
    tl.store(norm_ptr + at, norm, mask=real)


@triton.jit
def tail_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, num_nodes_ptr, cache_seqlens_ptr, block_table_ptr, sinks_ptr,
    k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr,  # as in tree_attention_kernel
    acc_ptr, m_ptr, norm_ptr,  # as in prefix_kernel
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_mb, stride_table, stride_ob, stride_ot, stride_oh, stride_scale,
    num_nodes, heads_kv, capacity, num_blocks, words, window, chunks, qk_scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SCALES: tl.constexpr,
    HAS_NUM_NODES: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One node's heads of one KV head: from where the prefix left off to the node's position, then all chunks."""
    node = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # of the group
    batch = (tl.program_id(2) // heads_kv).to(tl.int64)
    head_kv = tl.program_id(2) % heads_kv
    length, nodes = _lengths(cache_seqlens_ptr, num_nodes_ptr, batch, num_nodes, capacity, HAS_NUM_NODES)
    head_ok = head < GROUP
    real = head < tl.where(node < nodes, GROUP, 0)
    offs_d = tl.arange(0, BLOCK_D)
    dim_ok = offs_d < HEAD_DIM
    offs_n = tl.arange(0, BLOCK_N)
    q_at = batch * stride_qb + node * stride_qt + (head_kv * GROUP + head) * stride_qh
    q = tl.load(q_ptr + q_at[:, None] + offs_d[None, :], mask=real[:, None] & dim_ok[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + head_kv * stride_kh + offs_d[None, :]
    v_base = v_ptr + head_kv * stride_vh + offs_d[None, :]
    v_scale = 1.0
    if HAS_SCALES:
        qk_scale *= tl.load(k_scale_ptr + head_kv * stride_scale)
        v_scale = tl.load(v_scale_ptr + head_kv * stride_scale)

    # Nodes are sorted, so the set bits of a node's mask are its path in order: the d-th is the path's node of depth d.
    mask_row = mask_ptr + batch * stride_mb + node * words
    bits = tl.arange(0, 64)
    position = length - 1
    for word in range(0, words):
        position += tl.sum(((tl.load(mask_row + word) >> bits.to(tl.int64)) & 1).to(tl.int32), 0)

    first_chunk = tl.program_id(2).to(tl.int64) * chunks  # of the partial results
    whole = length // BLOCK_N
    lo = tl.maximum(whole, _first_tile(position, window, HAS_WINDOW, BLOCK_N))
    hi = tl.where(node < nodes, position // BLOCK_N + 1, lo)
    chunk_lo = lo // TILES
    chunk_hi = tl.where(node < nodes, position // BLOCK_N // TILES, chunk_lo)
    # The chunk where the tail begins, if the prefix has a part of it.
    begun = (lo == whole) & (tl.maximum(chunk_lo * TILES, _first_tile(length, window, HAS_WINDOW, BLOCK_N)) < whole)
    at = ((first_chunk + chunk_lo) * num_nodes + node) * GROUP + head
    load = head < tl.where((node < nodes) & begun, GROUP, 0)
    m = tl.load(m_ptr + at, mask=load, other=float("-inf"))
    norm = tl.load(norm_ptr + at, mask=load, other=0.0)
    acc = tl.load(acc_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=load[:, None] & dim_ok[None, :], other=0.0)
    for chunk in range(chunk_lo, chunk_hi + 1):
        for tile in range(tl.maximum(lo, chunk * TILES), tl.minimum(hi, (chunk + 1) * TILES)):
            key = tile * BLOCK_N + offs_n  # positions
            slots = key
            passed = 0
            for word in range(0, words):
                on = ((tl.load(mask_row + word) >> bits.to(tl.int64)) & 1).to(tl.int32)
                key_depth = passed + tl.cumsum(on, 0) - 1
                hit = (on[None, :] > 0) & (key_depth[None, :] == (key - length)[:, None])
                slots += tl.sum(tl.where(hit, length + word * 64 + bits[None, :] - key[:, None], 0), 1)
                passed += tl.sum(on, 0)
            seen = key <= position
            if HAS_WINDOW:
                seen &= key > position - window
            at_k, at_v = _row_starts(slots, batch, capacity, block_table_ptr, stride_table, num_blocks,
                                     stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE)  # fmt: skip
            k = tl.load(k_base + at_k[:, None], mask=seen[:, None] & dim_ok[None, :], other=0.0)
            v = tl.load(v_base + at_v[:, None], mask=seen[:, None] & dim_ok[None, :], other=0.0)
            acc, m, norm = _step(
                q, k, v, acc, m, norm, seen[None, :], qk_scale, softcap, True, SOFTCAP, UPCAST, PRECISION
            )
        if chunk < chunk_hi:  # a whole one: keep it with the others, and begin anew
            at = ((first_chunk + chunk) * num_nodes + node) * GROUP + head
            tl.store(acc_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=real[:, None] & dim_ok[None, :])
            tl.store(m_ptr + at, m, mask=real)
            tl.store(norm_ptr + at, norm, mask=real)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            norm = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tl.debug_barrier()  # other threads may read what this one has just written
    for chunk in range(_first_tile(position, window, HAS_WINDOW, BLOCK_N) // TILES, chunk_hi):
        at = ((first_chunk + chunk) * num_nodes + node) * GROUP + head
        m_chunk = tl.load(m_ptr + at, mask=real, other=float("-inf"))
        norm_chunk = tl.load(norm_ptr + at, mask=real, other=0.0)
        acc_chunk = tl.load(
            acc_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=real[:, None] & dim_ok[None, :], other=0.0
        )
        m_new = tl.maximum(m, m_chunk)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        old, new = tl.exp2(m - base), tl.exp2(m_chunk - base)
        acc = acc * old[:, None] + acc_chunk * new[:, None]
        norm = norm * old + norm_chunk * new
        m = m_new
    out_at = batch * stride_ob + node * stride_ot + (head_kv * GROUP + head) * stride_oh
    lse_at = (batch * heads_kv * GROUP + head_kv * GROUP + head) * num_nodes + node
    _finish(acc, m, norm, head_ok, real, out_at, lse_at, sinks_ptr, head_kv * GROUP + head, offs_d, dim_ok, v_scale,
            HAS_SINKS, HAS_LSE, out_ptr, lse_ptr)  # fmt: skip


def tree_attention(
    q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale,
    softmax_scale, window, softcap, out, lse, config, launch=ordinary_launch,
):  # fmt: skip
    """`tree_attention.tree_attention`, its result for a node independent of all that is not the node's."""
    batch, size, heads, head_dim = q.shape
    heads_kv = k_cache.shape[2]
    group, rows = heads // heads_kv, size * (heads // heads_kv)
    paged = block_table is not None
    capacity = block_table.shape[1] * k_cache.shape[1] if paged else k_cache.shape[1]
    chunks = triton.cdiv(capacity, CHUNK)
    states = math.prod(shape := (batch * heads_kv, chunks, rows))
    work = torch.empty(states * (head_dim + 2), dtype=torch.float32, device=q.device)
    acc, m, norm = (x.view(*shape, -1) for x in work.split([states * head_dim, states, states]))
    cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    stride_table = block_table.stride(0) if paged else 0
    stride_scale = 1 if k_scale is not None and k_scale.numel() > 1 else 0
    sizes = (size, heads_kv, capacity, k_cache.shape[0])
    scales = (softmax_scale * 1.4426950408889634, softcap)
    common = {
        "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TILES": CHUNK // config.block_n,
        "BLOCK_SIZE": k_cache.shape[1] if paged else 0,
        "SOFTCAP": softcap > 0, "HAS_SCALES": k_scale is not None, "HAS_NUM_NODES": num_nodes is not None,
        "HAS_WINDOW": window > 0,
        "UPCAST": INTERPRET and q.dtype == torch.bfloat16,  # the interpreter multiplies the raw bits of bf16
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False,
    }  # fmt: skip
    launch(
        prefix_kernel, (triton.cdiv(rows, config.block_m), chunks, batch * heads_kv),
        q, k_cache, v_cache, k, v, depths, num_nodes, cache_seqlens, block_table, k_scale, v_scale, acc, m, norm,
        *q.stride()[:3], *cache_strides, *((*k.stride()[:3], *v.stride()[:3]) if k is not None else [0] * 6),
        depths.stride(0) if depths is not None and depths.dim() == 2 else 0, stride_table, stride_scale,
        *sizes, window, chunks, *scales, APPEND=k is not None, **common,
    )  # fmt: skip
    launch(
        tail_kernel, (size, triton.cdiv(group, config.block_m), batch * heads_kv),
        q, k_cache, v_cache, packed_mask, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale, out, lse,
        acc, m, norm,
        *q.stride()[:3], *cache_strides, packed_mask.stride(0) if packed_mask.dim() == 3 else 0, stride_table,
        *out.stride()[:3], stride_scale,
        *sizes, packed_mask.shape[-1], window, chunks, *scales,
        HAS_SINKS=sinks is not None, HAS_LSE=lse is not None, **common,
    )  # fmt: skip
