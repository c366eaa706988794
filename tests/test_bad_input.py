"""The written list of bad inputs: each raises, names its argument, and leaves every tensor as it was. Beside each
operator's list stand good inputs at the limit. TokenTree's own are in test_tree.py."""

import math

import pytest
import torch

from medusa_kernels import TokenTree, accept_candidates, compact_kv_cache, tree_attention

CPU_FP8 = torch.float8_e4m3fn


def tensors_of(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, TokenTree):
        return tensors_of([x.parents, x.num_nodes])
    return [t for item in x for t in tensors_of(item)] if isinstance(x, (list, tuple)) else []


def bits(x):
    if x.device.type == "meta":
        return None
    return x.detach().clone().contiguous().view(-1).view(torch.uint8)


def check_raises(function, arguments, name):
    """`function(**arguments)` raises, its message begins with `name`, and no tensor of the arguments changes."""
    tensors = tensors_of(list(arguments.values()))
    before = [bits(x) for x in tensors]
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        function(**arguments)
    for x, was in zip(tensors, before):
        assert was is None or torch.equal(bits(x), was)


def meta(x):
    return torch.empty_like(x, device="meta")


def last_dim_strided(x):
    """The same values, every second element of a wider tensor."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


# ---- tree_attention ----

B, T, H, HKV, D, S = 2, 3, 4, 2, 16, 12


def attention_arguments(paged=False, dtype=torch.float32):
    torch.manual_seed(0)
    shape = (B * 3, 4, HKV, D) if paged else (B, S, HKV, D)
    arguments = {
        "q": torch.randn(B, T, H, D, dtype=dtype),
        "k_cache": torch.randn(shape, dtype=dtype),
        "v_cache": torch.randn(shape, dtype=dtype),
        "tree": TokenTree.from_choices([[0], [1]]),
        "cache_seqlens": torch.tensor([5, S - T], dtype=torch.int32),  # the second request fills its cache
        "k": torch.randn(B, T, HKV, D, dtype=dtype),
        "v": torch.randn(B, T, HKV, D, dtype=dtype),
        "out": torch.full((B, T, H, D), 7.0, dtype=dtype),
    }
    if paged:
        arguments["block_table"] = torch.randperm(B * 3).view(B, 3).int()
    return arguments


def fp8_attention_arguments():
    arguments = attention_arguments()
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].to(CPU_FP8)
    return arguments | {"k_scale": torch.ones(HKV), "v_scale": torch.ones(HKV)}


def tree_of(count):
    return TokenTree.chain(count - 1)


def cut(*nodes):
    return TokenTree.from_choices([[0], [1]]).with_num_nodes(torch.tensor(nodes, dtype=torch.int32))


# argument named in the message -> what to change, each a function of the good arguments
ATTENTION = [
    # q
    ("q", "not a tensor", lambda a: {"q": a["q"].tolist()}),
    ("q", "dtype int", lambda a: {"q": a["q"].int()}),
    ("q", "dtype fp64", lambda a: {"q": a["q"].double()}),
    ("q", "rank 3", lambda a: {"q": a["q"][:, :, 0]}),
    ("q", "rank 5", lambda a: {"q": a["q"].unsqueeze(0)}),
    ("q", "last dim strided", lambda a: {"q": last_dim_strided(a["q"])}),
    ("q", "heads no multiple", lambda a: {"q": a["q"][:, :, :3], "out": a["out"][:, :, :3]}),
    ("q", "fewer heads than the cache", lambda a: {"q": a["q"][:, :, :1], "out": a["out"][:, :, :1]}),
    # caches
    ("k_cache", "not a tensor", lambda a: {"k_cache": None}),
    ("k_cache", "dtype", lambda a: {"k_cache": a["k_cache"].half(), "v_cache": a["v_cache"].half()}),
    ("k_cache", "dtype uint8", lambda a: {"k_cache": a["k_cache"].byte(), "v_cache": a["v_cache"].byte()}),
    ("k_cache", "device", lambda a: {"k_cache": meta(a["k_cache"])}),
    ("k_cache", "rank", lambda a: {"k_cache": a["k_cache"][0]}),
    ("k_cache", "batch", lambda a: {"k_cache": a["k_cache"][:1], "v_cache": a["v_cache"][:1]}),
    ("k_cache", "head dim", lambda a: {"k_cache": a["k_cache"][..., :8], "v_cache": a["v_cache"][..., :8]}),
    ("k_cache", "last dim strided", lambda a: {"k_cache": last_dim_strided(a["k_cache"])}),
    ("k_cache", "T over its room", lambda a: {"k_cache": a["k_cache"][:, :2], "v_cache": a["v_cache"][:, :2]}),
    ("v_cache", "not a tensor", lambda a: {"v_cache": None}),
    ("v_cache", "dtype", lambda a: {"v_cache": a["v_cache"].half()}),
    ("v_cache", "device", lambda a: {"v_cache": meta(a["v_cache"])}),
    ("v_cache", "heads", lambda a: {"v_cache": a["v_cache"][:, :, :1]}),
    ("v_cache", "slots", lambda a: {"v_cache": a["v_cache"][:, :-1]}),
    ("v_cache", "last dim strided", lambda a: {"v_cache": last_dim_strided(a["v_cache"])}),
    # tree
    ("tree", "not a tree", lambda a: {"tree": a["tree"].mask}),
    ("tree", "fewer nodes", lambda a: {"tree": tree_of(T - 1)}),
    ("tree", "more nodes", lambda a: {"tree": tree_of(T + 1)}),
    ("tree", "batch", lambda a: {"tree": TokenTree.from_parents(torch.tensor([[-1, 0, 0]] * 3))}),
    ("tree", "num_nodes of another batch", lambda a: {"tree": cut(3, 3, 3)}),
    ("tree", "device", lambda a: {"tree": TokenTree(meta(a["tree"].parents), None, 1)}),
    # cache_seqlens
    ("cache_seqlens", "not a tensor", lambda a: {"cache_seqlens": [5, 5]}),
    ("cache_seqlens", "dtype", lambda a: {"cache_seqlens": a["cache_seqlens"].long()}),
    ("cache_seqlens", "device", lambda a: {"cache_seqlens": meta(a["cache_seqlens"])}),
    ("cache_seqlens", "rank", lambda a: {"cache_seqlens": a["cache_seqlens"].unsqueeze(0)}),
    ("cache_seqlens", "batch", lambda a: {"cache_seqlens": a["cache_seqlens"][:1]}),
    # k, v
    ("k", "missing", lambda a: {"k": None}),
    ("v", "missing", lambda a: {"v": None}),
    ("k", "dtype", lambda a: {"k": a["k"].half()}),
    ("k", "device", lambda a: {"k": meta(a["k"])}),
    ("k", "heads of q", lambda a: {"k": a["q"]}),
    ("k", "nodes", lambda a: {"k": a["k"][:, 1:]}),
    ("k", "last dim strided", lambda a: {"k": last_dim_strided(a["k"])}),
    ("v", "rank", lambda a: {"v": a["v"][0]}),
    ("v", "head dim", lambda a: {"v": a["v"][..., :8]}),
    # numbers
    ("softmax_scale", "zero", lambda a: {"softmax_scale": 0.0}),
    ("softmax_scale", "negative", lambda a: {"softmax_scale": -1.0}),
    ("softmax_scale", "nan", lambda a: {"softmax_scale": math.nan}),
    ("softmax_scale", "inf", lambda a: {"softmax_scale": math.inf}),
    ("window", "zero", lambda a: {"window": 0}),
    ("window", "negative", lambda a: {"window": -1}),
    ("softcap", "negative", lambda a: {"softcap": -1.0}),
    ("softcap", "nan", lambda a: {"softcap": math.nan}),
    ("softmax_scale", "a tensor", lambda a: {"softmax_scale": torch.ones(())}),
    ("softcap", "a tensor", lambda a: {"softcap": torch.ones(())}),
    ("window", "a tensor", lambda a: {"window": torch.ones((), dtype=torch.int32)}),
    ("batch_invariant", "no bool", lambda a: {"batch_invariant": 1}),
    # sinks
    ("sinks", "rank", lambda a: {"sinks": torch.zeros(H, 1)}),
    ("sinks", "heads", lambda a: {"sinks": torch.zeros(HKV)}),
    ("sinks", "dtype", lambda a: {"sinks": torch.zeros(H, dtype=torch.int32)}),
    ("sinks", "device", lambda a: {"sinks": torch.zeros(H, device="meta")}),
    ("sinks", "strided", lambda a: {"sinks": torch.zeros(2 * H)[::2]}),
    # scales
    ("k_scale", "no fp8 cache", lambda a: {"k_scale": torch.ones(HKV), "v_scale": torch.ones(HKV)}),
    # out
    ("out", "dtype", lambda a: {"out": a["out"].half()}),
    ("out", "shape", lambda a: {"out": a["out"][:, 1:]}),
    ("out", "device", lambda a: {"out": meta(a["out"])}),
    ("out", "last dim strided", lambda a: {"out": last_dim_strided(a["out"])}),
]
PAGED_ATTENTION = [
    ("block_table", "not a tensor", lambda a: {"block_table": a["block_table"].tolist()}),
    ("block_table", "dtype", lambda a: {"block_table": a["block_table"].long()}),
    ("block_table", "rank", lambda a: {"block_table": a["block_table"].flatten()}),
    ("block_table", "batch", lambda a: {"block_table": a["block_table"][:1]}),
    ("block_table", "device", lambda a: {"block_table": meta(a["block_table"])}),
    ("block_table", "last dim strided", lambda a: {"block_table": last_dim_strided(a["block_table"])}),
    ("k_cache", "T over its room", lambda a: {"block_table": a["block_table"][:, :0]}),
    ("k_cache", "no blocks", lambda a: {"k_cache": a["k_cache"][:0], "v_cache": a["v_cache"][:0]}),
    ("v_cache", "blocks", lambda a: {"v_cache": a["v_cache"][:-1]}),
]
FP8_ATTENTION = [
    ("k_scale", "missing", lambda a: {"k_scale": None}),
    ("v_scale", "missing", lambda a: {"v_scale": None}),
    ("k_scale", "not a tensor", lambda a: {"k_scale": 1.0}),
    ("k_scale", "dtype", lambda a: {"k_scale": a["k_scale"].half()}),
    ("k_scale", "a scale a query head", lambda a: {"k_scale": torch.ones(H), "v_scale": torch.ones(H)}),
    ("k_scale", "device", lambda a: {"k_scale": meta(a["k_scale"])}),
    ("v_scale", "shape", lambda a: {"v_scale": torch.ones(())}),
    ("v_cache", "dtype", lambda a: {"v_cache": a["v_cache"].float()}),
]


def ids(cases):
    return [f"{name}: {what}" for name, what, *_ in cases]


@pytest.mark.parametrize("name, what, change", ATTENTION, ids=ids(ATTENTION))
def test_attention(name, what, change):
    arguments = attention_arguments()
    check_raises(tree_attention, arguments | change(arguments), name)


@pytest.mark.parametrize("name, what, change", PAGED_ATTENTION, ids=ids(PAGED_ATTENTION))
def test_attention_paged(name, what, change):
    arguments = attention_arguments(paged=True)
    check_raises(tree_attention, arguments | change(arguments), name)


@pytest.mark.parametrize("name, what, change", FP8_ATTENTION, ids=ids(FP8_ATTENTION))
def test_attention_fp8(name, what, change):
    arguments = fp8_attention_arguments()
    check_raises(tree_attention, arguments | change(arguments), name)


@pytest.mark.parametrize("head_dim", [8, 20, 264])
def test_attention_head_dim(head_dim):
    q, cache = torch.zeros(B, T, H, head_dim), torch.zeros(B, S, HKV, head_dim)
    lengths = torch.zeros(B, dtype=torch.int32)
    arguments = {"q": q, "k_cache": cache, "v_cache": cache, "tree": tree_of(T), "cache_seqlens": lengths}
    check_raises(tree_attention, arguments, "q")


GOOD_ATTENTION = [
    ("cache filled to its end", lambda a: {}),
    ("T is the whole cache", lambda a: {"k_cache": a["k_cache"][:, :T], "v_cache": a["v_cache"][:, :T],
                                        "cache_seqlens": torch.zeros(B, dtype=torch.int32)}),
    ("empty cache", lambda a: {"cache_seqlens": torch.zeros(B, dtype=torch.int32)}),
    ("heads of the cache's number", lambda a: {"q": a["q"][:, :, :HKV], "out": a["out"][:, :, :HKV]}),
    ("strided but for the last dim", lambda a: {"q": a["q"].transpose(1, 2).contiguous().transpose(1, 2)}),
    ("padded request", lambda a: {"tree": cut(3, 0)}),
    ("a tree a request", lambda a: {"tree": TokenTree.from_parents(torch.tensor([[-1, 0, 0], [-1, 0, 1]]))}),
    ("window 1", lambda a: {"window": 1}),
    ("softcap 0", lambda a: {"softcap": 0.0}),
    ("sinks in half", lambda a: {"sinks": torch.zeros(H, dtype=torch.float16)}),
    ("nothing appended", lambda a: {"k": None, "v": None}),
]  # fmt: skip


@pytest.mark.parametrize("what, change", GOOD_ATTENTION, ids=[case[0] for case in GOOD_ATTENTION])
def test_attention_good(what, change):
    arguments = attention_arguments()
    arguments |= change(arguments)
    out = tree_attention(**arguments)
    assert out is arguments["out"] and out.isfinite().all() and not (out == 7.0).any()


def test_attention_good_paged_and_fp8():
    assert tree_attention(**attention_arguments(paged=True)).isfinite().all()
    for shape in ((), (1,), (HKV,)):
        scales = {"k_scale": torch.ones(shape), "v_scale": torch.ones(shape)}
        assert tree_attention(**(fp8_attention_arguments() | scales)).isfinite().all()
    assert tree_attention(**(fp8_attention_arguments() | {"k_scale": None, "v_scale": None})).isfinite().all()


@pytest.mark.parametrize("lengths", [[-1, 5], [5, S - T + 1], [5, 2**31 - 1]], ids=str)
def test_attention_values_are_checked_in_debug_mode(lengths, monkeypatch):
    monkeypatch.setenv("MEDUSA_KERNELS_DEBUG", "1")
    for paged in (False, True):
        arguments = attention_arguments(paged) | {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
        check_raises(tree_attention, arguments, "cache_seqlens")
        tree_attention(**attention_arguments(paged))


@pytest.mark.parametrize("block", [-1, B * 3])
def test_attention_blocks_are_checked_in_debug_mode(block, monkeypatch):
    monkeypatch.setenv("MEDUSA_KERNELS_DEBUG", "1")
    arguments = attention_arguments(paged=True)
    arguments["block_table"][1, 0] = block
    check_raises(tree_attention, arguments, "block_table")


# ---- accept_candidates ----

V = 11


def accept_arguments():
    torch.manual_seed(0)
    return {
        "logits": torch.randn(B, T, V),
        "tokens": torch.randint(V, (B, T)),
        "tree": TokenTree.from_choices([[0], [1]]),
    }


ACCEPT = [
    ("logits", "not a tensor", lambda a: {"logits": a["logits"].tolist()}),
    ("logits", "dtype int", lambda a: {"logits": a["logits"].int()}),
    ("logits", "dtype fp64", lambda a: {"logits": a["logits"].double()}),
    ("logits", "rank", lambda a: {"logits": a["logits"][0]}),
    ("logits", "no vocabulary", lambda a: {"logits": a["logits"][..., :0]}),
    ("logits", "last dim strided", lambda a: {"logits": last_dim_strided(a["logits"])}),
    ("tokens", "not a tensor", lambda a: {"tokens": a["tokens"].tolist()}),
    ("tokens", "dtype", lambda a: {"tokens": a["tokens"].int()}),
    ("tokens", "rank", lambda a: {"tokens": a["tokens"].flatten()}),
    ("tokens", "batch", lambda a: {"tokens": a["tokens"][:1]}),
    ("tokens", "nodes", lambda a: {"tokens": a["tokens"][:, 1:]}),
    ("tokens", "device", lambda a: {"tokens": meta(a["tokens"])}),
    ("tree", "not a tree", lambda a: {"tree": a["tree"].parents}),
    ("(tree|logits)", "fewer nodes", lambda a: {"tree": tree_of(T - 1)}),
    ("(tree|logits)", "more nodes", lambda a: {"tree": tree_of(T + 1)}),
    ("tree", "batch", lambda a: {"tree": TokenTree.from_parents(torch.tensor([[-1, 0, 0]] * 3))}),
    ("tree", "num_nodes of another batch", lambda a: {"tree": cut(3, 3, 3)}),
    ("tree", "device", lambda a: {"tree": TokenTree(meta(a["tree"].parents), None, 1)}),
    ("mode", "unknown", lambda a: {"mode": "beam"}),
    ("mode", "type", lambda a: {"mode": 1.5}),
    ("mode", "dtype", lambda a: {"mode": torch.zeros(B, dtype=torch.int64)}),
    ("mode", "batch", lambda a: {"mode": torch.zeros(B + 1, dtype=torch.int8)}),
    ("mode", "device", lambda a: {"mode": torch.zeros(B, dtype=torch.int8, device="meta")}),
    ("temperature", "negative", lambda a: {"mode": "typical", "temperature": -0.5}),
    ("temperature", "nan", lambda a: {"mode": "typical", "temperature": math.nan}),
    ("temperature", "inf", lambda a: {"mode": "typical", "temperature": math.inf}),
    ("temperature", "type", lambda a: {"mode": "typical", "temperature": "hot"}),
    ("temperature", "batch", lambda a: {"mode": "typical", "temperature": torch.ones(B + 1)}),
    ("temperature", "dtype", lambda a: {"mode": "typical", "temperature": torch.ones(B, dtype=torch.int32)}),
    ("temperature", "device", lambda a: {"mode": "typical", "temperature": torch.ones(B, device="meta")}),
    ("posterior_threshold", "negative", lambda a: {"mode": "typical", "posterior_threshold": -0.1}),
    ("posterior_threshold", "nan", lambda a: {"mode": "typical", "posterior_threshold": math.nan}),
    ("posterior_threshold", "batch", lambda a: {"mode": "typical", "posterior_threshold": torch.ones(B + 1)}),
    ("posterior_alpha", "negative", lambda a: {"mode": "typical", "posterior_alpha": -0.1}),
    ("posterior_alpha", "nan", lambda a: {"mode": "typical", "posterior_alpha": math.nan}),
    ("posterior_alpha", "batch", lambda a: {"mode": "typical", "posterior_alpha": torch.ones(B + 1)}),
    ("top_k", "zero", lambda a: {"mode": "sampling", "seed": 0, "top_k": 0}),
    ("top_k", "negative", lambda a: {"mode": "sampling", "seed": 0, "top_k": -1}),
    ("top_p", "zero", lambda a: {"mode": "sampling", "seed": 0, "top_p": 0.0}),
    ("top_p", "over 1", lambda a: {"mode": "sampling", "seed": 0, "top_p": 1.5}),
    ("top_p", "nan", lambda a: {"mode": "sampling", "seed": 0, "top_p": math.nan}),
    ("seed", "missing", lambda a: {"mode": "sampling"}),
    ("seed", "type", lambda a: {"mode": "sampling", "seed": "one"}),
    ("max_tokens", "not a tensor", lambda a: {"max_tokens": "all"}),
    ("max_tokens", "dtype", lambda a: {"max_tokens": torch.ones(B)}),
    ("max_tokens", "batch", lambda a: {"max_tokens": torch.ones(B + 1, dtype=torch.int32)}),
    ("max_tokens", "device", lambda a: {"max_tokens": torch.ones(B, dtype=torch.int32, device="meta")}),
]


@pytest.mark.parametrize("name, what, change", ACCEPT, ids=ids(ACCEPT))
def test_accept(name, what, change):
    arguments = accept_arguments()
    check_raises(accept_candidates, arguments | change(arguments), name)


GOOD_ACCEPT = [
    ("defaults", lambda a: {}),
    ("row stride", lambda a: {"logits": torch.cat([a["logits"]] * 2, -1)[..., :V]}),
    ("one token", lambda a: {"logits": a["logits"][..., :1], "tokens": a["tokens"] * 0}),
    ("bf16", lambda a: {"logits": a["logits"].bfloat16()}),
    ("padded request", lambda a: {"tree": cut(3, 0)}),
    ("mode of each", lambda a: {"mode": torch.zeros(B, dtype=torch.int8)}),
    ("temperature 0", lambda a: {"mode": "typical", "temperature": 0.0}),
    ("temperature of each", lambda a: {"mode": "typical", "temperature": torch.tensor([0.0, 2.0])}),
    ("thresholds 0", lambda a: {"mode": "typical", "posterior_threshold": 0.0, "posterior_alpha": 0.0}),
    ("top_k 1", lambda a: {"mode": "sampling", "seed": 0, "top_k": 1}),
    ("top_p 1", lambda a: {"mode": "sampling", "seed": 0, "top_p": 1.0}),
    ("max_tokens 0", lambda a: {"max_tokens": torch.zeros(B, dtype=torch.int32)}),
]


@pytest.mark.parametrize("what, change", GOOD_ACCEPT, ids=[case[0] for case in GOOD_ACCEPT])
def test_accept_good(what, change):
    arguments = accept_arguments()
    before = [bits(x) for x in tensors_of(list(arguments.values()))]
    result = accept_candidates(**(arguments | change(arguments)))
    assert result.path.shape == result.tokens.shape == (B, 2)
    assert ((result.accept_length >= -1) & (result.accept_length <= 1)).all()  # -1: a padded request
    assert all(torch.equal(bits(x), was) for x, was in zip(tensors_of(list(arguments.values())), before))


# ---- compact_kv_cache ----

L = 2


def compact_arguments(paged=False):
    torch.manual_seed(0)
    shape = (B * 3, 4, HKV, D) if paged else (B, S, HKV, D)
    arguments = {
        "kv": torch.randn(L, 2, *shape),
        "path": torch.tensor([[0, 2], [0, -1]], dtype=torch.int32),
        "accept_length": torch.tensor([1, 0], dtype=torch.int32),
        "cache_seqlens": torch.tensor([5, S - T], dtype=torch.int32),
    }
    if paged:
        arguments["block_table"] = torch.randperm(B * 3).view(B, 3).int()
    return arguments


def as_list(kv):
    return [(layer[0], layer[1]) for layer in kv]


COMPACT = [
    ("kv", "not a tensor", lambda a: {"kv": None}),
    ("kv", "rank", lambda a: {"kv": a["kv"][0]}),
    ("kv", "batch", lambda a: {"kv": a["kv"][:, :, :1]}),
    ("kv", "empty list", lambda a: {"kv": []}),
    ("kv", "list of tensors", lambda a: {"kv": [a["kv"][0, 0, 0, 0, 0, 0]]}),
    ("kv", "a layer of another batch", lambda a: {"kv": [*as_list(a["kv"]), (a["kv"][0, 0, :1], a["kv"][0, 1, :1])]}),
    ("kv", "a layer elsewhere", lambda a: {"kv": [*as_list(a["kv"]), (meta(a["kv"][0, 0]), meta(a["kv"][0, 1]))]}),
    ("path", "not a tensor", lambda a: {"path": a["path"].tolist()}),
    ("path", "dtype", lambda a: {"path": a["path"].long()}),
    ("path", "rank", lambda a: {"path": a["path"][0]}),
    ("(path|accept_length)", "batch", lambda a: {"path": a["path"][:1]}),
    ("path", "empty", lambda a: {"path": a["path"][:, :0]}),
    ("path", "over 512 nodes", lambda a: {"path": torch.arange(513).int().expand(B, -1).contiguous()}),
    ("path", "device", lambda a: {"path": meta(a["path"])}),
    ("accept_length", "not a tensor", lambda a: {"accept_length": [1, 0]}),
    ("accept_length", "dtype", lambda a: {"accept_length": a["accept_length"].long()}),
    ("accept_length", "rank", lambda a: {"accept_length": a["accept_length"].unsqueeze(1)}),
    ("accept_length", "batch", lambda a: {"accept_length": a["accept_length"][:1]}),
    ("accept_length", "device", lambda a: {"accept_length": meta(a["accept_length"])}),
    ("cache_seqlens", "not a tensor", lambda a: {"cache_seqlens": [5, 5]}),
    ("cache_seqlens", "dtype", lambda a: {"cache_seqlens": a["cache_seqlens"].long()}),
    ("cache_seqlens", "rank", lambda a: {"cache_seqlens": a["cache_seqlens"].unsqueeze(1)}),
    ("cache_seqlens", "batch", lambda a: {"cache_seqlens": a["cache_seqlens"][:1]}),
    ("cache_seqlens", "device", lambda a: {"cache_seqlens": meta(a["cache_seqlens"])}),
]
PAGED_COMPACT = [
    ("block_table", "not a tensor", lambda a: {"block_table": a["block_table"].tolist()}),
    ("block_table", "dtype", lambda a: {"block_table": a["block_table"].long()}),
    ("block_table", "rank", lambda a: {"block_table": a["block_table"].flatten()}),
    ("block_table", "batch", lambda a: {"block_table": a["block_table"][:1]}),
    ("block_table", "device", lambda a: {"block_table": meta(a["block_table"])}),
]


@pytest.mark.parametrize("name, what, change", COMPACT, ids=ids(COMPACT))
def test_compact(name, what, change):
    arguments = compact_arguments()
    check_raises(compact_kv_cache, arguments | change(arguments), name)


@pytest.mark.parametrize("name, what, change", PAGED_COMPACT, ids=ids(PAGED_COMPACT))
def test_compact_paged(name, what, change):
    arguments = compact_arguments(paged=True)
    check_raises(compact_kv_cache, arguments | change(arguments), name)


GOOD_COMPACT = [
    ("stacked", lambda a: {}),
    ("list", lambda a: {"kv": as_list(a["kv"])}),
    ("Medusa's layout", lambda a: {"kv": a["kv"].transpose(3, 4).contiguous().transpose(3, 4)}),
    ("any strides", lambda a: {"kv": last_dim_strided(a["kv"])}),
    ("a path of 512 nodes", lambda a: {"path": torch.arange(512).int().expand(B, -1).contiguous()}),
    ("paged", lambda a: compact_arguments(paged=True)),
]  # fmt: skip


@pytest.mark.parametrize("what, change", GOOD_COMPACT, ids=[case[0] for case in GOOD_COMPACT])
def test_compact_good(what, change):
    arguments = compact_arguments()
    arguments |= change(arguments)
    before = arguments["cache_seqlens"].clone()
    compact_kv_cache(**arguments)
    assert torch.equal(arguments["cache_seqlens"], before + arguments["accept_length"] + 1)
