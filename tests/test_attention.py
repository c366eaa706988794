"""Tree attention: Triton kernel (plain_kernel without a GPU), CPU operator and reference against float64 and loops."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_kernels import TokenTree, reference, tree_attention
from medusa_kernels._triton import tree_attention as triton_attention
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
        window=draw(st.one_of(st.none(), st.integers(1, 200))), softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        sinks=draw(st.booleans()), seed=draw(st.integers(0, 2**20)), device=device,
    )  # fmt: skip


slow_ok = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=120, **slow_ok)
@given(cases(dtypes=(torch.float32, torch.bfloat16, torch.float16), dims=(16, 64, 80, 96, 128, 256)))
def test_cpu_operator(case):
    check(case, public)


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
        None, 0.125, 5, 0.0, torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device),
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
def test_gpu_long(group, heads_kv, size):
    check(Case([5000, 37], [size, size], size, heads_kv, group, 128, torch.bfloat16, device="cuda"), public)


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
