"""Tree attention: one call for a tree's nodes over a KV cache, contiguous or paged."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from . import _calls, _sm90
from ._checks import check_tensor, debug_enabled
from .tree import TokenTree

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_lib = torch.library.Library("medusa_kernels", "FRAGMENT")
_TAIL = (
    "Tensor packed_mask, Tensor? depths, Tensor? num_nodes, Tensor cache_seqlens, Tensor? block_table, Tensor? sinks, "
    "Tensor? k_scale, Tensor? v_scale, float softmax_scale, int window, float softcap, bool batch_invariant, "
    "Tensor(a!) out, Tensor(b!)? lse) -> ()"
)
# Two schemas, so that a call which appends nothing does not count as writing to the cache.
_lib.define("tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, " + _TAIL)
_lib.define("tree_attention_append(Tensor q, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor k, Tensor v, " + _TAIL)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree: TokenTree,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a tree's nodes to the committed tokens, to their ancestors and to themselves.

    Names and layout are those of flash-attention's `flash_attn_with_kvcache`.

    q:                 [B, T, H, D] fp16, bf16 or fp32, node `i` at position `cache_seqlens + depth(i)` (rotary
                       embedding already applied); D a multiple of 8 in 16..256
    k_cache, v_cache:  [B, S, Hkv, D], or paged [num_blocks, block_size, Hkv, D]; q's dtype, or float8_e4m3fn on a GPU
                       of compute capability 8.9 or newer. H a multiple of Hkv. Strides are free, last dimension
                       contiguous. Node `i` of request `b` lies at slot `cache_seqlens[b] + i`
    tree:              T nodes, one tree or one a request; with `num_nodes`, rows of padding nodes come out as zero
    cache_seqlens:     [B] int32, committed tokens of each request, the tree's not counted; 0 is allowed
    k, v:              [B, T, Hkv, D] of q's dtype: written to the tree's slots by this call, in place
    block_table:       [B, max_blocks] int32, makes the caches paged
    softmax_scale:     default 1 / sqrt(D)
    window:            keys at position > position(node) - window, by tree depth (Mistral); None: all
    softcap:           scores become softcap * tanh(score / softcap) (Gemma 2); 0: off
    sinks:             [H] float, a logit a head that takes weight and gives no value (GPT-OSS)
    k_scale, v_scale:  [], [1] or [Hkv] fp32, for an fp8 cache: a value is its fp8 number times the scale
    batch_invariant:   a node's result is, bit for bit, a function of its query and of the keys and values up to its
                       position: the same alone or in a batch, in a tree, a chain or plain decoding (T = 1), paged or
                       not. Slower; its partial results take 4 * D bytes for every row and 512 slots of the cache's
                       capacity, and on a CPU it is a call a node

    Returns out [B, T, H, D] of q's dtype, written to `out` when given; with `return_lse` also the natural log of each
    softmax's denominator, [B, H, T] fp32, sinks included, -inf for padding. Accumulates in fp32; the same bits from
    run to run. Slots of no node and no committed token may hold anything, NaN too.

    How work is divided depends on the slots that a request has, S or max_blocks * block_size. Where all lengths are
    known to be far below that, views are faster, by up to a fifth for one request: `k_cache[:, :n]` and
    `v_cache[:, :n]`, or `block_table[:, :n]`.

    Unchecked, as it would stall the GPU, but clamped, so that nothing outside a tensor is touched: values of
    `cache_seqlens` and `block_table`. MEDUSA_KERNELS_DEBUG=1 checks them.

    Raises TypeError, ValueError for an argument of the wrong type, shape, dtype, device, stride or value.
    Source: Medusa (arXiv 2401.10774) section 2.1.2; split-KV as in Flash-Decoding.
    """
    result, lse = out, None
    known = None  # whether this call was made before, and so passed the checks: and made again just now
    tensors: tuple[Tensor | None, ...] | None = None
    options = (softmax_scale, window, softcap, batch_invariant, True)  # checked: what `_launch` knows is not
    if isinstance(tree, TokenTree) and not _calls.traced():
        try:
            if result is None:
                result = torch.empty_like(q, memory_format=torch.contiguous_format)
            if return_lse:
                lse = _new_lse(q)
            tensors = (
                q, k_cache, v_cache, k, v, tree.packed_mask, tree.depths if window is not None else None,
                tree.num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale, result, lse,
            )  # fmt: skip
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
                tensors = None  # autograd has to see the operator
        except (AttributeError, IndexError, TypeError, RuntimeError):  # not what it should be: the check says it
            tensors, result = None, out
    if tensors is not None and not debug_enabled():
        known = _known.call(tensors, options)
    if known is None:
        _check(
            tree, q, k_cache, v_cache, cache_seqlens, k, v, block_table, softmax_scale, window, softcap, sinks,
            k_scale, v_scale, batch_invariant, out,
        )  # fmt: skip
    if debug_enabled():
        capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        _check_values(cache_seqlens, tree, q.shape[1], capacity, block_table, k_cache)
    if result is None:
        result = torch.empty_like(q, memory_format=torch.contiguous_format)
    if return_lse and lse is None:
        lse = _new_lse(q)
    if not known:
        scale = q.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale)
        new = () if k is None else (k, v)
        rest = (
            tree.packed_mask, tree.depths if window is not None else None, tree.num_nodes, cache_seqlens, block_table,
            sinks, k_scale, v_scale, scale, window or 0, float(softcap), batch_invariant, result, lse,
        )  # fmt: skip
        op = torch.ops.medusa_kernels.tree_attention if k is None else torch.ops.medusa_kernels.tree_attention_append
        op(q, k_cache, v_cache, *new, *rest)
        if tensors is not None and (known is None or q.is_cuda):
            launched = _known.find(tensors, (scale, window or 0, float(softcap), batch_invariant))
            _known.remember(tensors, options, launched or _through_op)
    return result if lse is None else (result, lse)


_known = _calls.new_calls()


def _through_op(addresses: list[int]) -> bool:
    """The call passed the checks once, and the operator has to make it."""
    return False


def _new_lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)


def _check(tree, q, k_cache, v_cache, cache_seqlens, k, v, block_table, softmax_scale, window, softcap, sinks,
           k_scale, v_scale, batch_invariant, out) -> None:  # fmt: skip
    check_tensor("q", q, shape=(None, None, None, None), dtype=_FLOATS, last_dim_contiguous=True)
    batch, size, heads, head_dim = q.shape
    device = q.device
    cache_dtype = (q.dtype, torch.float8_e4m3fn)
    k_shape = (None if block_table is not None else batch, None, None, head_dim)
    check_tensor("k_cache", k_cache, shape=k_shape, dtype=cache_dtype, device=device, last_dim_contiguous=True)
    check_tensor("v_cache", v_cache, shape=k_cache.shape, dtype=k_cache.dtype, device=device, last_dim_contiguous=True)
    heads_kv = k_cache.shape[2]
    if not 16 <= head_dim <= 256 or head_dim % 8:
        raise ValueError(f"q: head dim must be a multiple of 8 in 16..256, got {head_dim}")
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(f"q: its heads must be a multiple of the cache's {heads_kv}, got {heads}")
    if not isinstance(tree, TokenTree):
        raise TypeError(f"tree: expected a TokenTree, got {type(tree).__name__}")
    if tree.size != size or tree.device != device or (tree.batched and tree.parents.shape[0] != batch):
        raise ValueError(f"tree: expected {size} nodes on {device} for a batch of {batch} as q has, got {tree}")
    if tree.num_nodes is not None:
        check_tensor("tree.num_nodes", tree.num_nodes, shape=(batch,), dtype=torch.int32, device=device)
    check_tensor("cache_seqlens", cache_seqlens, shape=(batch,), dtype=torch.int32, device=device)
    capacity = k_cache.shape[1]
    if block_table is not None:
        check_tensor("block_table", block_table, shape=(batch, None), dtype=torch.int32, device=device)
        check_tensor("block_table", block_table, last_dim_contiguous=True)
        capacity *= block_table.shape[1]
    if size > capacity or k_cache.shape[0] == 0 < batch:
        raise ValueError(f"k_cache: expected room for {size} nodes a request, got {capacity} slots")
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'}: k and v must be given together, got None")
    if k is not None:
        for name, x in (("k", k), ("v", v)):
            shape = (batch, size, heads_kv, head_dim)
            check_tensor(name, x, shape=shape, dtype=q.dtype, device=device, last_dim_contiguous=True)
    for name, x in (("softmax_scale", softmax_scale), ("window", window), ("softcap", softcap)):
        if isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a number, got a tensor")
    if softmax_scale is not None and not 0.0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: expected a positive finite number, got {softmax_scale}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number >= 0, got {softcap}")
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {type(batch_invariant).__name__}")
    if sinks is not None:
        check_tensor("sinks", sinks, shape=(heads,), dtype=_FLOATS, device=device)
        if not sinks.is_contiguous():
            raise ValueError(f"sinks: expected a contiguous tensor, got strides {sinks.stride()}")
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    if (k_scale is None) != (v_scale is None):
        raise ValueError(f"{'k_scale' if k_scale is None else 'v_scale'}: give both scales or none, got None")
    if k_scale is not None:
        if not fp8:
            raise ValueError(f"k_scale: expected None unless the cache is float8_e4m3fn, got one for {k_cache.dtype}")
        check_tensor("k_scale", k_scale, dtype=torch.float32, device=device)
        if k_scale.shape not in ((), (1,), (heads_kv,)) or not k_scale.is_contiguous():
            raise ValueError(f"k_scale: expected shape [], [1] or [{heads_kv}], got {tuple(k_scale.shape)}")
        check_tensor("v_scale", v_scale, shape=k_scale.shape, dtype=torch.float32, device=device)
        if v_scale is not None and not v_scale.is_contiguous():
            raise ValueError(f"v_scale: expected a contiguous tensor, got strides {v_scale.stride()}")
    if fp8 and q.is_cuda and _sms_and_arch(device.index)[1] < 89:
        raise ValueError("k_cache: float8_e4m3fn needs a GPU of compute capability 8.9 or newer")
    if out is not None:
        check_tensor("out", out, shape=q.shape, dtype=q.dtype, device=device, last_dim_contiguous=True)


def _check_values(cache_seqlens, tree, size, capacity, block_table, k_cache) -> None:
    nodes = size if tree.num_nodes is None else tree.num_nodes
    if bool(((cache_seqlens < 0) | (cache_seqlens.long() + nodes > capacity)).any()):
        raise ValueError(f"cache_seqlens: expected 0..{capacity} less the tree's nodes, got {cache_seqlens.tolist()}")
    if block_table is not None:
        used = (cache_seqlens + nodes + k_cache.shape[1] - 1) // k_cache.shape[1]
        column = torch.arange(block_table.shape[1], device=block_table.device)
        wrong = (block_table < 0) | (block_table >= k_cache.shape[0])
        if bool((wrong & (column < used.unsqueeze(1))).any()):
            raise ValueError(f"block_table: expected blocks 0..{k_cache.shape[0] - 1}, got {block_table.tolist()}")


@lru_cache
def _sms_and_arch(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def _launch(
    q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale,
    softmax_scale, window, softcap, batch_invariant, out, lse,
) -> None:  # fmt: skip
    if q.shape[0] == 0:
        return
    tensors = (
        q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale,
        out, lse,
    )  # fmt: skip
    options = (softmax_scale, window, softcap, batch_invariant)
    if _known.call(tensors, options):
        return
    num_sms, arch = _sms_and_arch(q.device.index)
    if arch == 90 and not batch_invariant:
        again = _sm90.prepare(
            q, k_cache, v_cache, k, v, packed_mask, block_table, sinks, k_scale, window, softcap, softmax_scale, out,
            num_sms,
        )  # fmt: skip
        if again is not None:
            again([0 if x is None else x.data_ptr() for x in tensors])
            _known.remember(tensors, options, again)
            return
    from ._triton.launch import Launcher

    launcher = Launcher(tensors)
    with torch.cuda.device(q.device):
        _launch_kernels(*(*launcher.tensors[:13], *options, *launcher.tensors[13:], launcher))
        replay = launcher.replay()
    if replay is not None:
        _known.remember(tensors, options, replay)


def _launch_kernels(
    q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale,
    softmax_scale, window, softcap, batch_invariant, out, lse, launcher,
) -> None:  # fmt: skip
    """Choose the Triton kernel and its tiles, by nothing but what `_known` tells calls by."""
    from ._triton import tree_attention as kernels

    batch, size, heads, head_dim = q.shape
    num_sms, arch = _sms_and_arch(q.device.index)
    if batch_invariant:
        from ._triton import tree_attention_invariant as invariant

        invariant.tree_attention(
            q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale,
            v_scale, softmax_scale, window, softcap, out, lse, invariant.tile_config(head_dim, q.itemsize, arch),
            launcher,
        )  # fmt: skip
        return
    heads_kv = k_cache.shape[2]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    rows = size * heads // heads_kv
    config = kernels.tile_config(rows, head_dim, batch * heads_kv, capacity, q.itemsize, num_sms, arch)
    kernels.tree_attention(
        q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale,
        softmax_scale, window, softcap, out, lse, config, launcher,
    )  # fmt: skip


def _on_cpu(
    q, k_cache, v_cache, k, v, packed_mask, depths, num_nodes, cache_seqlens, block_table, sinks, k_scale, v_scale,
    softmax_scale, window, softcap, batch_invariant, out, lse,
) -> None:  # fmt: skip
    """PyTorch's own attention, request by request; written out where it has no such option (soft-cap, sinks, LSE)."""
    size = q.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        nodes = size if num_nodes is None else min(max(int(num_nodes[b]), 0), size)
        capacity = k_cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
        length = min(max(length, 0), capacity - nodes)
        out[b, nodes:] = 0
        if lse is not None:
            lse[b, :, nodes:] = -math.inf
        if nodes == 0:
            continue
        keys_end = length + nodes
        if block_table is None:
            seen, fresh = (b, slice(keys_end)), (b, slice(length, keys_end))
        else:
            slots = torch.arange(keys_end)
            block = block_table[b, slots // k_cache.shape[1]].long().clamp(0, k_cache.shape[0] - 1)
            slots = slots % k_cache.shape[1]
            seen, fresh = (block, slots), (block[length:], slots[length:])
        kv = []
        for cache, new, kv_scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
            fp8 = cache.dtype == torch.float8_e4m3fn
            raw = cache.view(torch.uint8) if fp8 else cache  # fp8 tensors take no indices
            if new is not None:
                rows = new[b, :nodes]
                if fp8:
                    scaled = rows.float() if kv_scale is None else rows.float() / kv_scale.view(-1, 1)
                    rows = scaled.clamp(-448.0, 448.0).to(cache.dtype).view(torch.uint8)
                raw[fresh] = rows
            read = raw[seen]
            if fp8:
                read = read.view(cache.dtype).float()
                read = read if kv_scale is None else read * kv_scale.view(-1, 1)
            kv.append(read.to(q.dtype).transpose(0, 1))  # [Hkv, length + nodes, D]
        keys, values = kv
        mask = None
        if nodes > 1 or window or batch_invariant:
            words = packed_mask[b] if packed_mask.dim() == 3 else packed_mask
            column = torch.arange(nodes)
            mask = torch.ones(nodes, keys_end, dtype=torch.bool)
            mask[:, length:] = (words[:nodes, column // 64] >> (column % 64)) & 1
        if window:
            depth = (depths[b] if depths.dim() == 2 else depths)[:nodes]
            position = torch.cat([torch.arange(length), length + depth])
            mask &= position > (length + depth - window).unsqueeze(1)
        query = q[b, :nodes].transpose(0, 1)
        results = []
        if batch_invariant:  # node by node on its own keys, in the order of their positions, as plain decoding would
            assert mask is not None
            for i in range(nodes):
                own = mask[i].nonzero()[:, 0]
                results.append(_rows_on_cpu(query[:, i : i + 1].contiguous(), keys[:, own], values[:, own], None,
                                            sinks, softmax_scale, softcap, lse is not None))  # fmt: skip
        else:
            results.append(_rows_on_cpu(query, keys, values, mask, sinks, softmax_scale, softcap, lse is not None))
        out[b, :nodes] = torch.cat([rows for rows, _ in results], 1).transpose(0, 1)
        if lse is not None:
            lse[b, :, :nodes] = torch.cat([rows_lse for _, rows_lse in results], 1)


def _rows_on_cpu(query, keys, values, mask, sinks, softmax_scale, softcap, with_lse):
    """[H, rows, D] and, if asked for, [H, rows]: attention of [H, rows, D] to [Hkv, N, D]."""
    if not softcap and sinks is None and not with_lse:
        return torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), mask, scale=softmax_scale, enable_gqa=True
        )[0], None
    keys, values = (x.repeat_interleave(query.shape[0] // x.shape[0], 0).float() for x in (keys, values))
    scores = query.float() @ keys.transpose(1, 2) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, query.shape[1], 1)], 2)
    return scores.softmax(2)[:, :, : keys.shape[1]] @ values, scores.logsumexp(2) if with_lse else None


for _key, _impl in (("CUDA", _launch), ("CPU", _on_cpu)):
    _lib.impl("tree_attention", lambda q, k, v, *rest, _impl=_impl: _impl(q, k, v, None, None, *rest), _key)
    _lib.impl("tree_attention_append", _impl, _key)
torch.library.register_fake("medusa_kernels::tree_attention", lambda *args: None, lib=_lib)
torch.library.register_fake("medusa_kernels::tree_attention_append", lambda *args: None, lib=_lib)
