"""Compaction of the KV cache to the accepted path of a tree."""

from collections.abc import Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from . import _calls, _ops
from ._checks import check_tensor, debug_enabled


def compact_kv_cache(
    kv: Tensor | Sequence[Sequence[Tensor]],
    path: Tensor,
    accept_length: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """Move the accepted path's rows next to the committed ones, in every layer, in place and in one launch.

    kv:             one tensor [layers, 2, B, S, Hkv, D], or for each layer a tuple (k_cache, v_cache), each
                    [B, S, ...]; a quantised cache with scales per token: (k_cache, v_cache, k_scale, v_scale), scales
                    [B, S, ...] as well. Paged: [num_blocks, block_size, ...] in place of [B, S, ...]. Any dtype and
                    any strides; the bytes are moved as they are. Changed in place
    path:           [B, P] int32, P <= 512; accepted nodes of each request, root first, strictly increasing; what
                    follows entry `accept_length[b]` is not read
    accept_length:  [B] int32; accepted nodes below the root, -1 for a padded request, of which nothing changes
    cache_seqlens:  [B] int32; committed tokens. Changed in place
    block_table:    [B, max_blocks] int32; the block that holds slots `i * block_size ...` of each request

    With `L = cache_seqlens[b]` before the call, for `i = 0 .. accept_length[b]`: slot `L + i` holds what slot
    `L + path[b, i]` held, and `cache_seqlens[b] = L + accept_length[b] + 1`. No other slot changes.

    Values on the device are not read by the host: moves from or to slots that a request does not have, by path entries
    that do not belong to an increasing path, or through block numbers out of range, are skipped, and lengths stop at
    the cache's room. With MEDUSA_KERNELS_DEBUG=1 they raise ValueError.

    Raises TypeError for what is not a tensor, ValueError for a wrong shape, dtype, device or stride, RuntimeError where
    the compiled operators are missing. Nothing is written then.
    Source: Medusa (Cai et al., 2024), `update_inference_inputs`.
    """
    try:
        layers, lead_dims = ((kv,), 2) if isinstance(kv, Tensor) else (tuple(kv), 0)
        tensors = (path, accept_length, cache_seqlens, block_table, *layers)
        if not _calls.traced() and not debug_enabled() and _known.call(tensors, (lead_dims,)):
            return
        caches = [kv] if isinstance(kv, Tensor) else list(chain.from_iterable(layers))
    except RuntimeError as error:
        _ops.reraise(error)
    except TypeError:
        raise TypeError(f"kv: expected a tensor, or a tuple of tensors for each layer, got {_kind(kv)}") from None
    arguments = (caches, lead_dims, path, accept_length, cache_seqlens, block_table)
    if torch.compiler.is_compiling():
        torch.ops.medusa_kernels.compact_kv_cache(*arguments)
        return
    try:
        op = _ops.op("compact_kv_cache", caches[0].is_cuda)
        if debug_enabled():
            _check_values(caches[0], lead_dims, path, accept_length, cache_seqlens, block_table)
        nested = lead_dims > 0 or all(isinstance(layer, (tuple, list)) for layer in layers)
        if nested and _calls.are_plain(tensors):
            launch = _calls.planned("compact_kv_cache", arguments, caches[0].device)
            launch(_calls.addresses(tensors))
            _known.remember(tensors, (lead_dims,), launch)
        else:
            op(*arguments)
    except (AttributeError, IndexError, TypeError, RuntimeError) as error:
        _check_arguments(kv, caches, path, accept_length, cache_seqlens, block_table)
        _ops.reraise(error)


_known = _calls.new_calls()


def _kind(kv: object) -> str:
    if isinstance(kv, list | tuple):
        return f"a {type(kv).__name__} of {sorted({type(x).__name__ for x in kv})}"
    return type(kv).__name__


def _check_arguments(kv, caches, path, accept_length, cache_seqlens, block_table) -> None:
    if not caches:
        raise ValueError("kv: expected at least one layer, got none")
    if not isinstance(kv, Tensor) and any(isinstance(layer, Tensor) for layer in kv):
        raise TypeError(f"kv: expected a tensor, or a tuple of tensors for each layer, got {_kind(kv)}")
    for i, cache in enumerate(caches):
        check_tensor(f"kv (tensor {i})", cache)
    int32 = {"dtype": torch.int32, "device": caches[0].device, "last_dim_contiguous": True}
    batch = check_tensor("path", path, shape=(None, None), **int32).shape[0]
    check_tensor("accept_length", accept_length, shape=(batch,), **int32)
    check_tensor("cache_seqlens", cache_seqlens, shape=(batch,), **int32)
    if block_table is not None:
        check_tensor("block_table", block_table, shape=(batch, None), **int32)


def _check_values(cache, lead_dims, path, accept_length, cache_seqlens, block_table) -> None:
    """What the operator does not check, as it would stall the GPU: run with MEDUSA_KERNELS_DEBUG=1."""
    path_size = path.shape[1]
    first, second = cache.shape[lead_dims : lead_dims + 2]
    capacity = second if block_table is None else second * block_table.shape[1]
    rows = zip(path.tolist(), accept_length.tolist(), cache_seqlens.tolist(), strict=True)
    for b, (nodes, accepted, length) in enumerate(rows):
        if not -1 <= accepted < path_size:
            raise ValueError(f"accept_length: expected -1..{path_size - 1}, got {accepted} at [{b}]")
        nodes = nodes[: accepted + 1]
        if nodes and (nodes[0] < 0 or any(a >= c for a, c in pairwise(nodes))):
            raise ValueError(f"path: expected strictly increasing nodes >= 0, got {nodes} at [{b}]")
        last = length + (nodes[-1] if nodes else -1)
        if length < 0 or last >= capacity:
            raise ValueError(f"cache_seqlens: slot {last} of {capacity} would be read with {length} at [{b}]")
        if block_table is not None and nodes:
            used = block_table[b, length // second : last // second + 1].tolist()
            if any(not 0 <= block < first for block in used):
                raise ValueError(
                    f"block_table: expected blocks 0..{first - 1}, got {used} for the tree's slots at [{b}]"
                )
