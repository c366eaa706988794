"""KV-cache compaction against its peers: the accepted path's rows of all layers, moved in place.

The sets are trees at different slots of one large cache, so that each call moves rows that no call before it touched.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from common import Pool, Prepared, Unsupported, num_sets
from torch import Tensor

from medusa_kernels import reference
from medusa_kernels.kv_cache import compact_kv_cache

PATH = (0, 3, 9, 21, 40)  # 5 tokens; the root's row stays where it is
TREE_SLOTS = 64
SLACK = 128  # cache_seqlens grow by 5 a call until a graph resets them


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    layers: int
    heads_kv: int
    head_dim: int = 128
    recorded: dict[str, float] = field(default_factory=dict, compare=False)  # µs on an H100, measured elsewhere

    @property
    def row_bytes(self) -> int:
        """One token's K and V in all layers, bf16."""
        return self.layers * 2 * self.heads_kv * self.head_dim * 2

    @property
    def num_bytes(self) -> int:
        """The path's rows, read once and written once."""
        return 2 * len(PATH) * self.batch * self.row_bytes

    @property
    def flops(self) -> int:
        return 0


TABLE = {
    case.name: case
    for case in (
        Case("mha_b1", 1, 32, 32, recorded={"medusa": 12}),
        Case("gqa_b1", 1, 32, 8, recorded={"medusa": 6}),
        Case("gqa_b8", 8, 32, 8),
    )
}
SETS = {"table": list(TABLE)}
TINY = [Case("tiny_b1", 1, 2, 2, 8), Case("tiny_b3", 3, 2, 2, 8)]


def parse_case(name: str) -> Case:
    for case in (*TABLE.values(), *TINY):
        if case.name == name:
            return case
    raise ValueError(f"cases: no case {name!r}; known: {', '.join(TABLE)}")


def _sets(case: Case, l2_bytes: int) -> int:
    return max(16, num_sets(case.num_bytes / 2, l2_bytes))


def _slots(case: Case, l2_bytes: int) -> int:
    return _sets(case, l2_bytes) * TREE_SLOTS + SLACK


@dataclass
class Inputs:
    case: Case
    kv: Tensor  # [layers, 2, B, S, Hkv, D]
    path: Tensor  # [B, 5] int32
    accept_length: Tensor  # [B] int32
    lengths: Tensor  # [sets, B] int32: cache_seqlens of each set, which the calls advance
    start: Tensor  # what they are before

    def reset(self) -> None:
        self.lengths.copy_(self.start)


def pool_numel(cases: list[Case], l2_bytes: int) -> int:
    return max(c.batch * _slots(c, l2_bytes) * c.row_bytes // 2 for c in cases)


def make_inputs(case: Case, pool: Pool, l2_bytes: int) -> Inputs:
    pool.reset()
    device = pool.data.device
    kv = pool.take(case.layers, 2, case.batch, _slots(case, l2_bytes), case.heads_kv, case.head_dim)
    path = torch.tensor(PATH, dtype=torch.int32, device=device).expand(case.batch, -1).contiguous()
    start = torch.arange(_sets(case, l2_bytes), dtype=torch.int32, device=device).view(-1, 1) * TREE_SLOTS
    start = start.expand(-1, case.batch).contiguous()
    accept_length = torch.full((case.batch,), len(PATH) - 1, dtype=torch.int32, device=device)
    return Inputs(case, kv, path, accept_length, start.clone(), start)


def _prepared(inputs: Inputs, calls: list[Callable[[], None]]) -> Prepared:
    def check(i: int) -> tuple[float, bool]:
        """Elements of the tree's slots that differ from the reference's, and requests of a wrong length."""
        inputs.reset()
        at = int(inputs.start[i, 0])
        window = inputs.kv[:, :, :, at : at + TREE_SLOTS]
        expected, lengths = window.clone(), torch.zeros_like(inputs.start[i])
        reference.compact_kv_cache(expected, inputs.path, inputs.accept_length, lengths)
        calls[i]()
        wrong = int((window != expected).sum()) + int((inputs.lengths[i] != inputs.start[i] + lengths).sum())
        inputs.reset()
        return float(wrong), wrong == 0

    return Prepared(calls, check, prologue=inputs.reset)


def ours(inputs: Inputs) -> Prepared:
    compact = partial(compact_kv_cache, inputs.kv, inputs.path, inputs.accept_length)
    return _prepared(inputs, [partial(compact, lengths) for lengths in inputs.lengths])


def _one_request(inputs: Inputs) -> None:
    if inputs.case.batch > 1:
        raise Unsupported("one request, whose path and length the host knows")


def medusa(inputs: Inputs) -> Prepared:
    """Medusa's `update_inference_inputs`: an index and a copy over the stacked cache, path and length on the host."""
    _one_request(inputs)
    path = torch.tensor(PATH, device=inputs.kv.device)

    def call(i: int) -> None:
        at = i * TREE_SLOTS
        rows = inputs.kv.index_select(3, selected[i])
        inputs.kv[:, :, :, at : at + len(PATH)].copy_(rows)
        inputs.lengths[i].fill_(at + len(PATH))

    selected = [path + i * TREE_SLOTS for i in range(len(inputs.start))]
    return _prepared(inputs, [partial(call, i) for i in range(len(inputs.start))])


def per_layer(inputs: Inputs) -> Prepared:
    """The same for a cache that is a list of tensors: an index and a copy for K and for V of each layer."""
    _one_request(inputs)
    caches = [cache for layer in inputs.kv for cache in layer]
    path = torch.tensor(PATH, device=inputs.kv.device)
    selected = [path + i * TREE_SLOTS for i in range(len(inputs.start))]

    def call(i: int) -> None:
        at = i * TREE_SLOTS
        for cache in caches:
            cache[:, at : at + len(PATH)].copy_(cache.index_select(1, selected[i]))
        inputs.lengths[i].fill_(at + len(PATH))

    return _prepared(inputs, [partial(call, i) for i in range(len(inputs.start))])


def indexed(inputs: Inputs) -> Prepared:
    """A batch without reading anything back: rows gathered and written by an index, all layers at once. As the index
    has one shape, it moves `accept_length + 1` rows only where all requests accept as many, as here."""
    request = torch.arange(inputs.case.batch, device=inputs.kv.device).unsqueeze(1)
    node = torch.arange(len(PATH), device=inputs.kv.device)

    def call(lengths: Tensor) -> None:
        at = lengths.unsqueeze(1)
        inputs.kv[:, :, request, at + node] = inputs.kv[:, :, request, at + inputs.path]
        lengths.add_(inputs.accept_length + 1)

    return _prepared(inputs, [partial(call, lengths) for lengths in inputs.lengths])


CONTENDERS: dict[str, Callable[[Inputs], Prepared]] = {f.__name__: f for f in (ours, medusa, per_layer, indexed)}
