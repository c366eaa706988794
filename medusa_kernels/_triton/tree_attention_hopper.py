"""Tree attention for Hopper (compute capability 9.0) in Triton's Gluon dialect; semantics of `tree_attention.py`.

Shaped like FlashAttention-3 (arXiv 2407.08608). A block owns two tiles of 64 rows, each a warpgroup's, that
share a ring of K and V tiles filled by a third warpgroup: whole tiles of the committed prefix by TMA, the partial one
and the tree's by masked cp.async, which puts zeros where the cache may hold anything. A warpgroup issues the matmul of
the next scores and that of this tile's probabilities with V together, and does the softmax while the second runs.
"""

from functools import lru_cache
from functools import partial as partial_of

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import tree_attention as plain
from .launch import OfAddress
from .launch import launch as ordinary_launch

_lengths = gluon.jit(plain._lengths.fn)
_key_range = gluon.jit(plain._key_range.fn)
_finish = gluon.jit(plain._finish.fn)
_ROWS = gl.constexpr(64)  # of a warpgroup
_TREE = gl.constexpr(64)  # nodes of a tree tile: one mask word a row
BLOCK_M, BLOCK_N, NUM_STAGES = 128, 64, 4  # beat 128 keys in 2 stages, and the two warpgroups taking turns
# A thread's, of 64 Ki a multiprocessor: at entry, then a consumer's and a producer's.
_ENTRY_REGISTERS = 168
_CONSUMER_REGISTERS = gl.constexpr(232)
_PRODUCER_REGISTERS = gl.constexpr(40)
_FIRST = gl.constexpr(0)  # tile of rows
_SECOND = gl.constexpr(1)


@gluon.jit
def _work(
    index, cache_seqlens_ptr, num_nodes_ptr, num_nodes, heads_kv, capacity, num_splits, min_tiles, blocks_m,
    HAS_NUM_NODES: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What a program does: rows, KV head and tiles [lo, hi), of which those below `whole` are unmasked."""
    block_m = index % blocks_m
    rest = index // blocks_m
    split = rest % num_splits
    rest = rest // num_splits
    batch = (rest // heads_kv).to(gl.int64)
    head_kv = rest % heads_kv
    length, nodes = _lengths(cache_seqlens_ptr, num_nodes_ptr, batch, num_nodes, capacity, HAS_NUM_NODES)
    _first, prefix_tiles, lo, hi, _active = _key_range(
        length, nodes, 0, split, num_splits, min_tiles, False, BLOCK_N, _TREE
    )
    return block_m, split, batch, head_kv, length, nodes, prefix_tiles, lo, hi


@gluon.jit
def _pages(table, slot, block_size, num_blocks, PAGED: gl.constexpr, BOX: gl.constexpr, COPIES: gl.constexpr):
    """First coordinate of each copy of a tile, loaded before the wait for its buffer."""
    pages = ()
    if PAGED:
        for i in gl.static_range(COPIES):
            page = gl.load(table + (slot + i * BOX) // block_size)
            pages = pages + (gl.minimum(gl.maximum(page, 0), num_blocks - 1),)
    return pages


@gluon.jit
def _copy_tile(
    desc, boxes, full, ring, pages, batch, head_kv, slot, block_size,
    PAGED: gl.constexpr, BOX: gl.constexpr, COPIES: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """A tile lies as [HEAD_DIM / 64, BLOCK_N] rows of 128 bytes, so a box of any page size has its place in it."""
    mbarrier.expect(full, COPIES * BOX * HEAD_DIM * 2)
    for i in gl.static_range(COPIES):
        block = batch.to(gl.int32)
        inside = slot + i * BOX
        if PAGED:
            block = pages[i]
            inside = inside % block_size
        for half in gl.static_range(HEAD_DIM // 64):
            to = boxes.index((ring * (HEAD_DIM // 64) + half) * COPIES + i)
            tma.async_copy_global_to_shared(desc, [block, head_kv, inside, half * 64], full, to)


@gluon.jit
def _chunk(
    i, cache_ptr, stride_b, stride_s, batch, pages, start, block_size, offs_n, offs_d, PAGED: gl.constexpr,
):  # fmt: skip
    """Pointers to 16 rows of the cache."""
    slots = start + i * 16 + offs_n
    if PAGED:
        at = pages[i].to(gl.int64) * stride_b + (slots % block_size).to(gl.int64) * stride_s
    else:
        at = batch * stride_b + slots.to(gl.int64) * stride_s
    return cache_ptr + at[:, None] + offs_d


@gluon.jit
def _fill_tile(
    chunks, full, ring, cache_ptr, stride_b, stride_s, new_ptr, stride_nt, in_tree, store,
    batch, pages, start, limit, block_size, offs_n, offs_d,
    PAGED: gl.constexpr, APPEND: gl.constexpr, CHUNKS: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Rows below `limit` from the cache, or for a tree's tile from `new_ptr`, and to the cache; zeros above."""
    for i in gl.static_range(CHUNKS):
        column = i * 16 + offs_n
        source = _chunk(i, cache_ptr, stride_b, stride_s, batch, pages, start, block_size, offs_n, offs_d, PAGED)
        if APPEND:
            source = gl.where(in_tree, new_ptr + (column * stride_nt)[:, None] + offs_d, source)
        for half in gl.static_range(HEAD_DIM // 64):
            to = chunks.index((ring * (HEAD_DIM // 64) + half) * CHUNKS + i)
            async_copy.async_copy_global_to_shared(to, source + half * 64, mask=(column < limit)[:, None])
    async_copy.mbarrier_arrive(full)
    gl.thread_barrier()  # every thread's copies are pending on the barrier before it may complete
    mbarrier.arrive(full, count=1)
    if APPEND:
        if in_tree & store:
            for i in gl.static_range(4):
                column = i * 16 + offs_n
                at = _chunk(i, cache_ptr, stride_b, stride_s, batch, pages, start, block_size, offs_n, offs_d, PAGED)
                source = new_ptr + (column * stride_nt)[:, None] + offs_d
                ok = (column < limit)[:, None]
                for half in gl.static_range(HEAD_DIM // 64):
                    gl.store(at + half * 64, gl.load(source + half * 64, mask=ok, other=0.0), mask=ok)


@gluon.jit
def _producer(
    k_desc, v_desc, k_ptr, v_ptr, new_k_ptr, new_v_ptr, block_table_ptr, rings, strides, cache, plan,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
    PAGED: gl.constexpr, APPEND: gl.constexpr, HAS_NUM_NODES: gl.constexpr,
):  # fmt: skip
    k_bufs, v_bufs, k_full, v_full, k_empty, v_empty = rings
    (stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
     stride_nkb, stride_nkh, stride_nkt, stride_nvb, stride_nvh, stride_nvt, stride_table) = strides  # fmt: skip
    capacity, num_blocks, block_size = cache
    cache_seqlens_ptr, num_nodes_ptr, num_nodes, heads_kv, num_splits, min_tiles, blocks_m, total = plan
    COPIES: gl.constexpr = BLOCK_N // BOX
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    box_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    k_boxes = k_bufs._reinterpret(dtype, [STAGES * (HEAD_DIM // 64) * COPIES, 1, 1, BOX, 64], box_layout)
    v_boxes = v_bufs._reinterpret(dtype, [STAGES * (HEAD_DIM // 64) * COPIES, 1, 1, BOX, 64], box_layout)
    # Masked tiles go by chunks of 16 rows and 64 dims, 16 bytes a thread: the producer has few registers.
    CHUNKS: gl.constexpr = BLOCK_N // 16
    chunk_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_chunks = k_bufs._reinterpret(dtype, [STAGES * (HEAD_DIM // 64) * CHUNKS, 16, 64], chunk_layout)
    v_chunks = v_bufs._reinterpret(dtype, [STAGES * (HEAD_DIM // 64) * CHUNKS, 16, 64], chunk_layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offs_n = gl.arange(0, 16, gl.SliceLayout(1, layout))
    offs_d = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    done = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        block_m, _split, batch, head_kv, length, nodes, prefix_tiles, lo, hi = _work(
            index, cache_seqlens_ptr, num_nodes_ptr, num_nodes, heads_kv, capacity, num_splits, min_tiles, blocks_m,
            HAS_NUM_NODES, BLOCK_N,
        )  # fmt: skip
        whole = gl.minimum(length // BLOCK_N, hi)
        table = block_table_ptr
        if PAGED:
            table = block_table_ptr + batch * stride_table
        for tile in range(lo, whole):
            ring = done % STAGES
            phase = (done // STAGES) & 1
            slot = tile * BLOCK_N
            pages = _pages(table, slot, block_size, num_blocks, PAGED, BOX, COPIES)
            mbarrier.wait(k_empty.index(ring), phase ^ 1)
            _copy_tile(k_desc, k_boxes, k_full.index(ring), ring, pages, batch, head_kv, slot, block_size,
                       PAGED, BOX, COPIES, HEAD_DIM)  # fmt: skip
            mbarrier.wait(v_empty.index(ring), phase ^ 1)
            _copy_tile(v_desc, v_boxes, v_full.index(ring), ring, pages, batch, head_kv, slot, block_size,
                       PAGED, BOX, COPIES, HEAD_DIM)  # fmt: skip
            done += 1
        for tile in range(gl.maximum(lo, whole), hi):
            ring = done % STAGES
            phase = (done // STAGES) & 1
            in_tree = tile >= prefix_tiles
            node = (tile - prefix_tiles) * _TREE  # the first, in the tree
            start = gl.where(in_tree, length + node, tile * BLOCK_N)
            limit = gl.where(in_tree, gl.minimum(nodes - node, _TREE), length - start)
            pages = ()
            if PAGED:
                for i in gl.static_range(CHUNKS):
                    slots = gl.minimum(start + i * 16 + offs_n, capacity - 1)
                    page = gl.load(table + slots // block_size)
                    pages = pages + (gl.minimum(gl.maximum(page, 0), num_blocks - 1),)
            new_k, new_v = k_ptr, v_ptr
            if APPEND:
                new_k = new_k_ptr + batch * stride_nkb + head_kv * stride_nkh + node * stride_nkt
                new_v = new_v_ptr + batch * stride_nvb + head_kv * stride_nvh + node * stride_nvt
            store = block_m == 0
            mbarrier.wait(k_empty.index(ring), phase ^ 1)
            _fill_tile(k_chunks, k_full.index(ring), ring, k_ptr + head_kv * stride_kh, stride_kb, stride_ks,
                       new_k, stride_nkt, in_tree, store, batch, pages, start, limit, block_size, offs_n, offs_d,
                       PAGED, APPEND, CHUNKS, HEAD_DIM)  # fmt: skip
            mbarrier.wait(v_empty.index(ring), phase ^ 1)
            _fill_tile(v_chunks, v_full.index(ring), ring, v_ptr + head_kv * stride_vh, stride_vb, stride_vs,
                       new_v, stride_nvt, in_tree, store, batch, pages, start, limit, block_size, offs_n, offs_d,
                       PAGED, APPEND, CHUNKS, HEAD_DIM)  # fmt: skip
            done += 1


@gluon.jit
def _softmax(s, m, denom, qk_scale, MASKED: gl.constexpr):
    """One step of the online softmax in base 2: probabilities, running maximum and sum, and what shrinks the past."""
    m_new = gl.maximum(m, gl.max(s, 1) * qk_scale)
    base = m_new
    if MASKED:  # a row that has seen no key yet
        base = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * qk_scale - base[:, None])
    alpha = gl.exp2(m - base)
    return p, m_new, denom * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _mask_word(tile, prefix_tiles, mask_row, row_real):
    """[64] int64: the rows' packed mask in a tree tile, all ones in one of the prefix."""
    in_tree = tile >= prefix_tiles
    return gl.load(mask_row + gl.where(in_tree, tile - prefix_tiles, 0), mask=row_real & in_tree, other=-1)


@gluon.jit
def _hide(s, word, tile, prefix_tiles, length, nodes, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Scores of a masked tile, -inf where a row does not attend to a key."""
    in_tree = tile >= prefix_tiles
    limit = gl.where(in_tree, gl.minimum(nodes - (tile - prefix_tiles) * _TREE, _TREE), length - tile * BLOCK_N)
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    bit = (word[:, None] >> (column % 64).to(gl.int64)[None, :]) & 1
    return gl.where((column < limit)[None, :] & (bit != 0), s, float("-inf"))


@gluon.jit
def _consumer(
    q_ptr, mask_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, q_buf, rings, strides,
    words, capacity, plan, qk_scale, part: gl.constexpr,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, HAS_NUM_NODES: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    k_bufs, v_bufs, k_full, v_full, k_empty, v_empty = rings
    stride_qb, stride_qt, stride_qh, stride_mb, stride_ob, stride_ot, stride_oh = strides
    cache_seqlens_ptr, num_nodes_ptr, num_nodes, heads_kv, num_splits, min_tiles, blocks_m, total = plan
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    lanes: gl.constexpr = HEAD_DIM // 8
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    rows = num_nodes * GROUP
    done = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        block_m, split, batch, head_kv, length, nodes, prefix_tiles, lo, hi = _work(
            index, cache_seqlens_ptr, num_nodes_ptr, num_nodes, heads_kv, capacity, num_splits, min_tiles, blocks_m,
            HAS_NUM_NODES, BLOCK_N,
        )  # fmt: skip
        whole = gl.minimum(length // BLOCK_N, hi)
        first_row = block_m * BLOCK_M + part * _ROWS
        acc = gl.zeros([_ROWS, HEAD_DIM], gl.float32, o_layout)
        m = gl.full([_ROWS], float("-inf"), gl.float32, s_rows)
        denom = gl.zeros([_ROWS], gl.float32, s_rows)
        if lo < hi:
            row = first_row + gl.arange(0, _ROWS, gl.SliceLayout(1, q_layout))
            offs_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, q_layout))
            q_at = batch * stride_qb + (row // GROUP) * stride_qt + (head_kv * GROUP + row % GROUP) * stride_qh
            q = gl.load(q_ptr + q_at[:, None] + offs_d[None, :], mask=(row // GROUP < nodes)[:, None], other=0.0)
            q_buf.store(q)
            fence_async_shared()
            gl.thread_barrier()
            node = (first_row + gl.arange(0, _ROWS, s_rows)) // GROUP
            row_real = node < nodes
            mask_row = mask_ptr + batch * stride_mb + node * words

            # The first scores have no earlier probabilities to hide behind.
            ring = done % STAGES
            mbarrier.wait(k_full.index(ring), (done // STAGES) & 1)
            if lo >= whole:  # filled by cp.async
                fence_async_shared()
            s = gl.zeros([_ROWS, BLOCK_N], gl.float32, s_layout)
            s = warpgroup_mma(q_buf, k_bufs.index(ring).permute((1, 0)), s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            gl.thread_barrier()
            mbarrier.arrive(k_empty.index(ring), count=1)
            if lo >= whole:
                word = _mask_word(lo, prefix_tiles, mask_row, row_real)
                s = _hide(s, word, lo, prefix_tiles, length, nodes, BLOCK_N, s_layout)
            p, m, denom, alpha = _softmax(s, m, denom, qk_scale, True)
            p = gl.convert_layout(p.to(dtype), p_layout)

            # Waiting for the next K before the wait for the matmul with V keeps the softmax above the latter: the
            # assembler moves that wait up as far as the last loop.
            ring = (done + 1) % STAGES
            phase = ((done + 1) // STAGES) & 1
            mbarrier.wait(k_full.index(ring), phase, pred=lo + 1 < hi)
            for tile in range(lo + 1, whole):
                ring_v = done % STAGES
                phase_v = (done // STAGES) & 1
                done += 1
                s = gl.zeros([_ROWS, BLOCK_N], gl.float32, s_layout)
                s = warpgroup_mma(q_buf, k_bufs.index(ring).permute((1, 0)), s, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(ring_v), phase_v)
                o = warpgroup_mma(p, v_bufs.index(ring_v), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                gl.thread_barrier()
                mbarrier.arrive(k_empty.index(ring), count=1)
                p_next, m, denom, alpha = _softmax(s, m, denom, qk_scale, False)
                ring = (done + 1) % STAGES
                phase = ((done + 1) // STAGES) & 1
                mbarrier.wait(k_full.index(ring), phase, pred=tile + 1 < hi)
                acc, p = warpgroup_mma_wait(0, deps=[o, p])
                gl.thread_barrier()
                mbarrier.arrive(v_empty.index(ring_v), count=1)
                acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
                p = gl.convert_layout(p_next.to(dtype), p_layout)

            for tile in range(gl.maximum(lo + 1, whole), hi):
                ring_v = done % STAGES
                phase_v = (done // STAGES) & 1
                done += 1
                word = _mask_word(tile, prefix_tiles, mask_row, row_real)
                mbarrier.wait(v_full.index(ring_v), phase_v)
                fence_async_shared()
                s = gl.zeros([_ROWS, BLOCK_N], gl.float32, s_layout)
                s = warpgroup_mma(q_buf, k_bufs.index(ring).permute((1, 0)), s, use_acc=False, is_async=True)
                o = warpgroup_mma(p, v_bufs.index(ring_v), acc, is_async=True)
                s, acc, p = warpgroup_mma_wait(0, deps=[s, o, p])
                gl.thread_barrier()
                mbarrier.arrive(k_empty.index(ring), count=1)
                mbarrier.arrive(v_empty.index(ring_v), count=1)
                s = _hide(s, word, tile, prefix_tiles, length, nodes, BLOCK_N, s_layout)
                p_next, m, denom, alpha = _softmax(s, m, denom, qk_scale, True)
                ring = (done + 1) % STAGES
                phase = ((done + 1) // STAGES) & 1
                mbarrier.wait(k_full.index(ring), phase, pred=tile + 1 < hi)
                acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
                p = gl.convert_layout(p_next.to(dtype), p_layout)

            ring_v = done % STAGES
            mbarrier.wait(v_full.index(ring_v), (done // STAGES) & 1)
            if hi > whole:
                fence_async_shared()
            o = warpgroup_mma(p, v_bufs.index(ring_v), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=[o, p])
            gl.thread_barrier()
            mbarrier.arrive(v_empty.index(ring_v), count=1)
            done += 1

        row = first_row + gl.arange(0, _ROWS, o_rows)
        row_ok = row < rows
        node = row // GROUP
        head = head_kv * GROUP + row % GROUP
        offs_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))
        m_row = gl.convert_layout(m, o_rows)
        denom_row = gl.convert_layout(denom, o_rows)
        if SPLIT:
            if lo < hi:  # else the merge knows that this split has no keys
                some = denom_row > 0.0
                at = ((batch * heads_kv + head_kv) * num_splits + split) * rows + row
                acc = acc * (1.0 / gl.where(some, denom_row, 1.0))[:, None]
                gl.store(partial_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=row_ok[:, None])
                lse = gl.where(
                    some,
                    m_row + gl.log2(gl.where(some, denom_row, 1.0)),
                    gl.where(denom_row != denom_row, denom_row, float("-inf")),
                )
                gl.store(partial_lse_ptr + at, lse, mask=row_ok)
        else:
            out_at = batch * stride_ob + node * stride_ot + head * stride_oh
            lse_at = (batch * heads_kv * GROUP + head) * num_nodes + node
            _finish(acc, m_row, denom_row, row_ok, node < nodes, out_at, lse_at, None, head, offs_d, offs_d < HEAD_DIM,
                    1.0, False, HAS_LSE, out_ptr, lse_ptr)  # fmt: skip


# Left unspecialised, so that a size of 1 or one divisible by 16 is no variant of its own; strides need the latter.
@gluon.jit(do_not_specialize=(
    "num_nodes", "heads_kv", "capacity", "num_blocks", "block_size", "words", "num_splits", "min_tiles", "blocks_m",
    "total", "stride_mb", "stride_table",
))  # fmt: skip
def tree_attention_hopper_kernel(
    k_desc, v_desc,  # the caches as [blocks, Hkv, slots, D], boxes of [1, 1, BOX, 64]
    q_ptr, k_ptr, v_ptr, new_k_ptr, new_v_ptr, mask_ptr, num_nodes_ptr, cache_seqlens_ptr, block_table_ptr,
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,  # as in tree_attention_kernel
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_nkb, stride_nkh, stride_nkt, stride_nvb, stride_nvh, stride_nvt,
    stride_mb, stride_table, stride_ob, stride_ot, stride_oh,
    num_nodes, heads_kv, capacity, num_blocks, block_size, words, num_splits, min_tiles, blocks_m, total, qk_scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr, PAGED: gl.constexpr, APPEND: gl.constexpr,
    HAS_NUM_NODES: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_bufs = gl.allocate_shared_memory(dtype, [2, _ROWS, HEAD_DIM], tile_layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    rings = (k_bufs, v_bufs, k_full, v_full, k_empty, v_empty)
    plan = (cache_seqlens_ptr, num_nodes_ptr, num_nodes, heads_kv, num_splits, min_tiles, blocks_m, total)
    cache = (capacity, num_blocks, block_size)
    strides = (stride_qb, stride_qt, stride_qh, stride_mb, stride_ob, stride_ot, stride_oh)
    cache_strides = (
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
        stride_nkb, stride_nkh, stride_nkt, stride_nvb, stride_nvh, stride_nvt, stride_table,
    )  # fmt: skip
    # Constants go in at the call: a tuple kept in a variable would turn them into run-time values.
    gl.warp_specialize(
        [
            (_consumer, (
                q_ptr, mask_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, q_bufs.index(0), rings, strides,
                words, capacity, plan, qk_scale,
                _FIRST, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, SPLIT, HAS_NUM_NODES, HAS_LSE,
            )),
            (_consumer, (
                q_ptr, mask_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, q_bufs.index(1), rings, strides,
                words, capacity, plan, qk_scale,
                _SECOND, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, SPLIT, HAS_NUM_NODES, HAS_LSE,
            )),
            (_producer, (
                k_desc, v_desc, k_ptr, v_ptr, new_k_ptr, new_v_ptr, block_table_ptr, rings, cache_strides,
                cache, plan, HEAD_DIM, BLOCK_N, BOX, STAGES, PAGED, APPEND, HAS_NUM_NODES,
            )),
        ],
        [4, 4], [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )  # fmt: skip


class _Base:
    """What a descriptor needs of its tensor, so that the cache of descriptors keeps no cache of K and V alive."""

    def __init__(self, ptr: int, dtype: torch.dtype):
        self.ptr, self.dtype = ptr, dtype

    def data_ptr(self) -> int:
        return self.ptr


def _box_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128, 16, 4)


@lru_cache(maxsize=1024)
def _descriptor(dtype: torch.dtype, shape: tuple, strides: tuple, box: int, ptr: int) -> TensorDescriptor:
    order = (0, 2, 1, 3)
    # The stride of a dimension of size 1 is never used, and may be anything in PyTorch, but not in a descriptor.
    steps = [strides[i] if shape[i] > 1 or i == 3 else shape[3] for i in order]
    return TensorDescriptor(_Base(ptr, dtype), [shape[i] for i in order], steps, [1, 1, box, 64], _box_layout())


def _aligned(x: torch.Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(n == 1 or (s % 16 == 0 and s > 0) for n, s in zip(x.shape[:3], x.stride()))


def _strides(x: torch.Tensor) -> list[int]:
    """Of batch or block, head and slot or node; 0, which is aligned, where it is never used."""
    return [x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 2, 1)]


def supports(q, k_cache, v_cache, k, v, block_table, sinks, k_scale, window, softcap) -> bool:
    """Whether `tree_attention` below can do what these arguments ask, on a GPU of compute capability 9.0."""
    page = k_cache.shape[1]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and k_cache.dtype == q.dtype
        and q.shape[3] in (64, 128)
        and (block_table is None or (page >= 16 and page & (page - 1) == 0))
        and sinks is None and k_scale is None and not window and not softcap
        and all(_aligned(x) for x in (k_cache, v_cache, k, v) if x is not None)
    )  # fmt: skip


def tree_attention(
    q, k_cache, v_cache, k, v, packed_mask, num_nodes, cache_seqlens, block_table, softmax_scale, out, lse,
    num_splits, min_tiles, num_sms, launch=ordinary_launch,
):  # fmt: skip
    """`tree_attention.tree_attention` where `supports` says so."""
    batch, size, heads, head_dim = q.shape
    page, heads_kv = k_cache.shape[1], k_cache.shape[2]
    group, rows = heads // heads_kv, size * (heads // heads_kv)
    paged = block_table is not None
    capacity = block_table.shape[1] * page if paged else page
    partial, partial_lse = plain.allocate_partial(q, heads_kv, num_splits)
    box = min(page, BLOCK_N) if paged else BLOCK_N
    row_blocks = triton.cdiv(rows, BLOCK_M)
    total = row_blocks * num_splits * batch * heads_kv
    append = k is not None
    unused = cache_seqlens  # stands in for a pointer that is never followed
    launch(
        tree_attention_hopper_kernel, (min(total, num_sms),),
        *(
            OfAddress(partial_of(_descriptor, x.dtype, tuple(x.shape), x.stride(), box), x)
            for x in (k_cache, v_cache)
        ),
        q, k_cache, v_cache, k if append else k_cache, v if append else v_cache, packed_mask,
        unused if num_nodes is None else num_nodes, cache_seqlens, block_table if paged else unused,
        out, unused if lse is None else lse,
        unused if partial is None else partial, unused if partial_lse is None else partial_lse,
        q.stride(0), q.stride(1), q.stride(2),
        *_strides(k_cache), *_strides(v_cache), *(_strides(k) + _strides(v) if append else [0] * 6),
        packed_mask.stride(0) if packed_mask.dim() == 3 else 0,
        block_table.stride(0) if paged else 0,
        out.stride(0), out.stride(1), out.stride(2),
        size, heads_kv, capacity, k_cache.shape[0], page, packed_mask.shape[-1], num_splits, min_tiles,
        row_blocks, total, softmax_scale * 1.4426950408889634,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BOX=box, STAGES=NUM_STAGES,
        SPLIT=num_splits > 1, PAGED=paged, APPEND=append, HAS_NUM_NODES=num_nodes is not None,
        HAS_LSE=lse is not None, num_warps=4, maxnreg=_ENTRY_REGISTERS,
    )  # fmt: skip
    if partial is not None:
        plain.merge(
            partial, partial_lse, num_nodes, cache_seqlens, None, out, lse, heads_kv, capacity, 0, num_splits,
            min_tiles, BLOCK_N, launch,
        )  # fmt: skip
