"""Tree attention's CUDA kernel for Hopper (csrc/tree_attention_sm90.cu): what it serves, and its launches."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from . import _ops
from ._calls import Launch

KEYS = 64  # of a tile
MAX_SPLITS = 64  # of a row block
MAX_CLUSTER = 8  # splits that merge in a cluster
_STRIDES = ctypes.c_int64 * 3
LEVELS = 3  # of a request's length, each with its splits
_LEVELS = ctypes.c_int64 * LEVELS


class _Plan(ctypes.Structure):
    """`AttentionPlan` of csrc/tree_attention_sm90_args.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "bytes", "device", "half", "fp8", "batch", "size", "heads_kv", "group", "dim", "num_blocks", "block_size",
            "max_blocks", "words", "groups", "row_blocks", "num_splits",
        )),
        ("level_tiles", _LEVELS), ("level_splits", _LEVELS),
        *((name, ctypes.c_int64) for name in ("cluster", "stages", "resident")),
        *((name, _STRIDES) for name in ("q", "k_cache", "v_cache", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("mask_stride", "table_stride", "scale_stride")),
        ("scale", ctypes.c_double),
    ]  # fmt: skip


@cache
def _kernel():
    """The launch in the compiled library, or None where it was built without."""
    try:
        return _ops.function("tree_attention_sm90", True) if _ops.HAS_CUDA_OPS else None
    except AttributeError:
        return None


def prepare(
    q, k_cache, v_cache, k, v, packed_mask, block_table, sinks, k_scale, window, softcap, softmax_scale, out, num_sms,
    groups: int | None = None, num_splits: int | None = None, stages: int | None = None, cluster: bool | None = None,
) -> Launch | None:  # fmt: skip
    """The launch that does what these arguments ask, or None where it cannot.

    groups: of 64 rows in a row block, 1 or 2; num_splits: blocks that share a row block's keys; stages: tiles that a
    block has in flight; cluster: whether its splits are one, and merge there. None: chosen here.
    """
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    if (
        q.dtype not in (torch.bfloat16, torch.float16)
        or not (k_cache.dtype == q.dtype or (fp8 and q.dtype == torch.bfloat16))
        or q.shape[3] not in (64, 128)
        or sinks is not None
        or window
        or softcap
        or _kernel() is None
    ):
        return None
    batch, size, heads, dim = q.shape
    num_blocks, block_size, heads_kv = k_cache.shape[:3]
    rows = size * heads // heads_kv
    paged = block_table is not None
    if paged and (block_size < 16 or block_size & (block_size - 1)):
        return None
    caches = (x for x in (k_cache, v_cache, k, v) if x is not None)
    if not (all(_aligned(x, 16) for x in caches) and _aligned(q, 4) and _aligned(out, 16)):
        return None
    max_blocks = block_table.shape[1] if paged else 0
    capacity = block_size * (max_blocks or 1)
    groups, cluster, levels = choose_levels(rows, batch * heads_kv, capacity, num_sms, dim, fp8, groups, cluster)
    if num_splits is not None:
        levels = [(0, num_splits)] * LEVELS
    level_tiles, level_splits = zip(*levels)
    num_splits = max(level_splits)
    cluster = cluster and 1 < num_splits <= MAX_CLUSTER
    row_blocks = math.ceil(rows / (64 * groups))
    blocks = batch * heads_kv * row_blocks
    divided = capacity * MAX_SPLITS, (rows + 128) * heads, blocks * row_blocks, batch * heads_kv**2
    if max(divided) >= 2**32:  # beyond what `Divisor` divides
        return None
    resident = _resident(groups, num_sms, fp8)
    if not 1 <= num_splits <= MAX_SPLITS or (num_splits > 1 and blocks * num_splits > resident):
        raise ValueError(f"num_splits: expected 1, or up to {MAX_SPLITS} with all blocks resident, got {num_splits}")
    if stages is None:  # where memory bounds, more are slower by up to 4%, and two blocks share a multiprocessor
        stages = (6 if groups == 2 else 5 if fp8 else 3) * (128 // dim)
        if cluster and dim == 64:
            stages -= 1  # for what the cluster exchanges
    plan = _Plan(
        ctypes.sizeof(_Plan), q.get_device(), q.dtype == torch.float16, fp8, batch, size, heads_kv, heads // heads_kv,
        dim, num_blocks, block_size, max_blocks, packed_mask.shape[-1], groups, row_blocks, num_splits,
        _LEVELS(*level_tiles), _LEVELS(*level_splits), cluster, stages, resident,
        *(_STRIDES(*_strides(x)) for x in (q, k_cache, v_cache, k, v, out)),
        packed_mask.stride(0) if packed_mask.dim() == 3 and packed_mask.shape[0] > 1 else 0,
        block_table.stride(0) if paged and batch > 1 else 0, k_scale is not None and k_scale.numel() > 1,
        softmax_scale * math.log2(math.e),
    )  # fmt: skip
    return Launch(_kernel(), plan, ctypes.addressof(plan), plan.device)


@dataclass(frozen=True)
class Choice:
    groups: int
    cluster: bool
    num_splits: int


@lru_cache(1024)
def choose_levels(
    rows: int, heads: int, capacity: int, num_sms: int, dim: int = 128, fp8: bool = False, groups: int | None = None,
    cluster: bool | None = None,
) -> tuple[int, bool, list[tuple[int, int]]]:  # fmt: skip
    """`groups` and `cluster` for a request that fills half of its room, and `num_splits` by its length: levels (tiles
    that one reaches to, splits), longest first, of which the first is for any length."""
    half = choose(rows, heads, math.ceil(capacity / 2), num_sms, dim, fp8, groups, cluster)

    def splits(capacity: int) -> int:
        return choose(rows, heads, capacity, num_sms, dim, fp8, half.groups, half.cluster).num_splits

    tiles = math.ceil(capacity / KEYS)
    levels = [(0, splits(capacity))]
    while tiles > 1 and len(levels) < LEVELS:
        tiles = tiles * 3 // 4
        fewer = splits(tiles * KEYS)
        if fewer <= levels[-1][1] * 3 // 4:
            levels.append((tiles, fewer))
    levels += [levels[-1]] * (LEVELS - len(levels))
    return half.groups, half.cluster, levels


def choose(
    rows: int, heads: int, capacity: int, num_sms: int, dim: int = 128, fp8: bool = False, groups: int | None = None,
    cluster: bool | None = None,
) -> Choice:  # fmt: skip
    """What takes least by a model of what blocks cost to begin, to merge, and a tile, whose numbers are µs on an H100.

    heads: KV heads of all requests; capacity: slots of a request
    """
    tiles = math.ceil(capacity / KEYS)

    def row_blocks(groups: int) -> int:
        return math.ceil(rows / (64 * groups))

    def most_splits(groups: int, cluster: bool) -> int:
        # Clusters lie within parts of the GPU, and do not fill it.
        room = num_sms * 4 // 5 if cluster else _resident(groups, num_sms, fp8)
        most = MAX_CLUSTER if cluster else MAX_SPLITS
        return max(1, min(most, tiles, room // (heads * row_blocks(groups))))

    def cost(choice: Choice) -> float:
        groups, splits = choice.groups, choice.num_splits
        blocks = heads * row_blocks(groups) * splits
        shared = not fp8 and groups == 1 and blocks > num_sms  # two blocks a multiprocessor, each slower
        if fp8:
            begin, tile, tile_64 = (7.4, 0.81, 0.5) if groups == 2 else (6.5, 0.55, 0.45)
        elif groups == 2:
            begin, tile, tile_64 = 7.8, 0.76, 0.5
        elif choice.cluster:
            begin, tile, tile_64 = 4.8, 0.74, 0.56
        else:
            begin, tile, tile_64 = (6.0, 0.85, 0.55) if shared else (4.8, 0.66, 0.5)
        if dim == 64:
            tile = tile_64
        # Where memory bounds.
        read = 0.92 * (2 if shared else 1) * (0.5 if fp8 else 1) * dim / 128 / row_blocks(groups)
        waves = math.ceil(blocks / _resident(groups, num_sms, fp8))
        if waves > 1 and groups == 1:  # such blocks do not stay
            begin += 2
        merge = 1.3 + 0.13 * splits
        if choice.cluster:
            read *= 1.1 * blocks / num_sms
            exchanged = rows / row_blocks(groups) / 64 * dim / 128
            merge = 0.4 + 0.07 * splits + 2.4 / splits + 0.4 * exchanged
        return waves * (begin + max(tile, read) * tiles / splits) + (merge if splits > 1 else 0)

    choices = [
        Choice(g, c, splits)
        for g in ([groups] if groups else [1, 2] if rows > 64 else [1])
        for c in ([False] if fp8 or g == 2 else [False, True] if cluster is None else [cluster])
        for splits in range(1, most_splits(g, c) + 1)
    ]
    return min(choices, key=cost)


def _resident(groups: int, num_sms: int, fp8: bool) -> int:
    """Blocks that the GPU holds at once: with one warpgroup, which is for what memory bounds, two a multiprocessor."""
    return num_sms * (2 if groups == 1 and not fp8 else 1)


def _strides(x: Tensor | None) -> list[int]:
    """Of batch or block, node or slot and head; 0 where there is one at most, whose stride may be anything."""
    return [0, 0, 0] if x is None else [x.stride(i) if x.shape[i] > 1 else 0 for i in range(3)]


def _aligned(x: Tensor, num_bytes: int) -> bool:
    steps = [step * x.itemsize for n, step in zip(x.shape[:3], x.stride()) if n > 1]
    return x.data_ptr() % num_bytes == 0 and all(step > 0 and step % num_bytes == 0 for step in steps)
