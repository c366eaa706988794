"""Tree attention against its peers, on a table of cases and on variations of them.

A case is a name of `TABLE`, followed by changes: `gqa_b1_8k/T16/paged64` is `gqa_b1_8k` with a tree of 16 nodes over a
cache in blocks of 64. `changed` lists them.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from common import Pool, Prepared, Unsupported, import_peer, num_sets, relative_error
from torch import Tensor

from medusa_kernels import TokenTree, reference, tree_attention


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    heads_kv: int
    length: int  # committed tokens of each request; of the longest one with `ragged`
    head_dim: int = 128
    nodes: int = 64
    block_size: int | None = None
    fp8: bool = False
    window: int | None = None
    ragged: bool = False
    room: int = 0  # slots of a request, where these are more than it takes
    heads_first: bool = False  # the cache is stored [B, Hkv, S, D], as Medusa does, and passed transposed
    recorded: dict[str, float] = field(default_factory=dict, compare=False)  # µs on an H100, measured elsewhere

    @property
    def lengths(self) -> list[int]:
        """With `ragged` from 100 to `length` in equal ratios, not sorted."""
        if not self.ragged or self.batch == 1:
            return [self.length] * self.batch
        shortest = min(100, self.length)
        ratio = (self.length / shortest) ** (1 / (self.batch - 1))
        step = next(s for s in (7, 5, 3, 1) if math.gcd(s, self.batch) == 1)
        return [round(shortest * ratio ** (i * step % self.batch)) for i in range(self.batch)]

    @property
    def capacity(self) -> int:
        """Slots of a request, in whole blocks of 64."""
        return -(-max(max(self.lengths) + self.nodes, self.room) // 64) * 64

    @property
    def keys(self) -> int:
        """Keys that some node of a request attends to, summed over requests: the root's window begins first."""
        seen = (min(length, self.window - 1) if self.window else length for length in self.lengths)
        return sum(seen) + self.batch * self.nodes

    @property
    def num_bytes(self) -> int:
        """K and V, each read once."""
        return 2 * self.keys * self.heads_kv * self.head_dim * (1 if self.fp8 else 2)

    @property
    def flops(self) -> int:
        """Two matmuls over every (node, key) pair, masked ones too."""
        return 4 * self.nodes * self.keys * self.heads * self.head_dim


# Names of the columns of times recorded on an H100 earlier; they are shown as "recorded" and enter no ratio.
_RECORDED = ("xqa", "flashinfer_fa2", "fa4_mask", "fa4_no_mask", "fa2_no_mask", "sdpa", "vllm_split", "sglang", "eager")


def _case(name: str, batch: int, heads: int, heads_kv: int, length: int, recorded: tuple, head_dim: int = 128) -> Case:
    times = {peer: us for peer, us in zip(_RECORDED, recorded) if us is not None}
    return Case(name, batch, heads, heads_kv, length, head_dim, recorded=times)


TABLE = {
    case.name: case
    for case in (
        _case("mha_b1_1k", 1, 32, 32, 1024, (30, 33, None, None, 18, 61, 48, 73, 45)),
        _case("mha_b1_4k", 1, 32, 32, 4096, (53, 69, None, None, 65, 207, 127, 284, 151)),
        _case("mha_b1_16k", 1, 32, 32, 16384, (134, 214, None, None, 112, 805, 419, 1089, 581)),
        _case("mha_b8_2k", 8, 32, 32, 2048, (136, 209, 197, 109, 120, 175, 542, 291, 655)),
        _case("gqa_b1_1k", 1, 32, 8, 1024, (29, 31, None, None, 20, 63, 42, 67, 66)),
        _case("gqa_b1_8k", 1, 32, 8, 8192, (104, 97, None, None, 44, 397, 210, 517, 467)),
        _case("gqa_b1_32k", 1, 32, 8, 32768, (260, 311, None, None, 126, 1548, 810, 2068, 1816)),
        _case("gqa_b8_4k", 8, 32, 8, 4096, (305, 354, 110, 59, 142, 307, 823, 532, 1730)),
        _case("gqa_b32_2k", 32, 32, 8, 2048, (504, 609, 248, 131, 245, 614, 1915, 1114, 3715)),
        _case("q70_b1_16k", 1, 64, 8, 16384, (303, 310, None, None, 121, 793, 726, 1032, 1647)),
        _case("small_b1_1k", 1, 9, 3, 1024, (10, 23, None, None, 15, 76, 13, 70, 32), head_dim=64),
    )
}

# Off the table: more nodes, head dims, groups, batches and lengths.
_NODES = [f"{base}/T{t}" for base in ("mha_b1_4k", "gqa_b1_8k") for t in (1, 2, 8, 16, 26, 64, 128, 256)]
_DIMS = [f"{base}/D{d}" for base in ("mha_b1_4k", "gqa_b1_8k") for d in (64, 96, 256)]  # theirs is 128
_GROUPS = [f"gqa_b1_8k/G{g}" for g in (1, 3, 4, 7, 8, 16)]
_BATCHES = [f"gqa_b1_8k/L32768/B{b}/ragged" for b in (4, 16, 64)]
# Lengths as they come: not whole tiles.
_UNALIGNED = ["mha_b1_1k/L1000", "mha_b1_4k/L4000", "mha_b8_2k/L2000",
              "gqa_b1_1k/L1000", "gqa_b1_8k/L8000", "gqa_b8_4k/L4000"]  # fmt: skip
_WINDOWS = [f"{base}/window4096" for base in ("mha_b1_16k", "gqa_b1_32k", "gqa_b8_4k")]
# Half full, as a decoder's caches are.
_ROOMS = [f"mha_b1_4k/T{t}/room8192" for t in (1, 16, 64, 128, 256)]
_ROOMS += [f"gqa_b1_8k/T{t}/room16384" for t in (1, 16, 64, 128, 256)]
_CACHES = [f"{name}/{change}" for name in TABLE for change in ("paged16", "paged64", "fp8", "heads_first")]
SETS: dict[str, list[str]] = {
    "table": list(TABLE),
    "nodes": _NODES,
    "dims": _DIMS,
    "groups": _GROUPS,
    "ragged": _BATCHES,
    "window": _WINDOWS,
    "unaligned": _UNALIGNED,
    "room": _ROOMS,
    "caches": _CACHES,
    "sweep": _NODES + _DIMS + _GROUPS + _BATCHES + _WINDOWS + _UNALIGNED,
}
# Too small to say anything about speed: the smoke test of a machine without a GPU.
TINY = [
    Case("tiny_mha", 1, 2, 2, 40, 16, 16),
    Case("tiny_gqa_ragged", 3, 4, 2, 40, 16, 16, ragged=True),
    Case("tiny_paged", 2, 4, 2, 48, 16, 16, block_size=16),
    Case("tiny_window", 1, 4, 2, 40, 16, 16, window=9),
]


def parse_case(name: str) -> Case:
    """`base/change/..`; changes: T8, D64, G4, B8, L4096, paged16, window4096, room8192 (any number), fp8, ragged,
    heads_first."""
    base, *changes = name.split("/")
    case = {**TABLE, **{c.name: c for c in TINY}}.get(base)
    if case is None:
        raise ValueError(f"cases: no case {base!r}; known: {', '.join(TABLE)}")
    return replace(case, **changed(case, changes, name)) if changes else case


def changed(case: Case, changes: list[str], name: str) -> dict:
    """What to replace in `case`. G keeps the KV heads and sets heads = G * heads_kv."""
    fields: dict = {"name": name, "recorded": {}}
    numbers = {"T": "nodes", "D": "head_dim", "B": "batch", "L": "length", "paged": "block_size", "window": "window",
               "room": "room"}  # fmt: skip
    for change in changes:
        word = change.rstrip("0123456789")
        number = change[len(word) :]
        if change in ("fp8", "ragged", "heads_first"):
            fields[change] = True
        elif word in numbers and number:
            fields[numbers[word]] = int(number)
        elif word == "G" and number:
            fields["heads"] = int(number) * case.heads_kv
        else:
            raise ValueError(f"cases: cannot read {change!r} in {name!r}")
    return fields


def tree_for(nodes: int) -> TokenTree:
    """Medusa's `mc_sim_7b_63` where it fits, else the best tree of that size for heads of falling accuracy."""
    if nodes == 1:
        return TokenTree.from_parents(torch.tensor([-1]))
    if nodes == 64:
        return TokenTree.preset("mc_sim_7b_63")
    head, rank = torch.arange(5).view(-1, 1), torch.arange(10)
    return TokenTree.search(0.6 * 0.85**head * 0.4**rank, nodes)


@dataclass
class Inputs:
    """The rotated inputs of a case. Caches are [B, S, Hkv, D], or [blocks, block_size, Hkv, D] in a shuffled order."""

    case: Case
    tree: TokenTree
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    cache_seqlens: Tensor
    block_table: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.cache_seqlens.device

    @property
    def uniform(self) -> bool:
        return len(set(self.case.lengths)) == 1

    def arguments(self, i: int) -> tuple:
        return self.q[i], self.k[i], self.v[i], self.tree, self.cache_seqlens

    @property
    def keywords(self) -> dict:
        return {"block_table": self.block_table, "window": self.case.window}

    @cached_property
    def mask(self) -> Tensor:
        """[B, T, keys of the longest request] bool, prefix and tree: what a peer that takes any mask is given."""
        case, tree = self.case, self.tree
        longest = max(case.lengths) + case.nodes
        length = self.cache_seqlens.long().view(-1, 1, 1)
        slot = torch.arange(longest, device=self.device).view(1, 1, -1)
        node = (slot - length).clamp(0, case.nodes - 1).expand(case.batch, case.nodes, longest)
        in_tree = (slot >= length) & (slot < length + case.nodes)
        ancestors = tree.mask.expand(case.batch, -1, -1).gather(2, node)
        mask = (slot < length) | (in_tree & ancestors)
        if case.window:
            depths = tree.depths.long()
            position = torch.where(slot < length, slot, length + depths[node])
            mask &= position > (length + depths.view(1, -1, 1) - case.window)
        return mask

    @cached_property
    def references(self) -> dict[int, Tensor]:
        return {}

    def error(self, i: int, out: Tensor) -> tuple[float, bool]:
        """Relative error of set `i` against float64, and whether it is one that rounding explains."""
        if i not in self.references:
            self.references[i] = reference.tree_attention(*self.arguments(i), **self.keywords, upcast=True)
        error = relative_error(out.view(self.references[i].shape), self.references[i])
        return error, error < tolerance(self.q[0].dtype, self.case.fp8)


def tolerance(dtype: torch.dtype, fp8: bool) -> float:
    """A good bf16 kernel is off by about 2.2e-3, and one wrong key in 16384 changes a row by more than 6e-3."""
    if fp8:
        return 5e-2  # peers that round the probabilities to e4m3 too
    return {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]


def pool_numel(cases: list[Case], l2_bytes: int) -> int:
    """Elements that the largest case needs."""
    most = 0
    for case in cases:
        kv, q = (
            case.batch * case.capacity * case.heads_kv * case.head_dim,
            case.batch * case.nodes * case.heads * case.head_dim,
        )
        most = max(most, num_sets(case.num_bytes, l2_bytes) * (2 * kv + q + 3 * 128))
    return most


def make_inputs(case: Case, pool: Pool, l2_bytes: int) -> Inputs:
    pool.reset()
    device = pool.data.device
    sets = num_sets(case.num_bytes, l2_bytes)
    rows = case.batch * case.capacity
    shape = (case.batch, case.capacity) if case.block_size is None else (rows // case.block_size, case.block_size)
    shape = (*shape, case.heads_kv, case.head_dim)
    q = [pool.take(case.batch, case.nodes, case.heads, case.head_dim) for _ in range(sets)]
    k, v = ([pool.take(*shape) for _ in range(sets)] for _ in range(2))
    if case.fp8:
        k, v = ([x.to(torch.float8_e4m3fn) for x in xs] for xs in (k, v))
    if case.heads_first:
        k, v = ([x.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2) for x in xs] for xs in (k, v))
    table = None
    if case.block_size is not None:
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0)).int()
        table = order.view(case.batch, -1).to(device)
    tree = tree_for(case.nodes).to(device)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return Inputs(case, tree, q, k, v, lengths, table)


# ---- contenders: from inputs to calls that return [B, T, H, D], one a set ----


def _prepared(inputs: Inputs, calls: list[Callable[[], Tensor]], **more) -> Prepared:
    return Prepared(calls, lambda i: inputs.error(i, calls[i]()), **more)


def ours(inputs: Inputs, **more) -> Prepared:
    keywords = inputs.keywords | more
    return _prepared(inputs, [partial(tree_attention, *inputs.arguments(i), **keywords) for i in range(len(inputs.q))])


def ours_batch_invariant(inputs: Inputs) -> Prepared:
    if "batch_invariant" not in inspect.signature(tree_attention).parameters:
        raise Unsupported("tree_attention has no batch_invariant")
    return ours(inputs, batch_invariant=True)


def ours_append(inputs: Inputs) -> Prepared:
    """The nodes' rows of K and V given with the call, which writes them to the cache: as a decoder calls it."""
    if inputs.case.fp8:
        raise Unsupported("the rows of the nodes are rounded already")
    slots = inputs.cache_seqlens.long().unsqueeze(1) + torch.arange(inputs.case.nodes, device=inputs.device)
    where = torch.arange(inputs.case.batch, device=inputs.device).unsqueeze(1)
    if inputs.block_table is not None:
        size = inputs.k[0].shape[1]
        where, slots = inputs.block_table.long().gather(1, slots // size), slots % size
    calls = [
        partial(tree_attention, *inputs.arguments(i), k=inputs.k[i][where, slots], v=inputs.v[i][where, slots],
                **inputs.keywords)
        for i in range(len(inputs.q))
    ]  # fmt: skip
    return _prepared(inputs, calls)


def _contiguous_only(inputs: Inputs, name: str) -> None:
    if inputs.case.block_size is not None:
        raise Unsupported(f"{name} takes no block table")
    if inputs.case.fp8:
        raise Unsupported(f"{name} takes no fp8 cache")


def _dense(inputs: Inputs, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, Hkv, keys, D], as views."""
    longest = max(inputs.case.lengths) + inputs.case.nodes
    return inputs.q[i].transpose(1, 2), *(x[i][:, :longest].transpose(1, 2) for x in (inputs.k, inputs.v))


def eager_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention as model code without a kernel spells it. Returns [B, T, H, D]."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def _bias(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, keys], 0 or -inf; rows are padded to a multiple of 8, which SDPA's kernels need."""
    mask = inputs.mask
    width = -(-mask.shape[-1] // 8) * 8
    bias = torch.full((*mask.shape[:2], width), -math.inf, dtype=dtype, device=mask.device)
    bias[..., : mask.shape[-1]].masked_fill_(mask, 0.0)
    return bias[..., : mask.shape[-1]].unsqueeze(1)


def eager(inputs: Inputs) -> Prepared:
    _contiguous_only(inputs, "eager")
    bias = _bias(inputs, inputs.q[0].dtype)
    return _prepared(inputs, [partial(eager_attention, *_dense(inputs, i), bias) for i in range(len(inputs.q))])


def sdpa(inputs: Inputs) -> Prepared:
    """The plain call: torch chooses the backend."""
    _contiguous_only(inputs, "SDPA")
    bias, case = _bias(inputs, inputs.q[0].dtype), inputs.case

    def call(i: int) -> Tensor:
        out = F.scaled_dot_product_attention(*_dense(inputs, i), bias, enable_gqa=case.heads != case.heads_kv)
        return out.transpose(1, 2)

    return _prepared(inputs, [partial(call, i) for i in range(len(inputs.q))])


def _sdpa_folded(inputs: Inputs, backend: str) -> Prepared:
    """One backend, the group's heads folded into the rows, so that K and V are not copied out to H heads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _contiguous_only(inputs, "SDPA")
    case = inputs.case
    group, kernel = case.heads // case.heads_kv, getattr(SDPBackend, backend)
    # Rows of a KV head: node * G + head of the group.
    bias = _bias(inputs, inputs.q[0].dtype).repeat_interleave(group, 2)
    if bias.shape[-1] % 8:
        raise Unsupported("SDPA's kernels take masks of a width of a multiple of 8")

    def call(i: int) -> Tensor:
        q = inputs.q[i].unflatten(2, (case.heads_kv, group)).transpose(1, 2).flatten(2, 3)  # [B, Hkv, T * G, D]
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(q, *_dense(inputs, i)[1:], bias)
        return out.unflatten(2, (case.nodes, group)).transpose(1, 2).flatten(2, 3)

    try:
        call(0)
    except RuntimeError as error:
        raise Unsupported(f"torch: {str(error).splitlines()[0][:120]}") from None
    return _prepared(inputs, [partial(call, i) for i in range(len(inputs.q))])


def sdpa_efficient(inputs: Inputs) -> Prepared:
    return _sdpa_folded(inputs, "EFFICIENT_ATTENTION")


def sdpa_cudnn(inputs: Inputs) -> Prepared:
    return _sdpa_folded(inputs, "CUDNN_ATTENTION")


def flex(inputs: Inputs) -> Prepared:
    """FlexAttention with the tree as a mask_mod over prefix and tail, compiled once a case (eager on a CPU)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _contiguous_only(inputs, "FlexAttention")
    case, tree, lengths = inputs.case, inputs.tree, inputs.cache_seqlens
    tree_mask, depths = tree.mask, tree.depths

    def mask_mod(b, h, node, slot):
        length = lengths[b]
        column = (slot - length).clamp(0, case.nodes - 1)
        seen = (slot < length) | ((slot < length + case.nodes) & tree_mask[node, column])
        if case.window:
            position = torch.where(slot < length, slot, length + depths[column])
            seen = seen & (position > length + depths[node] - case.window)
        return seen

    longest = max(case.lengths) + case.nodes
    batches = None if inputs.uniform else case.batch
    block_mask = create_block_mask(mask_mod, batches, None, case.nodes, longest, device=str(inputs.device))
    attend, options = flex_attention, None
    if inputs.device.type == "cuda":
        torch._dynamo.reset()
        attend = torch.compile(flex_attention, dynamic=False)
        if case.nodes * case.heads // case.heads_kv > 128:
            # Its decoding kernel takes all rows of a KV head as one tile, which may not exceed the 128 rows of a block
            # in the mask (pytorch/pytorch#185349); with tiles of 128 it runs, at a fifth of the other kernel's speed.
            options = {"FORCE_USE_FLEX_ATTENTION": True}

    def call(i: int) -> Tensor:
        out = attend(
            *_dense(inputs, i), block_mask=block_mask, enable_gqa=case.heads != case.heads_kv, kernel_options=options
        )
        return out.transpose(1, 2)

    return _prepared(inputs, [partial(call, i) for i in range(len(inputs.q))])


def _blocks(inputs: Inputs, block_size: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The caches as blocks and a table, for peers that know no other cache: a contiguous one is cut in order."""
    if inputs.block_table is not None:
        return inputs.k, inputs.v, inputs.block_table
    case = inputs.case
    if case.heads_first:
        raise Unsupported("cannot cut a [B, Hkv, S, D] cache into blocks")
    k, v = ([x.view(-1, block_size, case.heads_kv, case.head_dim) for x in xs] for xs in (inputs.k, inputs.v))
    blocks = torch.arange(k[0].shape[0], dtype=torch.int32, device=inputs.device)
    return k, v, blocks.view(case.batch, -1)


def _used_blocks(case: Case, table: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A table as FlashInfer's plans take it: where a request's blocks begin, blocks in use, slots used of the last."""
    keys = [length + case.nodes for length in case.lengths]
    used = [-(-n // block_size) for n in keys]
    return (
        torch.tensor([0, *used]).cumsum(0).int(),
        torch.cat([table[b, :n] for b, n in enumerate(used)]),
        torch.tensor([(n - 1) % block_size + 1 for n in keys], dtype=torch.int32),
    )


def _workspace(inputs: Inputs) -> Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device=inputs.device)


def flashinfer_fa2(inputs: Inputs) -> Prepared:
    """FlashInfer's FA2 prefill kernel over a paged cache, with the whole mask as bits."""
    flashinfer, case = import_peer("flashinfer", inputs.device), inputs.case
    if case.fp8:
        raise Unsupported("not compared with an fp8 cache")
    block_size = case.block_size or 64
    k, v, table = _blocks(inputs, block_size)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(inputs), "NHD", backend="fa2")
    wrapper.plan(
        torch.arange(case.batch + 1, dtype=torch.int32) * case.nodes,
        *_used_blocks(case, table, block_size), case.heads, case.heads_kv, case.head_dim, block_size,
        custom_mask=torch.cat(
            [inputs.mask[b, :, : length + case.nodes].flatten() for b, length in enumerate(case.lengths)]
        ),
        q_data_type=inputs.q[0].dtype, kv_data_type=k[0].dtype,
    )  # fmt: skip
    return _prepared(inputs, [partial(wrapper.run, q.flatten(0, 1), tuple(kv)) for q, *kv in zip(inputs.q, k, v)])


def flashinfer_decode(inputs: Inputs) -> Prepared:
    """FlashInfer's decode kernel over a paged cache, with tensor cores where its documentation advises them."""
    flashinfer, case = import_peer("flashinfer", inputs.device), inputs.case
    if case.nodes > 1 or case.fp8 or case.window:
        raise Unsupported("one node, no fp8 cache, no window")
    block_size = case.block_size or 64
    k, v, table = _blocks(inputs, block_size)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(inputs), "NHD", use_tensor_cores=case.heads // case.heads_kv >= 4
    )
    wrapper.plan(
        *_used_blocks(case, table, block_size), case.heads, case.heads_kv, case.head_dim, block_size,
        q_data_type=inputs.q[0].dtype, kv_data_type=k[0].dtype,
    )  # fmt: skip
    return _prepared(inputs, [partial(wrapper.run, q.flatten(0, 1), tuple(kv)) for q, *kv in zip(inputs.q, k, v)])


def packed_words(mask: Tensor) -> Tensor:
    """[B, T, 2 * ceil(T / 32)] uint16: rows of bits in whole 32-bit words, as XQA takes a tree's mask [B, T, T]."""
    size = mask.shape[-1]
    words = -(-size // 32)
    bits = F.pad(mask, (0, words * 32 - size)).unflatten(-1, (words, 32)).long()
    word = (bits << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(word < 1 << 31, word, word - (1 << 32)).int().view(torch.uint16)


def xqa(inputs: Inputs) -> Prepared:
    """FlashInfer's XQA: paged cache; with more than one node its speculative-decoding mode, the tree's mask as bits."""
    flashinfer, case = import_peer("flashinfer", inputs.device), inputs.case
    if case.window:
        raise Unsupported("no tree mask with a window")
    if case.fp8:
        raise Unsupported("not compared with an fp8 cache")
    block_size = case.block_size or 64
    k, v, table = _blocks(inputs, block_size)
    device = inputs.device
    is_tree = case.nodes > 1
    mask = packed_words(inputs.tree.mask.expand(case.batch, -1, -1)) if is_tree else None
    keys = (inputs.cache_seqlens + case.nodes).view(torch.uint32).unsqueeze(1)
    scratch = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    semaphores = torch.zeros(8 << 20, dtype=torch.uint8, device=device).view(torch.uint32)  # left zero by each call

    def call(i: int) -> Tensor:
        out = torch.empty_like(inputs.q[i])
        q, to = (x.unsqueeze(1) if is_tree else x for x in (inputs.q[i], out))
        flashinfer.xqa(
            q, k[i], v[i], table, keys, to, scratch, semaphores,
            case.heads_kv, block_size, q_seq_len=case.nodes, mask=mask,
        )  # fmt: skip
        return out

    return _prepared(inputs, [partial(call, i) for i in range(len(inputs.q))])


def _no_mask_prepared(inputs: Inputs, calls: list[Callable[[], Tensor]]) -> Prepared:
    """Every node sees every key: less work than ours, checked against the same without a mask."""

    def check(i: int) -> tuple[float, bool]:
        case, out = inputs.case, calls[i]().double()
        error = 0.0
        for b, length in enumerate(case.lengths):
            slots = torch.arange(length + case.nodes, device=inputs.device)
            place = (b, slots)
            if inputs.block_table is not None:
                place = (inputs.block_table[b].long()[slots // case.block_size], slots % case.block_size)
            group = case.heads // case.heads_kv
            k, v = (x[i][place].double().repeat_interleave(group, 1) for x in (inputs.k, inputs.v))
            scores = torch.einsum("thd,shd->hts", inputs.q[i][b].double(), k) * case.head_dim**-0.5
            expected = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
            error = max(error, relative_error(out[b], expected))
        return error, error < tolerance(inputs.q[0].dtype, case.fp8)

    return Prepared(calls, check, same_work=False)


def fa2_no_mask(inputs: Inputs) -> Prepared:
    """flash-attention 2 with split-KV over the same cache, no mask."""
    flash_attn, case = import_peer("flash_attn.flash_attn_interface", inputs.device), inputs.case
    if case.fp8 or case.window or (case.block_size or 256) % 256:
        raise Unsupported("FA2 takes no fp8 cache, no window by depth, and blocks of 256 alone")
    keys = inputs.cache_seqlens + case.nodes
    attend = flash_attn.flash_attn_with_kvcache
    more = {"cache_seqlens": keys, "block_table": inputs.block_table}
    return _no_mask_prepared(inputs, [partial(attend, *qkv, **more) for qkv in zip(inputs.q, inputs.k, inputs.v)])


def _fa4_calls(inputs: Inputs, **more) -> list[Callable[[], Tensor]]:
    fa4, case = import_peer("flash_attn.cute.interface", inputs.device), inputs.case
    _contiguous_only(inputs, "FA4 here")
    if not inputs.uniform or case.window:
        raise Unsupported("FA4 here: equal lengths, no window")
    keys = case.length + case.nodes

    def call(i: int) -> Tensor:
        out = fa4.flash_attn_func(inputs.q[i], inputs.k[i][:, :keys], inputs.v[i][:, :keys], **more)
        return out[0] if isinstance(out, tuple) else out

    return [partial(call, i) for i in range(len(inputs.q))]


def fa4_no_mask(inputs: Inputs) -> Prepared:
    return _no_mask_prepared(inputs, _fa4_calls(inputs))


def fa4_mask(inputs: Inputs) -> Prepared:
    """FA4 with the tree as a mask_mod that reads a [T, keys] table, as its document masks do."""
    import_peer("flash_attn.cute.interface", inputs.device)
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    @cute.jit
    def mask_mod(batch, head, node, slot, seqlen_info, aux_tensors):
        seen = utils.scalar_to_ssa(aux_tensors[0][node[0], slot[0]], cutlass.Int32)
        return seen > utils.scalar_to_ssa(0, cutlass.Int32)

    # Tiles reach past the last node and the last key.
    table = F.pad(inputs.mask[0].int(), (0, 256, 0, -inputs.case.nodes % 256)).contiguous()
    return _prepared(inputs, _fa4_calls(inputs, mask_mod=mask_mod, aux_tensors=[table]))


CONTENDERS: dict[str, Callable[[Inputs], Prepared]] = {
    f.__name__: f
    for f in (
        ours, ours_append, ours_batch_invariant, eager, sdpa, sdpa_efficient, sdpa_cudnn, flex, flashinfer_fa2,
        flashinfer_decode, xqa, fa4_mask, fa4_no_mask, fa2_no_mask,
    )
}  # fmt: skip
