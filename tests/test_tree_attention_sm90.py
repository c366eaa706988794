"""Hopper's CUDA kernel for tree attention against the reference, with every block size and number of splits."""

import ctypes
import itertools
import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_attention import Case, as_bytes, check

from medusa_kernels import _sm90, attention, tree_attention
from medusa_kernels._calls import Launch

NAN = float("nan")
BASE = {
    "lengths": [1000, 130], "num_nodes": [64, 64], "size": 64, "group": 4, "head_dim": 128, "dtype": torch.bfloat16,
}  # fmt: skip


def kernel(groups=1, num_splits=None, stages=None, cluster=None):
    def run(q, k_cache, v_cache, tree, cache_seqlens, config=None, **kw):
        k, v, table = kw.get("k"), kw.get("v"), kw.get("block_table")
        out = torch.full_like(q, NAN)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), NAN, dtype=torch.float32)
        launch = _sm90.prepare(
            q, k_cache, v_cache, k, v, tree.packed_mask, table, None, kw.get("k_scale"), 0, 0.0, q.shape[-1] ** -0.5,
            out, attention._sms_and_arch(0)[0], groups, num_splits, stages, cluster,
        )  # fmt: skip
        assert launch is not None
        tensors = (
            q, k_cache, v_cache, k, v, tree.packed_mask, None, tree.num_nodes, cache_seqlens, table, None,
            kw.get("k_scale"), kw.get("v_scale"), out, lse,
        )  # fmt: skip
        launch([0 if x is None else x.data_ptr() for x in tensors])
        return out, lse

    return run


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("num_splits", [None, 1, 2, 3, 5, 8, 13, 16])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"head_dim": 64}, {"append": True, "block_size": 16}, {"lengths": [0, 64], "num_nodes": [64, 40]},
        *({"size": 130, "num_nodes": [130, 127], "append": new, "group": 1} for new in (False, True)),
        {"fp8": True}, {"fp8": True, "head_dim": 64, "append": True, "block_size": 16},
    ],
    ids=str,
)  # fmt: skip
def test_gpu_blocks_and_splits(hopper, options, num_splits, groups):
    """lengths [0, 64]: more splits than tiles, and tiles that hold nodes alone."""
    check(Case(**{**BASE, "heads_kv": 1, **options}, device="cuda"), kernel(groups, num_splits, cluster=False))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"head_dim": 64}, {"dtype": torch.float16}, {"append": True, "block_size": 16, "head_dim": 64},
        {"lengths": [0, 64], "num_nodes": [64, 40]}, {"size": 7, "num_nodes": [7, 0], "group": 1, "head_dim": 64},
        {"size": 130, "num_nodes": [130, 127], "append": True, "group": 1},
    ],
    ids=str,
)  # fmt: skip
def test_gpu_clusters(hopper, options, num_splits):
    """Splits that merge in a cluster; again, as who comes first differs: the same bits."""
    case, run = Case(**{**BASE, "heads_kv": 1, **options}, device="cuda"), kernel(1, num_splits, cluster=True)
    check(case, run)
    q, k_cache, v_cache, tree, lengths, kw = case.build()
    first = run(q, k_cache, v_cache, tree, lengths, **kw)
    for _ in range(20):
        again = run(q, k_cache, v_cache, tree, lengths, **kw)
        assert all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(again, first))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpu_more_clusters_than_fit(hopper, head_dim):
    """They take turns."""
    options = {"lengths": [300, 1000], "heads_kv": 16, "size": 32, "num_nodes": [32, 32], "head_dim": head_dim}
    check(Case(**{**BASE, **options}, device="cuda"), kernel(1, 4, cluster=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"size": 1, "group": 4}, {"fp8": True}, {"head_dim": 64, "block_size": 16}], ids=str
)
@pytest.mark.parametrize("append, cluster", [(False, False), (True, False), (True, True)])
def test_gpu_splits_by_length(hopper, options, append, cluster):
    """Requests of one batch on both sides of every level, and such as have nothing: blocks without a part."""
    case = {**BASE, "heads_kv": 1, "size": 16, "append": append, **options}
    size = case["size"]
    rows, fp8 = size * case["group"], case.get("fp8", False)
    if cluster and fp8:
        pytest.skip("an fp8 cache has none")
    levels = _sm90.choose_levels(rows, 12, 6003 + size, 132, case["head_dim"], fp8, None, cluster)[2]
    assert len({splits for _, splits in levels}) > 1
    lengths = [6000, *(tiles * 64 + more - size for tiles, _ in levels[1:] for more in (0, 1)), 1, 0, 0]
    lengths = (lengths + [777] * 12)[:12]
    num_nodes = [size] * 12
    num_nodes[7] = 0
    check(
        Case(**{**case, "lengths": lengths, "num_nodes": num_nodes}, device="cuda"), kernel(None, None, cluster=cluster)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [31, 33, 64])
@pytest.mark.parametrize("size", [1, 32])
@pytest.mark.parametrize("head_dim, fp8", [(128, False), (64, False), (128, True), (64, True)])
def test_gpu_most_splits(hopper, head_dim, fp8, size, num_splits):
    """What fits the memory in which a block merges the most splits there are."""
    options = {"lengths": [5000], "num_nodes": [size], "size": size, "heads_kv": 1, "head_dim": head_dim, "fp8": fp8}
    check(Case(**{**BASE, **options}, device="cuda"), kernel(2 if size > 16 else 1, num_splits))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("groups, stages", [(1, 3), (1, 4), (1, 6), (2, 3), (2, 4), (2, 5)])
@pytest.mark.parametrize("block_size", [None, 16])
def test_gpu_stages(hopper, groups, stages, num_splits, block_size):
    """Rings of all lengths, of which a row block has many rounds; blocks that stay, where unsplit."""
    options = {**BASE, "lengths": [1700, 900], "heads_kv": 2 if num_splits > 1 else 80, "block_size": block_size}
    check(Case(**options, append=True, device="cuda"), kernel(groups, num_splits, stages, cluster=False))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("head_dim, stages", [(128, 4), (128, 7), (64, 5), (64, 12)])
def test_gpu_stages_fp8(hopper, groups, head_dim, stages):
    options = {**BASE, "lengths": [1700, 900], "heads_kv": 80, "head_dim": head_dim}
    check(Case(**options, fp8=True, append=True, device="cuda"), kernel(groups, 1, stages))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16}, {"head_dim": 64, "dtype": torch.float16}, {"group": 1, "heads_kv": 3},
        {"group": 3, "heads_kv": 1, "head_dim": 64}, {"group": 8}, {"strided": True}, {"per_request": False},
        {"append": True}, {"append": True, "group": 1}, *({"block_size": n} for n in (16, 32, 64, 128)),
        {"block_size": 256, "append": True}, {"head_dim": 64, "append": True, "block_size": 16},
        {"num_nodes": [20, 7]}, {"num_nodes": [0, 64], "lengths": [0, 100]}, {"lengths": [0, 0]},
        {"lengths": [5, 63], "append": True}, {"lengths": [1024, 128]}, {"lengths": [64, 192], "num_nodes": [1, 60]},
        *({"size": t, "num_nodes": [t, max(t - 1, 1)], "append": t % 2 == 1} for t in (1, 5, 63, 65, 128, 130)),
        {"size": 512, "num_nodes": [512, 511], "group": 1, "lengths": [777, 3]},
        {"heads_kv": 40, "lengths": [1000, 130, 64, 0, 700], "num_nodes": [64, 60, 0, 64, 1], "append": True},
        *(  # more row blocks than multiprocessors, of unequal lengths: blocks that stay
            {"heads_kv": 40, "lengths": [1000, 130, 64, 0, 700], "num_nodes": [64, 60, 0, 64, 1], **more}
            for more in ({"block_size": 64}, {"head_dim": 64, "block_size": 16, "append": True}, {"strided": True})
        ),
        {"lengths": [5000, 37], "heads_kv": 8}, {"lengths": [5000, 37], "heads_kv": 8, "fp8": True},
        *(
            {"fp8": True, **more}
            for more in (
                {}, {"head_dim": 64}, {"append": True}, {"block_size": 16}, {"strided": True},
                {"num_nodes": [0, 64], "lengths": [0, 100], "append": True}, {"lengths": [5, 63], "append": True},
                {"size": 130, "num_nodes": [130, 127], "append": True, "group": 1},
                {"heads_kv": 40, "lengths": [1000, 130, 64, 0, 700], "num_nodes": [64, 60, 0, 64, 1], "append": True},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_gpu_kernel(hopper, options, groups):
    check(Case(**{**BASE, **options}, device="cuda"), kernel(groups))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 8])
@pytest.mark.parametrize("groups, fp8", [(1, False), (2, False), (1, True)])
def test_gpu_growing_scores(hopper, num_splits, groups, fp8):
    """The row maxima move up all along the cache, by less and by more than what the kernel lets them lag behind."""
    case = Case(**BASE, fp8=fp8, device="cuda")
    q, k_cache, v_cache, tree, lens, kw = case.build()
    grow = torch.linspace(0.0, 12.0, k_cache.shape[1], device="cuda").view(1, -1, 1, 1).exp2()
    k_cache.copy_(k_cache.to(q.dtype) * grow * q.new_tensor(0.02))
    case.build = lambda: (q, k_cache, v_cache, tree, lens, kw)
    check(case, kernel(groups, num_splits))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits, heads_kv", [(1, 8), (3, 8), (1, 80)])
@pytest.mark.parametrize("groups", [1, 2])
def test_gpu_same_bits_every_time(hopper, num_splits, heads_kv, groups):
    """heads_kv 80: two groups' blocks stay, and draw row blocks in another order every time."""
    q, *rest, kw = Case(**{**BASE, "lengths": [3000, 100], "heads_kv": heads_kv}, device="cuda").build()
    run = kernel(groups, num_splits)
    first = run(q, *rest, **kw)
    for _ in range(20):
        again = run(q, *rest, **kw)
        assert all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(first, again))


@pytest.mark.gpu
def test_gpu_graph_with_changing_lengths(hopper):
    case = Case(
        **{**BASE, "lengths": [700, 300, 5], "num_nodes": [64] * 3, "heads_kv": 8, "append": True}, device="cuda"
    )
    q, k_cache, v_cache, tree, lens, kw = case.build()
    k_cache, v_cache = k_cache.nan_to_num(0.5), v_cache.nan_to_num(0.5)
    run = lambda *args: tree_attention(*args, **kw)  # noqa: E731
    run(q, k_cache, v_cache, tree, lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(q, k_cache, v_cache, tree, lens)
    assert any(isinstance(again, Launch) for again in attention._known.values())
    for lengths in ([700, 300, 5], [0, 1, 2], [64, 699, 511]):
        lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        expected = run(q, k_cache.clone(), v_cache.clone(), tree, lens)
        out.fill_(NAN)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gpu_values_are_clamped_not_followed(hopper):
    q, k_cache, v_cache, tree, lens, kw = Case(**{**BASE, "block_size": 16}, device="cuda").build()
    k_cache, v_cache = k_cache.nan_to_num(0), v_cache.nan_to_num(0)
    for bad_length, bad_block in ((10**6, None), (-5, None), (100, 10**6), (100, -7)):
        lens.fill_(bad_length)
        if bad_block is not None:
            kw["block_table"] = torch.full_like(kw["block_table"], bad_block)
        for groups in (1, 2):
            out, _ = kernel(groups)(q, k_cache, v_cache, tree, lens, **kw)
            assert out.isfinite().all()


@pytest.mark.gpu
def test_gpu_splits_that_cannot_wait_for_each_other(hopper):
    """More blocks than fit the GPU at once would wait for ever."""
    q, *rest, kw = Case(**{**BASE, "heads_kv": 8}, device="cuda").build()
    for splits in (0, 65, 64):
        with pytest.raises(ValueError, match="num_splits: expected"):
            kernel(1, splits)(q, *rest, **kw)


def test_plan_is_the_kernels_struct():
    """Field by field, in order: nothing else holds the two sides together."""
    text = (Path(__file__).parent.parent / "csrc" / "tree_attention_sm90_args.h").read_text()
    body = re.search(r"struct AttentionPlan \{(.*?)\};", text, re.DOTALL)[1]
    levels = int(re.search(r"kLevels = (\d+);", text)[1])
    declared = []
    for kind, names in re.findall(r"^\s*(\w+) ([\w, \[\]]+);", body, re.MULTILINE):
        size = {"int64_t": 8, "double": 8, "RowStrides": 24}[kind]
        for name in names.split(","):
            count = levels if "[kLevels]" in name else 1
            declared.append((name.strip().removesuffix("[kLevels]"), count * size))
    assert declared == [(name, ctypes.sizeof(kind)) for name, kind in _sm90._Plan._fields_]


def test_choose():
    """Splits fit the GPU at once; none where blocks fill it without; more for a longer cache."""
    Choice = _sm90.Choice
    for rows, heads, capacity in ((64, 1, 100), (256, 8, 8256), (64, 32, 2048), (256, 64, 4160), (1, 600, 64)):
        chosen = _sm90.choose(rows, heads, capacity, 132)
        groups, splits = chosen.groups, chosen.num_splits
        blocks = heads * math.ceil(rows / (64 * groups))
        assert 1 <= splits <= min(_sm90.MAX_SPLITS, math.ceil(capacity / 64)) and groups <= (2 if rows > 64 else 1)
        assert splits == 1 or blocks * splits <= (264 if groups == 1 else 132)
    assert _sm90.choose(256, 64, 4160, 132) == Choice(2, False, 1)
    assert _sm90.choose(256, 8, 8256, 132) == Choice(1, False, 8)
    assert _sm90.choose(256, 8, 32832, 132) == Choice(2, False, 8)
    assert _sm90.choose(256, 128, 1064, 132) == Choice(2, False, 1)  # one group's blocks do not stay for a second wave
    assert _sm90.choose(256, 8, 1088, 132) == Choice(1, False, 4)
    assert _sm90.choose(256, 8, 1088, 132, groups=2).groups == 2
    assert _sm90.choose(128, 1, 320, 132).num_splits < _sm90.choose(128, 1, 8256, 132).num_splits


def test_choose_clusters():
    """For short caches of few KV heads, so that all clusters fit; of an fp8 cache none."""
    assert _sm90.choose(192, 3, 1088, 132, 64) == _sm90.Choice(1, True, 8)
    assert _sm90.choose(4, 8, 1025, 132) == _sm90.Choice(1, True, 8)
    assert not _sm90.choose(4, 8, 8193, 132).cluster and not _sm90.choose(4, 8, 1025, 132, fp8=True).cluster
    for rows, heads, capacity in itertools.product((1, 64, 200), (1, 3, 8, 32), (200, 1088, 4160)):
        chosen = _sm90.choose(rows, heads, capacity, 132, groups=1, cluster=True)
        blocks = heads * math.ceil(rows / 64) * chosen.num_splits
        assert chosen.num_splits == 1 or (chosen.num_splits <= 8 and blocks <= 105)


@pytest.mark.parametrize("rows, heads, capacity", [(256, 8, 8256), (4, 8, 32769), (64, 32, 300), (192, 3, 8256)])
def test_splits_by_length(rows, heads, capacity):
    """A request has the splits of a cache with room for no more than it; the levels are few, so not always quite."""
    groups, cluster, levels = _sm90.choose_levels(rows, heads, capacity, 132)
    half = _sm90.choose(rows, heads, capacity // 2, 132)
    assert (groups, cluster) == (half.groups, half.cluster)
    choose = partial(_sm90.choose, rows, heads, num_sms=132, groups=groups, cluster=cluster)
    assert len(levels) == _sm90.LEVELS and levels[0] == (0, choose(capacity=capacity).num_splits)
    for (reach, splits), (shorter, fewer) in pairwise([(capacity // 64, levels[0][1]), *levels[1:]]):
        assert (shorter, fewer) == (reach, splits) or (0 < shorter < reach and fewer < splits)
        assert fewer == choose(capacity=shorter * 64).num_splits
    if capacity == 8256 and rows == 256:
        assert (
            [splits for reach, splits in levels if 17 <= (reach or 1000)][-1] == choose(capacity=1088).num_splits == 4
        )


def prepare(case, **chosen):
    """On CPU tensors: nothing is launched."""
    q, k_cache, v_cache, tree, _, kw = case.build()
    return _sm90.prepare(
        q, k_cache, v_cache, kw.get("k"), kw.get("v"), tree.packed_mask, kw["block_table"], kw.get("sinks"),
        kw.get("k_scale"), kw["window"], kw["softcap"], 0.125, torch.empty_like(q), 132, **chosen,
    )  # fmt: skip


def test_plan_of_a_call(monkeypatch):
    monkeypatch.setattr(_sm90, "_kernel", lambda: object())
    case = Case(**{**BASE, "heads_kv": 3, "strided": True, "append": True})
    plan = prepare(case, groups=2).plan
    q, k_cache, _, tree, _, kw = case.build()
    assert (plan.batch, plan.size, plan.heads_kv, plan.group, plan.dim) == (2, 64, 3, 4, 128)
    assert (plan.num_blocks, plan.block_size, plan.max_blocks) == (2, k_cache.shape[1], 0)
    assert (plan.half, plan.words, plan.groups, plan.row_blocks, plan.stages, plan.resident) == (0, 1, 2, 2, 6, 132)
    assert list(plan.q) == list(q.stride()[:3]) and list(plan.k_cache) == list(k_cache.stride()[:3])
    assert list(plan.k) == list(kw["k"].stride()[:3]) and plan.mask_stride == tree.packed_mask.stride(0)
    paged = prepare(Case(**{**BASE, "block_size": 16, "dtype": torch.float16, "per_request": False})).plan
    assert (paged.half, paged.block_size, paged.max_blocks, paged.mask_stride) == (1, 16, paged.table_stride, 0)


def test_what_is_served(monkeypatch):
    serves = lambda **options: prepare(Case(**{**BASE, "lengths": [2000, 130], **options})) is not None  # noqa: E731
    monkeypatch.setattr(_sm90, "_kernel", lambda: None)  # built without CUDA
    assert not serves()
    monkeypatch.setattr(_sm90, "_kernel", lambda: object())
    assert serves() and serves(group=1, block_size=16) and serves(append=True, head_dim=64) and serves(group=1)
    assert not serves(block_size=8) and not serves(head_dim=96)
    assert serves(group=1, heads_kv=80) and serves(group=1, size=1, num_nodes=[1, 1])  # few rows, no splits
    assert not serves(dtype=torch.float32) and not serves(window=50) and not serves(softcap=5.0)
    assert not serves(sinks=True) and serves(fp8=True) and not serves(fp8=True, head_dim=96)
    assert not serves(fp8=True, dtype=torch.float16)  # sums of e4m3's products are not exact enough
