"""What every operator must compute, in eager PyTorch: the definition, written to be read, not to be fast.

Signatures are the operators'. Tests compare each kernel with these, in float64 where they compute with floats.
"""

import math

import torch
from torch import Tensor

from .tree import TokenTree


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
    return_lse: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`medusa_kernels.tree_attention`; `upcast` computes and returns float64."""
    batch, size, heads, head_dim = q.shape
    group = heads // k_cache.shape[2]
    dtype = torch.float64 if upcast else q.dtype
    wide = torch.float64 if upcast else torch.float32
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full((batch, heads, size), -math.inf, dtype=wide, device=q.device)
    for b, length in enumerate(cache_seqlens.tolist()):
        nodes = size if tree.num_nodes is None else int(tree.num_nodes[b])
        if nodes == 0:
            continue
        slots = torch.arange(length + nodes, device=q.device)
        if block_table is None:
            place = (torch.full_like(slots, b), slots)
        else:
            place = (block_table[b].long()[slots // k_cache.shape[1]], slots % k_cache.shape[1])
        tree_place = (place[0][length:], place[1][length:])
        if k is not None and v is not None:
            _write(k_cache, tree_place, k[b, :nodes], k_scale)
            _write(v_cache, tree_place, v[b, :nodes], v_scale)
        keys = _read(k_cache, place, k_scale, dtype).repeat_interleave(group, 1)  # [length + nodes, H, D]
        values = _read(v_cache, place, v_scale, dtype).repeat_interleave(group, 1)

        depths = (tree.depths[b] if tree.batched else tree.depths)[:nodes]
        ancestors = (tree.mask[b] if tree.batched else tree.mask)[:nodes, :nodes]
        mask = torch.cat([ancestors.new_ones(nodes, length), ancestors], 1)
        if window is not None:
            position = torch.cat([slots[:length], length + depths])
            mask &= position > (length + depths - window).unsqueeze(1)

        scores = torch.einsum("thd,shd->hts", q[b, :nodes].to(dtype), keys).to(wide) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~mask, -math.inf)
        if sinks is not None:  # one more logit a head, which takes weight and gives no value
            scores = torch.cat([scores, sinks.to(wide).view(-1, 1, 1).expand(-1, nodes, 1)], 2)
        lse[b, :, :nodes] = scores.logsumexp(2)
        probs = scores.softmax(2)[:, :, : length + nodes].to(dtype)
        out[b, :nodes] = torch.einsum("hts,shd->thd", probs, values)
    return (out, lse) if return_lse else out


def _read(cache: Tensor, place: tuple[Tensor, Tensor], scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = cache.view(torch.uint8)[place].view(cache.dtype) if cache.itemsize == 1 else cache[place]
    return rows.to(dtype) if scale is None else (rows.to(scale.dtype) * scale.view(-1, 1)).to(dtype)


def _write(cache: Tensor, place: tuple[Tensor, Tensor], rows: Tensor, scale: Tensor | None) -> None:
    if cache.itemsize > 1:
        cache[place] = rows.to(cache.dtype)
    else:  # fp8 has no infinity: saturate
        limit = torch.finfo(cache.dtype).max
        scaled = rows.float() if scale is None else rows.float() / scale.view(-1, 1)
        cache.view(torch.uint8)[place] = scaled.clamp(-limit, limit).to(cache.dtype).view(torch.uint8)

