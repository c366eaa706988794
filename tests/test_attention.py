"""Tree attention: Triton kernel (plain_kernel without a GPU), CPU operator and reference against float64 and loops."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medusa_kernels import TokenTree, _sm90, attention, reference, tree_attention
from medusa_kernels._triton import tree_attention as triton_attention
from medusa_kernels._triton import tree_attention_invariant as invariant
from medusa_kernels._triton.tree_attention import TileConfig

NAN = float("nan")
interpreter = pytest.mark.skipif(not triton_attention.INTERPRET, reason="the interpreter is off where a GPU is there")


@dataclass
class Case:
    """One call's shape; `build` draws its tensors, with NaN in every slot that belongs to nobody."""

    lengths: list[int]
    num_nodes: list[int]
    size: int
    heads_kv: int = 2
    group: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    block_size: int = 0  # 0: contiguous
    per_request: bool = True
    append: bool = False
    strided: bool = False
    fp8: bool = False
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    seed: int = 0
    device: str = "cpu"
    args: dict = field(default_factory=dict, init=False)

    def build(self):
        g = torch.Generator().manual_seed(self.seed)
        randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        batch, size = len(self.lengths), self.size
        span = 1 + self.seed % max(1, size)  # from chains to stars
        low = lambda i: max(0, i - span)  # noqa: E731
        trees = [
            [-1] + [int(torch.randint(low(i), i, (1,), generator=g)) for i in range(1, size)]
            for _ in range(batch if self.per_request else 1)
        ]
        parents = torch.tensor(trees if self.per_request else trees[0], dtype=torch.int32)
        num_nodes = torch.tensor(self.num_nodes, dtype=torch.int32)
        tree = TokenTree.from_parents(parents, num_nodes).to(self.device)
        room = max(max(n + t for n, t in zip(self.lengths, self.num_nodes)), size) + 3
        if self.block_size:
            per = -(-room // self.block_size)
            shape = (batch * per + 2, self.block_size, self.heads_kv, self.head_dim)
            table = torch.randperm(batch * per + 2, generator=g)[: batch * per].view(batch, per).int()
        else:
            shape, table = (batch, room, self.heads_kv, self.head_dim), None
        caches = []
        for _ in range(2):
            cache = torch.full(shape, NAN)
            for b, (length, nodes) in enumerate(zip(self.lengths, self.num_nodes)):
                # With append, the tree's slots are written by the call: they hold nothing before it.
                for s in range(length + (0 if self.append else nodes)):
                    at = (b, s) if table is None else (int(table[b, s // self.block_size]), s % self.block_size)
                    cache[at] = randn(self.heads_kv, self.head_dim)
            cache = cache.to(torch.float8_e4m3fn if self.fp8 else self.dtype).to(self.device)
            if self.strided:  # a cache kept [B, Hkv, S, D]
                cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
            caches.append(cache)
        heads = self.heads_kv * self.group
        q = randn(batch, size, heads, self.head_dim).to(self.device, self.dtype)
        if self.strided:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        table = None if table is None else table.to(q.device)
        kwargs = {"window": self.window, "softcap": self.softcap, "block_table": table}
        if self.sinks:
            kwargs["sinks"] = randn(heads).to(self.device)
        if self.fp8:
            scales = torch.rand(2, self.heads_kv, generator=g) + 0.5
            if self.append:  # exact in fp8 whatever the rounding, which the interpreter does not do as the GPU does
                scales = scales.fill_(0.5)
            kwargs.update(k_scale=scales[0].to(self.device), v_scale=scales[1].to(self.device))
        if self.append:
            new = randn(2, batch, size, self.heads_kv, self.head_dim)
            if self.fp8:
                new = (new * 4).round().clamp(-15, 15) / 4
            new = new.to(self.device, self.dtype)
            kwargs.update(k=new[0], v=new[1])
        return q, *caches, tree, torch.tensor(self.lengths, dtype=torch.int32, device=self.device), kwargs


def plain_kernel(q, k_cache, v_cache, tree, cache_seqlens, config=None, **kw):
    """The plain Triton kernel itself, on tensors of any device."""
    if config is None:
        rows, capacity = q.shape[1] * q.shape[2] // k_cache.shape[2], k_cache.shape[1]
        config = triton_attention.tile_config(rows, q.shape[3], q.shape[0], capacity, q.itemsize, 132, 90)
    out = torch.full_like(q, NAN)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), NAN, dtype=torch.float32)
    triton_attention.tree_attention(
        q, k_cache, v_cache, kw.get("k"), kw.get("v"), tree.packed_mask, tree.depths, tree.num_nodes, cache_seqlens,
        kw.get("block_table"), kw.get("sinks"), kw.get("k_scale"), kw.get("v_scale"), q.shape[-1] ** -0.5,
        kw.get("window") or 0, kw.get("softcap", 0.0), out, lse, config,
    )  # fmt: skip
    return out, lse


def invariant_kernel(q, k_cache, v_cache, tree, cache_seqlens, config=None, **kw):
    """The kernels of `batch_invariant=True` themselves, on tensors of any device."""
    out = torch.full_like(q, NAN)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), NAN, dtype=torch.float32)
    invariant.tree_attention(
        q, k_cache, v_cache, kw.get("k"), kw.get("v"), tree.packed_mask, tree.depths, tree.num_nodes, cache_seqlens,
        kw.get("block_table"), kw.get("sinks"), kw.get("k_scale"), kw.get("v_scale"), q.shape[-1] ** -0.5,
        kw.get("window") or 0, kw.get("softcap", 0.0), out, lse, invariant.tile_config(q.shape[-1], q.itemsize, 90),
    )  # fmt: skip
    return out, lse


def public_invariant(q, k_cache, v_cache, tree, cache_seqlens, config=None, **kw):
    return tree_attention(q, k_cache, v_cache, tree, cache_seqlens, return_lse=True, batch_invariant=True, **kw)


def public(q, k_cache, v_cache, tree, cache_seqlens, config=None, **kw):
    return tree_attention(q, k_cache, v_cache, tree, cache_seqlens, return_lse=True, **kw)


def as_bytes(x):
    return x.contiguous().view(torch.uint8)


def check(case, run, config=None):
    q, k_cache, v_cache, tree, lens, kw = case.build()
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    exact, exact_lse = reference.tree_attention(
        q, expected_k, expected_v, tree, lens, **kw, return_lse=True, upcast=True
    )
    low, low_lse = reference.tree_attention(q, expected_k, expected_v, tree, lens, **kw, return_lse=True)
    out, lse = run(q, k_cache, v_cache, tree, lens, config=config, **kw)
    assert torch.equal(as_bytes(k_cache), as_bytes(expected_k)), "K cache: written elsewhere, or otherwise"
    assert torch.equal(as_bytes(v_cache), as_bytes(expected_v)), "V cache: written elsewhere, or otherwise"
    for b, nodes in enumerate(case.num_nodes):
        assert (out[b, nodes:] == 0).all() and (lse[b, :, nodes:] == -math.inf).all()
    assert_as_accurate(out, exact, low, case.dtype)
    finite = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert_as_accurate(lse[finite], exact_lse[finite], low_lse[finite], torch.float32)


def assert_as_accurate(out, exact, low, dtype):
    if exact.numel() == 0:
        return
    error, low_error = ((x.double() - exact).abs().max().item() for x in (out, low))
    # Under the interpreter a bf16 store truncates instead of rounding: an error up to one ulp, not half.
    one_rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    assert error <= 2 * low_error + one_rounding, f"{error=:.2e} {low_error=:.2e} {one_rounding=:.2e}"


@st.composite
def cases(draw, max_size=70, max_length=150, device="cpu", dtypes=(torch.float32, torch.float16), dims=(64, 80, 96)):
    batch = draw(st.integers(1, 3))
    size = draw(st.one_of(st.sampled_from([1, 2, 63, 64, 65]), st.integers(1, max_size)))
    size = min(size, max_size)
    nodes = draw(st.lists(st.one_of(st.just(size), st.integers(0, size)), min_size=batch, max_size=batch))
    lengths = draw(st.lists(st.one_of(st.just(0), st.integers(0, max_length)), min_size=batch, max_size=batch))
    lengths = [0 if n == 0 else length for n, length in zip(nodes, lengths)]
    block_size = draw(st.sampled_from([0, 0, 16, 20, 64]))
    group = draw(st.sampled_from([1, 3, 7, 8]))
    dtype = draw(st.sampled_from(dtypes))
    return Case(
        lengths, nodes, size, draw(st.integers(1, 2)), group, draw(st.sampled_from(dims)), dtype, block_size,
        per_request=draw(st.booleans()), append=draw(st.booleans()), strided=not block_size and draw(st.booleans()),
        fp8=dtype != torch.float32 and draw(st.sampled_from([False, False, True])),
        window=draw(st.one_of(st.none(), st.integers(1, 200))), softcap=draw(st.sampled_from([0.0, 0.0, 5.0, 50.0])),
        sinks=draw(st.booleans()), seed=draw(st.integers(0, 2**20)), device=device,
    )  # fmt: skip


slow_ok = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=120, **slow_ok)
@given(cases(dtypes=(torch.float32, torch.bfloat16, torch.float16), dims=(16, 64, 80, 96, 128, 256)))
def test_cpu_operator(case):
    check(case, public)


@settings(max_examples=40, **slow_ok)
@given(cases(dtypes=(torch.float32, torch.bfloat16), max_size=30, dims=(16, 64, 80)))
def test_cpu_operator_invariant(case):
    check(case, public_invariant)


configs = st.builds(
    TileConfig, st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64]), st.sampled_from([1, 1, 2, 3, 8]),
    st.sampled_from([1, 2]),
)  # fmt: skip


@interpreter
@settings(max_examples=70, **slow_ok)
@given(cases(max_size=40, max_length=100), configs)
def test_kernel(case, config):
    check(case, plain_kernel, config)


@interpreter
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("size", [64, 65, 130])
def test_kernel_large(head_dim, size):
    check(Case([70, 3], [size, size - 1], size, 1, 2, head_dim, append=True), plain_kernel, TileConfig(64, 64, 2))


@interpreter
@pytest.mark.parametrize("paged", [0, 16])
def test_kernel_bf16(paged):
    case = Case([40, 0], [20, 7], 20, 1, 4, 64, torch.bfloat16, block_size=paged)
    check(case, plain_kernel, TileConfig(32, 32, 2))


@interpreter
@settings(max_examples=12, **slow_ok)
@given(cases(max_size=12, max_length=140, dims=(64, 80)))
def test_invariant_kernel(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariant, "CHUNK", 64)
        check(case, invariant_kernel)


@dataclass(eq=False)
class Request:
    """Keys and values of the committed tokens, and a tree's queries, keys, values and parents, on the CPU."""

    kv: torch.Tensor  # [2, length, Hkv, D]
    q: torch.Tensor  # [T, H, D]
    new: torch.Tensor  # [2, T, Hkv, D]
    parents: list[int]

    @classmethod
    def draw(cls, length, parents, heads_kv, group, head_dim, seed):
        randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        g = torch.Generator().manual_seed(seed)
        size = len(parents)
        new = randn(2, size, heads_kv, head_dim)
        return cls(randn(2, length, heads_kv, head_dim), randn(size, heads_kv * group, head_dim), new, parents)

    def path(self, node):
        return [] if node < 0 else [*self.path(self.parents[node]), node]

    def chain(self, node, committed):
        """The path to a node as a chain, its first `committed` nodes in the cache."""
        path = self.path(node)
        done, draft = path[:committed], path[committed:]
        kv = torch.cat([self.kv, self.new[:, done]], 1)
        return Request(kv, self.q[draft], self.new[:, draft], list(range(-1, len(draft) - 1)))


def attend(run, requests, device, dtype, cache_dtype=None, block_size=0, size=0, **kw):
    """One call for these requests, padded to `size` nodes; each one's out and LSE."""
    num_nodes = [len(r.parents) for r in requests]
    size = max(size, *num_nodes)
    parents = torch.tensor([r.parents + [0] * (size - n) for r, n in zip(requests, num_nodes)], dtype=torch.int32)
    heads_kv, head_dim = requests[0].new.shape[2:]
    batch, per = len(requests), -(-max(r.kv.shape[1] + size for r in requests) // max(block_size, 1))
    table = None
    if block_size:
        table = torch.randperm(batch * per, generator=torch.Generator().manual_seed(1)).view(batch, per).int()
    cache = torch.full((2, batch * per, block_size, heads_kv, head_dim) if block_size
                       else (2, batch, per, heads_kv, head_dim), NAN)  # fmt: skip
    q = torch.zeros(batch, size, requests[0].q.shape[1], head_dim)
    new = torch.zeros(2, batch, size, heads_kv, head_dim)
    for b, (r, n) in enumerate(zip(requests, num_nodes)):
        q[b, :n], new[:, b, :n] = r.q, r.new
        slots = torch.arange(r.kv.shape[1])
        if table is None:
            cache[:, b, slots] = r.kv
        else:
            cache[:, table[b, slots // block_size].long(), slots % block_size] = r.kv
    new = new.to(device, dtype)
    k_cache, v_cache = cache.to(device, dtype).to(cache_dtype or dtype)
    tree = TokenTree.from_parents(parents, torch.tensor(num_nodes, dtype=torch.int32)).to(device)
    lens = torch.tensor([r.kv.shape[1] for r in requests], dtype=torch.int32, device=device)
    table = None if table is None else table.to(device)
    out, lse = run(q.to(device, dtype), k_cache, v_cache, tree, lens, k=new[0], v=new[1], block_table=table, **kw)
    return [(out[b, :n], lse[b, :, :n]) for b, n in enumerate(num_nodes)]


def check_invariant(
    run, length, parents, heads_kv, group, head_dim, device="cpu", dtype=torch.float32, nodes=None, **kw
):
    """Each node of a tree has the same bits alone, in a batch, paged, as the last of a chain, and decoded plainly."""
    request = Request.draw(length, parents, heads_kv, group, head_dim, 0)
    others = [Request.draw(n, [-1, 0, 0], heads_kv, group, head_dim, n) for n in (0, length // 2, length + 33)]
    call = lambda requests, **more: attend(run, requests, device, dtype, **kw, **more)  # noqa: E731
    ((out, lse),) = call([request])
    same = lambda got, i: torch.equal(got[0][-1], out[i]) and torch.equal(got[1][:, -1], lse[:, i])  # noqa: E731
    for block_size, batch in ((0, [others[0], others[2], request, others[1]]), (16, [others[1], request])):
        got = call(batch, block_size=block_size, size=len(parents) + 3)[batch.index(request)]
        assert torch.equal(got[0], out) and torch.equal(got[1], lse), f"in a batch, {block_size=}"
    for i in range(len(parents)) if nodes is None else nodes:
        depth = len(request.path(i)) - 1
        for committed in sorted({0, depth // 2, depth} if depth > 4 else {0, depth}):
            (got,) = call([request.chain(i, committed)])
            assert same(got, i), f"node {i} of depth {depth}, {committed} of its path committed"
        got = call([others[0], request.chain(i, depth)], block_size=16, size=2)[1]
        assert same(got, i), f"node {i}, plain decoding in a batch"


# A deep path that crosses a tile and, with chunks of 64, a chunk at position 128; siblings that come late.
DEEP = [-1, 0, 0, 1, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 5, 14]
INVARIANT = {
    "plain": {}, "long": {"length": 130}, "empty": {"length": 0}, "window": {"window": 9}, "window 70": {"window": 70},
    "softcap": {"softcap": 5.0},
}  # fmt: skip


def matmul_by_columns(a, b, dtype):
    """Each row and column depends on itself alone, as in a GPU's matmul and not in that of the CPU's library."""
    out = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        out += a[:, k : k + 1].astype(dtype) * b[k].astype(dtype)
    return out


@interpreter
@pytest.mark.parametrize("options", INVARIANT.values(), ids=INVARIANT)
def test_invariant_bits(options, monkeypatch):
    monkeypatch.setattr(invariant, "CHUNK", 64)
    monkeypatch.setattr(np, "matmul", matmul_by_columns)
    base = {"length": 121, "parents": DEEP, "heads_kv": 1, "group": 2, "head_dim": 32, "nodes": [4, 13, 15]}
    check_invariant(invariant_kernel, **{**base, **options})


@pytest.mark.parametrize("options", INVARIANT.values(), ids=INVARIANT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_lse", [False, True])  # PyTorch's own kernel, and written out
def test_invariant_bits_cpu(options, dtype, with_lse):
    def run(*args, **kw):
        out = tree_attention(*args, return_lse=with_lse, batch_invariant=True, **kw)
        return out if with_lse else (out, out.new_zeros(out.shape[0], out.shape[2], out.shape[1]))

    base = {"length": 121, "parents": DEEP, "heads_kv": 2, "group": 3, "head_dim": 64, "dtype": dtype}
    check_invariant(run, **{**base, **options})


def plain_loops(q, k_cache, v_cache, tree, lens, window, softcap):
    """Attention of one KV head with scalar arithmetic: nothing shared with the reference."""
    batch, _, heads, dim = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        parents = tree.parents[b].tolist()
        depth = []
        for i in range(int(tree.num_nodes[b])):
            depth.append(0 if i == 0 else depth[parents[i]] + 1)
            up, ancestors = i, []
            while up >= 0:
                ancestors.append(up)
                up = parents[up]
            length = int(lens[b])
            keys = [(s, s) for s in range(length)] + [(length + a, length + depth[a]) for a in ancestors]
            if window:
                keys = [key for key in keys if key[1] > length + depth[i] - window]
            for h in range(heads):
                at = h // (heads // k_cache.shape[2])
                scores = []
                for slot, _ in keys:
                    s = sum(float(x) * float(y) for x, y in zip(q[b, i, h], k_cache[b, slot, at])) / math.sqrt(dim)
                    scores.append(softcap * math.tanh(s / softcap) if softcap else s)
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                for d in range(dim):
                    total = sum(w * float(v_cache[b, slot, at, d]) for w, (slot, _) in zip(weights, keys))
                    out[b, i, h, d] = total / sum(weights)
    return out


@pytest.mark.parametrize("window, softcap", [(None, 0.0), (3, 0.0), (None, 2.0)])
def test_reference_equals_plain_loops(window, softcap):
    case = Case([5, 0], [7, 4], 7, 2, 2, 16, window=window, softcap=softcap, seed=3)
    q, k_cache, v_cache, tree, lens, kw = case.build()
    out = reference.tree_attention(q, k_cache, v_cache, tree, lens, **kw, upcast=True)
    expected = plain_loops(q, k_cache, v_cache, tree, lens, window, softcap)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_out_and_default_scale():
    q, k_cache, v_cache, tree, lens, kw = Case([9], [5], 5).build()
    out = torch.full_like(q, NAN)
    assert tree_attention(q, k_cache, v_cache, tree, lens, out=out, **kw) is out
    same = tree_attention(q, k_cache, v_cache, tree, lens, softmax_scale=64**-0.5, **kw)
    assert torch.equal(out, same)
    other = tree_attention(q, k_cache, v_cache, tree, lens, softmax_scale=0.5, **kw)
    assert not torch.allclose(out, other)


def test_values_are_clamped_not_followed():
    """No value in `cache_seqlens` or `block_table` reaches outside the cache, and debug mode names it."""
    q, k_cache, v_cache, tree, lens, kw = Case([9], [5], 5, block_size=16).build()
    k_cache, v_cache = k_cache.nan_to_num(0), v_cache.nan_to_num(0)
    for bad_lens, bad_table in ((10**6, None), (-5, None), (9, 10**6), (9, -7)):
        lens.fill_(bad_lens)
        if bad_table is not None:
            kw["block_table"] = torch.full_like(kw["block_table"], bad_table)
        for run in (public, plain_kernel) if triton_attention.INTERPRET else (public,):
            out, _ = run(q, k_cache, v_cache, tree, lens, config=TileConfig(16, 16, 2), **kw)
            assert out.isfinite().all()


@pytest.mark.parametrize("block_size", [0, 16])
def test_views_of_less_room_say_the_same(block_size):
    """As the docstring advises where lengths are known to be short; appended rows reach the cache itself."""
    q, *caches, tree, lens, kw = Case([9, 30], [5, 3], 5, block_size=block_size, append=True).build()
    if block_size:
        more = F.pad(kw["block_table"], (0, 100), value=-1)
        cut = [cache.clone() for cache in caches]
        whole, views = {**kw, "block_table": more}, {**kw, "block_table": more[:, :-100]}
        through = cut
    else:
        caches = [F.pad(cache, (0, 0, 0, 0, 0, 100), value=NAN) for cache in caches]
        cut = [cache.clone() for cache in caches]
        whole = views = kw
        through = [cache[:, :-100] for cache in cut]
    for run in (public, plain_kernel) if triton_attention.INTERPRET else (public,):
        want, got = run(q, *caches, tree, lens, **whole), run(q, *through, tree, lens, **views)
        torch.testing.assert_close(got, want)
        assert all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(cut, caches))


def test_debug_mode_checks_values(monkeypatch):
    monkeypatch.setenv("MEDUSA_KERNELS_DEBUG", "1")
    q, k_cache, v_cache, tree, lens, kw = Case([9], [5], 5, block_size=16).build()
    public(q, k_cache, v_cache, tree, lens, **kw)
    with pytest.raises(ValueError, match="cache_seqlens"):
        public(q, k_cache, v_cache, tree, lens + 10**6, **kw)
    kw["block_table"] = torch.full_like(kw["block_table"], 99)
    with pytest.raises(ValueError, match="block_table"):
        public(q, k_cache, v_cache, tree, lens, **kw)


def op_args(case, append):
    q, k_cache, v_cache, tree, lens, kw = case.build()
    new = (kw["k"], kw["v"]) if append else ()
    return (
        q, k_cache, v_cache, *new, tree.packed_mask, tree.depths, tree.num_nodes, lens, kw["block_table"], None, None,
        None, 0.125, 5, 0.0, False, torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1]).float(),
    )  # fmt: skip


@pytest.mark.parametrize("append", [False, True])
def test_opcheck(append):
    op = torch.ops.medusa_kernels.tree_attention_append if append else torch.ops.medusa_kernels.tree_attention
    torch.library.opcheck(op, op_args(Case([9, 2], [5, 4], 5, append=append), append))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    q, k_cache, v_cache, tree, lens, kw = Case([9, 2], [5, 4], 5, append=True).build()
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    expected = tree_attention(q * 2, expected_k, expected_v, tree, lens, **kw) + 1
    _ = tree.packed_mask

    def step(q, k_cache, v_cache, lens, k, v):
        return tree_attention(q * 2, k_cache, v_cache, tree, lens, k=k, v=v) + 1

    out = torch.compile(step, backend=backend, fullgraph=True)(q, k_cache, v_cache, lens, kw["k"], kw["v"])
    torch.testing.assert_close(out, expected)
    assert torch.equal(as_bytes(k_cache), as_bytes(expected_k)) and torch.equal(as_bytes(v_cache), as_bytes(expected_v))


# ---- on a GPU ----


# One option at a time on a base, and together: a random draw would spend its time compiling.
GPU_CASES = [
    {}, {"dtype": torch.float16}, {"append": True}, {"block_size": 16}, {"block_size": 20}, {"window": 100},
    {"softcap": 5.0}, {"sinks": True}, {"strided": True}, {"per_request": False}, {"fp8": True},
    {"fp8": True, "append": True}, {"fp8": True, "dtype": torch.float16}, {"num_nodes": [20, 7]},
    {"num_nodes": [0, 64], "lengths": [0, 100]}, {"lengths": [1024, 128]}, {"lengths": [0, 0]}, {"lengths": [5, 63]},
    {"head_dim": 64}, {"head_dim": 80}, {"head_dim": 96}, {"head_dim": 256},
    {"head_dim": 64, "append": True, "block_size": 16}, {"head_dim": 80, "append": True, "block_size": 16},
    {"head_dim": 96, "append": True, "block_size": 16}, {"head_dim": 256, "append": True, "block_size": 16},
    {"group": 1}, {"group": 1, "append": True}, {"group": 3, "heads_kv": 1}, {"group": 7, "head_dim": 64},
    {"group": 8, "head_dim": 64}, {"head_dim": 256, "fp8": True}, {"head_dim": 80, "fp8": True, "append": True},
    {"window": 3, "sinks": True, "softcap": 5.0, "append": True, "block_size": 64},
    {"dtype": torch.float32}, {"dtype": torch.float32, "head_dim": 64, "append": True, "block_size": 16},
    {"dtype": torch.float32, "softcap": 50.0},
    *({"size": t, "num_nodes": [t, max(t - 1, 1)], "append": t % 2 == 1} for t in (1, 5, 17, 65, 130)),
    {"heads_kv": 40, "lengths": [1000, 130, 64, 0, 700], "num_nodes": [64, 60, 0, 64, 1]},
    *({"size": t, "num_nodes": [t, t], "group": 1} for t in (1, 5, 17, 65, 130)),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("run", [public, plain_kernel])  # on Hopper the first is another kernel where it can be
@pytest.mark.parametrize("options", GPU_CASES, ids=str)
def test_gpu(options, run):
    base = {"lengths": [1000, 130], "num_nodes": [64, 64], "size": 64, "group": 4, "head_dim": 128}
    check(Case(**{**base, "dtype": torch.bfloat16, **options}, device="cuda"), run)


@pytest.mark.gpu
@pytest.mark.parametrize("group, heads_kv", [(1, 32), (4, 8)])
@pytest.mark.parametrize("size", [1, 256, 512])
@pytest.mark.parametrize("block_size", [0, 16])  # more pages than what a warp may know beforehand
def test_gpu_long(group, heads_kv, size, block_size):
    case = Case([5000, 37], [size, size], size, heads_kv, group, 128, torch.bfloat16, block_size, device="cuda")
    check(case, public)


@pytest.mark.gpu
@pytest.mark.parametrize("options", GPU_CASES, ids=str)
def test_gpu_invariant(options):
    base = {"lengths": [1000, 130], "num_nodes": [64, 64], "size": 64, "group": 4, "head_dim": 128}
    check(Case(**{**base, "dtype": torch.bfloat16, **options}, device="cuda"), public_invariant)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {}, {"length": 3000}, {"length": 0}, {"length": 500, "window": 100}, {"length": 511}, {"softcap": 5.0},
        {"dtype": torch.float16}, {"dtype": torch.float32}, {"cache_dtype": torch.float8_e4m3fn}, {"heads_kv": 1},
        {"group": 1}, {"group": 7, "head_dim": 64}, {"head_dim": 80}, {"head_dim": 256, "group": 2}, {"group": 70},
    ],
    ids=str,
)  # fmt: skip
def test_gpu_invariant_bits(options):
    sparse = TokenTree.preset("mc_sim_7b_63").parents.tolist()
    base = {"length": 1020, "parents": sparse, "heads_kv": 8, "group": 4, "head_dim": 128, "dtype": torch.bfloat16}
    check_invariant(public_invariant, **{**base, **options}, device="cuda", nodes=range(0, 64, 5))


@pytest.mark.gpu
def test_gpu_invariant_bits_of_a_deep_tree():
    base = {"length": 500, "heads_kv": 8, "group": 4, "head_dim": 128, "dtype": torch.bfloat16}
    check_invariant(public_invariant, parents=[i - 1 - (i % 7 == 3) for i in range(150)], device="cuda",
                    nodes=[0, 3, 11, 12, 13, 70, 149], **base)  # fmt: skip


def replay_variants(device):
    """Calls that differ from the first in what Triton compiles for, with shapes that are the same as far as can be."""

    def call(shift=0, heads_kv=4, size=16, length=300, strided=False, dtype=torch.bfloat16, **kw):  # fmt: skip
        def tensor(*shape):  # `shift` elements into its storage
            return torch.randn(math.prod(shape) + shift, device=device).to(dtype)[shift:].view(shape)

        k_cache, v_cache = (tensor(2, heads_kv, 1024, 128).transpose(1, 2) if strided
                            else tensor(2, 1024, heads_kv, 128) for _ in range(2))  # fmt: skip
        new = {"k": tensor(2, size, heads_kv, 128), "v": tensor(2, size, heads_kv, 128)}
        tree = TokenTree.from_parents(torch.tensor([max(i // 2 - 1, 0) if i else -1 for i in range(size)])).to(device)
        lens = torch.tensor([length, 7], dtype=torch.int32, device=device)
        return (tensor(2, size, 16, 128), k_cache, v_cache, tree, lens), new | kw

    return [
        call(**options)
        for options in (
            {}, {"shift": 4}, {"shift": 1}, {"length": 900}, {"strided": True}, {"size": 1}, {"size": 17},
            {"heads_kv": 1}, {"heads_kv": 16}, {"dtype": torch.float16}, {"window": 100}, {"softmax_scale": 0.5}, {},
            {"batch_invariant": True}, {"batch_invariant": True, "shift": 4}, {"return_lse": True},
        )
    ]  # fmt: skip


@pytest.fixture
def triton_alone(monkeypatch):
    """No launch by Hopper's CUDA kernel, which would take most of the calls."""
    monkeypatch.setattr(_sm90, "prepare", lambda *args: None)
    attention._known.clear()
    yield
    attention._known.clear()


@pytest.mark.gpu
def test_gpu_replayed_launch_equals_tritons_own(triton_alone):
    """Variants one after another, each twice on other tensors, then once more with nothing remembered."""
    for (args, kw), (args_2, kw_2) in zip(replay_variants("cuda"), replay_variants("cuda")):
        tree_attention(*args, **kw)
        replays = [again for again in attention._known.values() if again is not attention._through_op]
        got = tree_attention(*args_2, **kw_2)
        caches = [x.clone() for x in args_2[1:3]]
        assert replays
        attention._known.clear()
        expected = tree_attention(*args_2, **kw_2)
        for x, y in zip(got, expected) if kw.get("return_lse") else [(got, expected)]:
            assert torch.equal(x, y)
        assert all(torch.equal(x, y) for x, y in zip(caches, args_2[1:3]))
    attention._known.clear()
    calls = replay_variants("cuda")  # all remembered at once
    expected = [tree_attention(*args, **kw) for args, kw in calls]
    for (args, kw), y in zip(calls, expected):
        x = tree_attention(*args, **kw)
        assert all(map(torch.equal, x, y)) if kw.get("return_lse") else torch.equal(x, y)


@pytest.mark.gpu
def test_gpu_replay_gives_way_to_profilers(triton_alone):
    """A hook on launches is called, though the same call was made before without it."""
    from triton import knobs

    (args, kw), *_ = replay_variants("cuda")
    expected = tree_attention(*args, **kw)
    seen = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert torch.equal(tree_attention(*args, **kw), expected)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert "tree_attention_kernel" in seen
    count = len(seen)
    assert torch.equal(tree_attention(*args, **kw), expected) and len(seen) == count


@pytest.mark.gpu
def test_gpu_fp8_rounds_and_saturates():
    case = Case([33], [17], 17, 2, 4, 128, torch.bfloat16, fp8=True, append=True, device="cuda")
    q, k_cache, v_cache, tree, lens, kw = case.build()
    kw["k"], kw["v"] = torch.randn_like(kw["k"]) * 300, torch.randn_like(kw["v"])
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    reference.tree_attention(q, expected_k, expected_v, tree, lens, **kw)
    tree_attention(q, k_cache, v_cache, tree, lens, **kw)
    assert torch.equal(as_bytes(k_cache), as_bytes(expected_k)) and torch.equal(as_bytes(v_cache), as_bytes(expected_v))


@pytest.mark.gpu
def test_gpu_graph_with_changing_lengths():
    case = Case([700, 300, 5], [64, 64, 64], 64, 8, 4, 128, torch.bfloat16, append=True, device="cuda")
    q, k_cache, v_cache, tree, lens, kw = case.build()
    k_cache, v_cache = k_cache.nan_to_num(0.5), v_cache.nan_to_num(0.5)
    out = tree_attention(q, k_cache, v_cache, tree, lens, **kw)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree_attention(q, k_cache, v_cache, tree, lens, out=out, **kw)
    for lengths in ([700, 300, 5], [0, 1, 2], [64, 699, 511]):
        lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        expected = tree_attention(q, k_cache.clone(), v_cache.clone(), tree, lens, **kw)
        out.fill_(NAN)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gpu_deterministic_and_without_sync():
    q, k_cache, v_cache, tree, lens, kw = Case(
        [3000, 100], [64, 64], 64, 8, 4, 128, torch.bfloat16, device="cuda"
    ).build()
    first = tree_attention(q, k_cache, v_cache, tree, lens, **kw)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [tree_attention(q, k_cache, v_cache, tree, lens, **kw) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, x) for x in again)


@pytest.mark.gpu
@pytest.mark.parametrize("append", [False, True])
def test_gpu_opcheck(append):
    op = torch.ops.medusa_kernels.tree_attention_append if append else torch.ops.medusa_kernels.tree_attention
    case = Case([9, 2], [5, 4], 5, dtype=torch.bfloat16, append=append, device="cuda")
    torch.library.opcheck(op, op_args(case, append))


@pytest.mark.gpu
def test_gpu_compile_fullgraph():
    q, k_cache, v_cache, tree, lens, _ = Case([90, 2], [5, 4], 5, dtype=torch.bfloat16, device="cuda").build()
    expected = tree_attention(q * 2, k_cache, v_cache, tree, lens) + 1
    _ = tree.packed_mask
    step = torch.compile(lambda q: tree_attention(q * 2, k_cache, v_cache, tree, lens) + 1, fullgraph=True)
    assert torch.equal(step(q), expected)


def test_only_checked_calls_pass_without_checks():
    """What the operator was called with by itself, by whatever arguments, is not known to the public function."""
    case = Case([30], [8], 8, window=5)
    q, k_cache, v_cache, tree, lens, _ = case.build()
    launched = []
    attention._known.clear()
    tensors = (q, k_cache, v_cache, None, None, tree.packed_mask, tree.depths, tree.num_nodes, lens, *[None] * 4, q)
    attention._known.remember((*tensors, None), (0.25, 5, 0.0, False), lambda addresses: not launched.append(addresses))
    for calls in (0, 1):  # the second one passed the checks before
        tree_attention(q, k_cache, v_cache, tree, lens, softmax_scale=0.25, window=5, out=torch.empty_like(q))
        assert len(launched) == calls
    attention._known.clear()
