"""Tree attention over a KV cache: split-KV flash decoding whose last keys are the nodes of a tree.

A program owns BLOCK_M rows of one KV head and one share (split) of its keys. Rows are the tree's nodes times the
query heads of the group, row = node * GROUP + head, so that K and V are read once for the whole group. Keys come in
tiles: those of the committed prefix need no mask but for the last, partial one; those of the tree, at most 64 nodes a
tile, are masked by one word of packed bits a row. With more than one split a second kernel merges the partial results.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import launch as ordinary_launch

INTERPRET = triton.knobs.runtime.interpret
MERGE_ROWS = 8
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class TileConfig:
    """Sizes of one launch; a split takes at least `min_tiles` key tiles, so that short contexts use fewer splits."""

    block_m: int
    block_n: int
    num_splits: int
    min_tiles: int = 2
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _key_range(
    length, nodes, window, split, num_splits, min_tiles,
    HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Tiles are numbered along the cache, then along the tree. Returns the first tile that any row can see, the number
    of prefix tiles, this split's range of tiles, and how many splits have work."""
    prefix_tiles = tl.cdiv(length, BLOCK_N)
    first = prefix_tiles * 0
    if HAS_WINDOW:
        first = tl.minimum(tl.maximum(length - window + 1, 0) // BLOCK_N, prefix_tiles)
    total = prefix_tiles - first + tl.cdiv(nodes, BLOCK_T)
    each = tl.maximum(tl.cdiv(total, num_splits), min_tiles)
    lo = first + split * each
    hi = tl.minimum(lo + each, first + total)
    return first, prefix_tiles, lo, hi, tl.maximum(tl.cdiv(total, each), 1)


@triton.jit
def _lengths(cache_seqlens_ptr, num_nodes_ptr, batch, num_nodes, capacity, HAS_NUM_NODES: tl.constexpr):
    """Committed tokens and real nodes of a request, clamped so that no value reaches outside the cache."""
    nodes = num_nodes
    if HAS_NUM_NODES:
        nodes = tl.minimum(tl.maximum(tl.load(num_nodes_ptr + batch), 0), num_nodes)
    nodes = tl.minimum(nodes, capacity)
    length = tl.minimum(tl.maximum(tl.load(cache_seqlens_ptr + batch), 0), capacity - nodes)
    return tl.where(nodes > 0, length, 0), nodes


@triton.jit
def _row_starts(
    slots, batch, capacity, block_table_ptr, stride_table, num_blocks,
    stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """[N] int64 each: where the rows of these slots start in the K and in the V cache, paged with a BLOCK_SIZE."""
    if BLOCK_SIZE:
        slots = tl.minimum(slots, capacity - 1)
        block = tl.load(block_table_ptr + batch * stride_table + slots // BLOCK_SIZE)
        block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
        inside = (slots % BLOCK_SIZE).to(tl.int64)
    else:
        block = batch
        inside = slots.to(tl.int64)
    return block * stride_kb + inside * stride_ks, block * stride_vb + inside * stride_vs


@triton.jit
def _to_cache(x, scale, dtype: tl.constexpr, HAS_SCALES: tl.constexpr):
    if HAS_SCALES:  # fp8 has no infinity: saturate
        x = tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0)
    return x.to(dtype)


@triton.jit
def _tanh_of_scores(s, qk_scale, softcap, PRECISE: tl.constexpr):
    """What softcap multiplies: the tanh of scores over softcap, to 2e-7; if PRECISE, of itself."""
    capped = 1.0 - 2.0 / (tl.exp2(s * (qk_scale * 2.0 / softcap)) + 1.0)
    if PRECISE:  # that difference has few digits left near 0, where this is right to 1e-7
        x = s * (qk_scale / (softcap * LOG2E))
        z = x * x
        rest = ((0.0162739456 * z - 0.0525868908) * z + 0.133194208) * z - 0.333328903
        capped = tl.where(z < 0.3025, x + x * (z * rest), capped)
    return capped


@triton.jit
def _attend(
    q, k, v, acc, m, norm, mask, qk_scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax in base 2; `qk_scale` holds log2(e)."""
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    else:
        k, v = k.to(q.dtype), v.to(q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:  # the scale is outside, so that the max below stays the max
        s = _tanh_of_scores(s, qk_scale, softcap, q.dtype == tl.float32)
        qk_scale = softcap * LOG2E
    if MASKED:
        s = tl.where(mask, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    base = m_new
    if MASKED:  # a row that has seen no key yet
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * qk_scale - base[:, None])
    alpha = tl.exp2(m - base)
    norm = norm * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, norm


@triton.jit
def _finish(
    acc, m, norm, row_ok, row_real, out_at, lse_at, sinks_ptr, head, offs_d, dim_ok, v_scale,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    out_ptr, lse_ptr,
):  # fmt: skip
    """Normalise, add the sink to the denominator, write rows; rows of padding nodes are zero."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        shrink = tl.exp2(m - top)
        acc, norm, m = acc * shrink[:, None], norm * shrink + tl.exp2(sink - top), top
    real = row_real & (norm > 0.0)
    scale = v_scale / tl.where(real, norm, 1.0)
    out = tl.where(real[:, None], acc * scale[:, None], 0.0)
    # NaN sums fail `norm > 0`; a row of NaN is NaN, not zero.
    out = tl.where((row_real & (norm != norm))[:, None], float("nan"), out)
    tl.store(
        out_ptr + out_at[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & dim_ok[None, :],
    )  # fmt: skip
    if HAS_LSE:
        lse = tl.where(real, (m + tl.log2(tl.where(real, norm, 1.0))) * LN2, float("-inf"))
        tl.store(lse_ptr + lse_at, lse, mask=row_ok)


@triton.jit
def _merge_rows(
    first_row, batch, head_kv, active, nodes, partial_ptr, partial_lse_ptr, sinks_ptr, out_ptr, lse_ptr,
    stride_ob, stride_ot, stride_oh, num_nodes, heads_kv, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Merge and write BLOCK_R rows of one KV head."""
    rows = num_nodes * GROUP
    row = first_row + tl.arange(0, BLOCK_R)
    row_ok = row < rows
    node = row // GROUP
    head = head_kv * GROUP + row % GROUP
    row_real = node < nodes
    offs_d = tl.arange(0, BLOCK_D)
    dim_ok = offs_d < HEAD_DIM
    part = (batch * heads_kv + head_kv) * num_splits * rows + row
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    # SPLITS at once, unrolled, so that their loads are in flight together, and in a fixed order.
    for start in range(0, active, SPLITS):
        m_new = m
        for i in tl.static_range(SPLITS):
            ok = node < tl.where(start + i < active, nodes, 0)
            lse = tl.load(partial_lse_ptr + part + (start + i) * rows, mask=ok, other=float("-inf"))
            m_new = tl.maximum(m_new, lse)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - base)
        acc = acc * alpha[:, None]
        norm = norm * alpha
        m = m_new
        for i in tl.static_range(SPLITS):
            ok = node < tl.where(start + i < active, nodes, 0)
            at = part + (start + i) * rows
            lse = tl.load(partial_lse_ptr + at, mask=ok, other=float("-inf"))
            some = tl.load(
                partial_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=ok[:, None] & dim_ok[None, :], other=0.0,
            )  # fmt: skip
            weight = tl.exp2(lse - base)
            acc += some * weight[:, None]
            norm += weight
    out_at = batch * stride_ob + node * stride_ot + head * stride_oh
    lse_at = (batch * heads_kv * GROUP + head) * num_nodes + node
    _finish(acc, m, norm, row_ok, row_real, out_at, lse_at, sinks_ptr, head, offs_d, dim_ok, 1.0,
            HAS_SINKS, HAS_LSE, out_ptr, lse_ptr)  # fmt: skip


@triton.jit
def tree_attention_kernel(
    q_ptr,  # [B, T, H, D]
    k_ptr, v_ptr,  # cache: [B, S, Hkv, D] or [num_blocks, BLOCK_SIZE, Hkv, D]
    new_k_ptr, new_v_ptr,  # [B, T, Hkv, D], written to the tree's slots
    mask_ptr,  # [T, words] or [B, T, words] int64; bit j: the row's node attends to node j
    depths_ptr,  # [T] or [B, T] int32, read with a window only
    num_nodes_ptr,  # [B] int32
    cache_seqlens_ptr,  # [B] int32
    block_table_ptr,  # [B, max_blocks] int32
    sinks_ptr,  # [H]
    k_scale_ptr, v_scale_ptr,  # [1] or [Hkv] fp32
    out_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] fp32
    partial_ptr,  # [B, Hkv, num_splits, rows, D] fp32
    partial_lse_ptr,  # [B, Hkv, num_splits, rows] fp32, base 2
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_nkb, stride_nkt, stride_nkh,
    stride_nvb, stride_nvt, stride_nvh,
    stride_mb, stride_db, stride_table,
    stride_ob, stride_ot, stride_oh,
    stride_scale,
    num_nodes, heads_kv, capacity, num_blocks, words, window, num_splits, min_tiles,
    qk_scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, APPEND: tl.constexpr, HAS_NUM_NODES: tl.constexpr, HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_LSE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCK_T: tl.constexpr = BLOCK_N if BLOCK_N < 64 else 64  # a tree tile reads one mask word a row
    block_m = tl.program_id(0)
    split = tl.program_id(1)
    batch = (tl.program_id(2) // heads_kv).to(tl.int64)
    head_kv = tl.program_id(2) % heads_kv
    length, nodes = _lengths(cache_seqlens_ptr, num_nodes_ptr, batch, num_nodes, capacity, HAS_NUM_NODES)
    first, prefix_tiles, lo, hi, active = _key_range(
        length, nodes, window, split, num_splits, min_tiles, HAS_WINDOW, BLOCK_N, BLOCK_T
    )
    rows = num_nodes * GROUP
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    node = row // GROUP
    head = head_kv * GROUP + row % GROUP
    row_real = node < nodes
    offs_d = tl.arange(0, BLOCK_D)
    dim_ok = offs_d < HEAD_DIM
    out_at = batch * stride_ob + node * stride_ot + head * stride_oh
    lse_at = (batch * heads_kv * GROUP + head) * num_nodes + node

    if SPLIT and split >= active:
        return  # no keys left for this split: the merge knows

    q = tl.load(
        q_ptr + (batch * stride_qb + node * stride_qt + head * stride_qh)[:, None] + offs_d[None, :],
        mask=row_real[:, None] & dim_ok[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    v_scale = 1.0
    k_scale = 1.0
    if HAS_SCALES:
        k_scale = tl.load(k_scale_ptr + head_kv * stride_scale)
        v_scale = tl.load(v_scale_ptr + head_kv * stride_scale)
        qk_scale *= k_scale
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_base = k_ptr + head_kv * stride_kh + offs_d[None, :]
    v_base = v_ptr + head_kv * stride_vh + offs_d[None, :]
    new_k_base = None
    new_v_base = None
    if APPEND:
        new_k_base = new_k_ptr + head_kv * stride_nkh + offs_d[None, :]
        new_v_base = new_v_ptr + head_kv * stride_nvh + offs_d[None, :]
    depth = node * 0
    if HAS_WINDOW:
        depth = tl.load(depths_ptr + batch * stride_db + node, mask=row_real, other=0)

    # Committed tokens. Whole tiles that every row sees need no mask: [open, whole).
    offs_n = tl.arange(0, BLOCK_N)
    open_tile = first
    if HAS_WINDOW:  # the deepest node's window starts last; nodes bound depths
        open_tile = tl.cdiv(tl.maximum(length + nodes - window, 0), BLOCK_N)
    whole = length // BLOCK_N
    if HAS_WINDOW:
        for tile in range(lo, tl.minimum(tl.minimum(open_tile, whole), hi)):
            slots = tile * BLOCK_N + offs_n
            at_k, at_v = _row_starts(slots, batch, capacity, block_table_ptr, stride_table, num_blocks,
                                     stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE)  # fmt: skip
            k = tl.load(k_base + at_k[:, None], mask=dim_ok[None, :], other=0.0)
            v = tl.load(v_base + at_v[:, None], mask=dim_ok[None, :], other=0.0)
            seen = slots[None, :] > (length + depth - window)[:, None]
            acc, m, norm = _attend(q, k, v, acc, m, norm, seen, qk_scale, softcap, True, SOFTCAP, UPCAST, PRECISION)
    for tile in range(tl.maximum(lo, open_tile), tl.minimum(whole, hi)):
        slots = tile * BLOCK_N + offs_n
        at_k, at_v = _row_starts(slots, batch, capacity, block_table_ptr, stride_table, num_blocks,
                                 stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE)  # fmt: skip
        k = tl.load(k_base + at_k[:, None], mask=dim_ok[None, :], other=0.0)
        v = tl.load(v_base + at_v[:, None], mask=dim_ok[None, :], other=0.0)
        acc, m, norm = _attend(q, k, v, acc, m, norm, None, qk_scale, softcap, False, SOFTCAP, UPCAST, PRECISION)
    if (whole < prefix_tiles) & (lo <= whole) & (whole < hi):
        slots = whole * BLOCK_N + offs_n
        slot_ok = slots < length
        at_k, at_v = _row_starts(slots, batch, capacity, block_table_ptr, stride_table, num_blocks,
                                 stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE)  # fmt: skip
        k = tl.load(k_base + at_k[:, None], mask=slot_ok[:, None] & dim_ok[None, :], other=0.0)
        v = tl.load(v_base + at_v[:, None], mask=slot_ok[:, None] & dim_ok[None, :], other=0.0)
        seen = slot_ok[None, :] & row_ok[:, None]
        if HAS_WINDOW:
            seen &= slots[None, :] > (length + depth - window)[:, None]
        acc, m, norm = _attend(q, k, v, acc, m, norm, seen, qk_scale, softcap, True, SOFTCAP, UPCAST, PRECISION)

    # The tree's nodes, node j at slot length + j.
    offs_t = tl.arange(0, BLOCK_T)
    for tile in range(tl.maximum(lo, prefix_tiles), hi):
        start = (tile - prefix_tiles) * BLOCK_T
        column = start + offs_t
        column_ok = column < nodes
        kv_ok = column_ok[:, None] & dim_ok[None, :]
        if APPEND:
            at_k, at_v = batch * stride_nkb + column * stride_nkt, batch * stride_nvb + column * stride_nvt
            k = tl.load(new_k_base + at_k[:, None], mask=kv_ok, other=0.0)
            v = tl.load(new_v_base + at_v[:, None], mask=kv_ok, other=0.0)
            # What is attended to is what the cache will hold.
            k = _to_cache(k, k_scale, k_ptr.dtype.element_ty, HAS_SCALES)
            v = _to_cache(v, v_scale, v_ptr.dtype.element_ty, HAS_SCALES)
        else:
            at_k, at_v = _row_starts(length + column, batch, capacity, block_table_ptr, stride_table, num_blocks,
                                     stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE)  # fmt: skip
            k = tl.load(k_base + at_k[:, None], mask=kv_ok, other=0.0)
            v = tl.load(v_base + at_v[:, None], mask=kv_ok, other=0.0)
        word = tl.load(mask_ptr + batch * stride_mb + node * words + start // 64, mask=row_real, other=0)
        seen = ((word[:, None] >> (column % 64).to(tl.int64)[None, :]) & 1) != 0
        seen &= column_ok[None, :]
        if HAS_WINDOW:
            column_depth = tl.load(depths_ptr + batch * stride_db + column, mask=column_ok, other=0)
            seen &= column_depth[None, :] > (depth - window)[:, None]
        acc, m, norm = _attend(q, k, v, acc, m, norm, seen, qk_scale, softcap, True, SOFTCAP, UPCAST, PRECISION)

    # The copy into the cache has a loop of its own: with its stores in the loop above, K and V feeding both a store and
    # a pipelined wgmma, Triton 3.6 computed wrong results on Hopper.
    if APPEND and block_m == 0:
        for tile in range(tl.maximum(lo, prefix_tiles), hi):
            column = (tile - prefix_tiles) * BLOCK_T + offs_t
            kv_ok = (column < nodes)[:, None] & dim_ok[None, :]
            at_new_k, at_new_v = batch * stride_nkb + column * stride_nkt, batch * stride_nvb + column * stride_nvt
            k = tl.load(new_k_base + at_new_k[:, None], mask=kv_ok, other=0.0)
            v = tl.load(new_v_base + at_new_v[:, None], mask=kv_ok, other=0.0)
            at_k, at_v = _row_starts(length + column, batch, capacity, block_table_ptr, stride_table, num_blocks,
                                     stride_kb, stride_ks, stride_vb, stride_vs, BLOCK_SIZE)  # fmt: skip
            tl.store(k_base + at_k[:, None], _to_cache(k, k_scale, k_ptr.dtype.element_ty, HAS_SCALES), mask=kv_ok)
            tl.store(v_base + at_v[:, None], _to_cache(v, v_scale, v_ptr.dtype.element_ty, HAS_SCALES), mask=kv_ok)

    if not SPLIT:
        _finish(acc, m, norm, row_ok, row_real, out_at, lse_at, sinks_ptr, head, offs_d, dim_ok, v_scale,
                HAS_SINKS, HAS_LSE, out_ptr, lse_ptr)  # fmt: skip
    else:
        seen_any = norm > 0.0
        part = ((batch * heads_kv + head_kv) * num_splits + split) * rows + row
        acc = acc * (v_scale / tl.where(seen_any, norm, 1.0))[:, None]
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=row_ok[:, None] & dim_ok[None, :])
        lse = tl.where(
            seen_any, m + tl.log2(tl.where(seen_any, norm, 1.0)), tl.where(norm != norm, norm, float("-inf"))
        )
        tl.store(partial_lse_ptr + part, lse, mask=row_ok)


@triton.jit
def merge_kernel(
    partial_ptr, partial_lse_ptr, num_nodes_ptr, cache_seqlens_ptr, sinks_ptr, out_ptr, lse_ptr,
    stride_ob, stride_ot, stride_oh,
    num_nodes, heads_kv, capacity, window, num_splits, min_tiles,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    HAS_NUM_NODES: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Merge the splits' partial results."""
    BLOCK_T: tl.constexpr = BLOCK_N if BLOCK_N < 64 else 64
    batch = (tl.program_id(1) // heads_kv).to(tl.int64)
    head_kv = tl.program_id(1) % heads_kv
    length, nodes = _lengths(cache_seqlens_ptr, num_nodes_ptr, batch, num_nodes, capacity, HAS_NUM_NODES)
    _, _, _, _, active = _key_range(length, nodes, window, 0, num_splits, min_tiles, HAS_WINDOW, BLOCK_N, BLOCK_T)
    _merge_rows(
        tl.program_id(0) * BLOCK_R, batch, head_kv, active, nodes,
        partial_ptr, partial_lse_ptr, sinks_ptr, out_ptr, lse_ptr,
        stride_ob, stride_ot, stride_oh, num_nodes, heads_kv, num_splits,
        GROUP, HEAD_DIM, BLOCK_D, BLOCK_R, SPLITS, HAS_SINKS, HAS_LSE,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def tile_config(
    rows: int, head_dim: int, heads: int, capacity: int, itemsize: int, num_sms: int, arch: int
) -> TileConfig:  # fmt: skip
    """Tiles for `rows` = nodes * group rows of each of `heads` = batch * KV heads, over `capacity` slots, on a
    GPU of compute capability `arch` (90: 9.0).

    Measured on an H100, bf16, head dim 128 (benchmarks/LOG.md): 64 rows and 4 warps, or 128 rows and 8 warps where the
    KV head has more rows than 64, each with 64 keys and 3 stages, beat 32 and 128 keys, and 2 and 4 stages.
    """
    block_n, num_stages = (64, 3) if head_dim <= 128 else (32, 3)
    wgmma = arch >= 90
    tiles = triton.cdiv(capacity, block_n)
    block_m = min(max(16, triton.next_power_of_2(rows)), 64 if wgmma or head_dim <= 128 else 32)
    # 128 rows read K and V half as often, but halve the programs: not where a short context leaves too few to fill the
    # card at four tiles each (1024 slots, 8 KV heads, 256 rows: 13.5 us against 15).
    if rows > 64 and head_dim <= 128 and triton.cdiv(rows, 64) * heads * (tiles // 4) > num_sms:
        block_m = 128
    if itemsize == 4:  # three tf32 products for one in fp32, from registers
        block_m, block_n, num_stages = 16, 16 if head_dim > 128 else 32, 2
        tiles = triton.cdiv(capacity, block_n)

    # Splits: whole waves of one program a multiprocessor. Beside its tiles a program costs about two more, and the
    # merge about six.
    programs = triton.cdiv(rows, block_m) * heads

    def cost(splits):
        return triton.cdiv(programs * splits, num_sms) * (triton.cdiv(tiles, splits) + 2) + (6 if splits > 1 else 0)

    num_splits = min(range(1, min(max(1, tiles // 2), 128) + 1), key=cost)
    # Without wgmma the operands wait in registers, and four warps spill from 64 rows on; so they do at head dim 256.
    num_warps = 8 if block_m > 64 or head_dim > 128 or (block_m == 64 and not wgmma) else 4
    return TileConfig(block_m, block_n, num_splits, 2, num_warps, num_stages)


def allocate_partial(q, heads_kv, num_splits):
    """Room for the splits' results and their LSE, in one piece, None and None without splits."""
    if num_splits == 1:
        return None, None
    batch, size, heads, head_dim = q.shape
    shape = batch * heads_kv, num_splits, size * (heads // heads_kv)
    rows = math.prod(shape)
    work = torch.empty(rows * (head_dim + 1), dtype=torch.float32, device=q.device)
    return work[: rows * head_dim].view(*shape, head_dim), work[rows * head_dim :].view(shape)


def merge(
    partial, partial_lse, num_nodes, cache_seqlens, sinks, out, lse, heads_kv, capacity, window, num_splits, min_tiles,
    block_n, launch,
):  # fmt: skip
    """Launch the merge; `block_n`, `num_splits`, `min_tiles` and `window` say how the keys were split."""
    batch, size, heads, head_dim = out.shape
    launch(
        merge_kernel, (triton.cdiv(partial.shape[2], MERGE_ROWS), batch * heads_kv),
        partial, partial_lse, num_nodes, cache_seqlens, sinks, out, lse,
        out.stride(0), out.stride(1), out.stride(2),
        size, heads_kv, capacity, window, num_splits, min_tiles,
        GROUP=heads // heads_kv, HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_R=MERGE_ROWS, BLOCK_N=block_n, SPLITS=min(8, triton.next_power_of_2(num_splits)),
        HAS_NUM_NODES=num_nodes is not None, HAS_WINDOW=window > 0, HAS_SINKS=sinks is not None,
        HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip


def tree_attention(
    q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale,
    softmax_scale, window, softcap, out, lse, config, launch=ordinary_launch,
):  # fmt: skip
    """Launch on checked arguments: [B, T, H, D] `q` and `out`, caches, and for what is optional None (window 0)."""
    batch, size, heads, head_dim = q.shape
    heads_kv = k_cache.shape[2]
    group, rows = heads // heads_kv, size * (heads // heads_kv)
    paged = block_table is not None
    capacity = block_table.shape[1] * k_cache.shape[1] if paged else k_cache.shape[1]
    row_blocks = triton.cdiv(rows, config.block_m)
    partial, partial_lse = allocate_partial(q, heads_kv, config.num_splits)
    per_request = packed_mask.dim() == 3
    upcast = INTERPRET and q.dtype == torch.bfloat16  # the interpreter multiplies the raw bits of bf16
    launch(
        tree_attention_kernel, (row_blocks, config.num_splits, batch * heads_kv),
        q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale,
        out, lse, partial, partial_lse,
        q.stride(0), q.stride(1), q.stride(2),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        *((k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2)) if k is not None else [0] * 6),
        packed_mask.stride(0) if per_request else 0,
        depths.stride(0) if depths is not None and depths.dim() == 2 else 0,
        block_table.stride(0) if paged else 0,
        out.stride(0), out.stride(1), out.stride(2),
        1 if k_scale is not None and k_scale.numel() > 1 else 0,
        size, heads_kv, capacity, k_cache.shape[0], packed_mask.shape[-1], window, config.num_splits,
        config.min_tiles, softmax_scale * 1.4426950408889634, softcap,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=partial is not None,
        BLOCK_SIZE=k_cache.shape[1] if paged else 0, APPEND=k is not None,
        SOFTCAP=softcap > 0, HAS_SCALES=k_scale is not None, UPCAST=upcast,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
        HAS_NUM_NODES=num_nodes is not None, HAS_WINDOW=window > 0, HAS_SINKS=sinks is not None,
        HAS_LSE=lse is not None,
    )  # fmt: skip
    if partial is not None:
        merge(
            partial, partial_lse, num_nodes, cache_seqlens, sinks, out, lse, heads_kv, capacity, window,
            config.num_splits, config.min_tiles, config.block_n, launch,
        )  # fmt: skip
