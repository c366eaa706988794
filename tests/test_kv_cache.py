"""compact_kv_cache: the kernels against the reference, byte for byte over whole buffers; the reference by hand."""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calls import Odd, Seen
from torch import Tensor

from medusa_kernels import _calls, _ops, kv_cache, reference
from medusa_kernels.kv_cache import compact_kv_cache

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "uint8": torch.uint8,
    "fp8": torch.float8_e4m3fn,
    "fp64": torch.float64,
}
LAYOUTS = [
    "stacked",
    "stacked, heads before slots",
    "stacked, slice of a larger buffer",
    "layers",
    "layers, heads before slots",
    "layers, head_dim not contiguous",
    "layers, misaligned",
    "layers, one row dimension",
    "layers, scales per token",
]


@dataclass
class Case:
    """Arguments of a call, and the buffers that all cache tensors are views of."""

    kv: object
    path: Tensor
    accept_length: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    buffers: list[Tensor] = field(default_factory=list)

    def call(self, function) -> None:
        function(self.kv, self.path, self.accept_length, self.cache_seqlens, block_table=self.block_table)

    def state(self) -> list[Tensor]:
        return [b.cpu().clone() for b in [*self.buffers, self.cache_seqlens]]


def make_case(
    seed: int,
    layout: str,
    dtype: str,
    paged: bool,
    device="cpu",
    hostile=False,
    layers=2,
    batch=None,
    heads=None,
    dim=None,
) -> Case:
    """The same arguments for the same seed, on any device; hostile: values on the device are garbage."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = batch or rng.randint(1, 4)
    heads, dim = heads or rng.choice([1, 2, 3, 8]), dim or rng.choice([1, 3, 8, 16, 20])
    max_depth = rng.randint(0, 12)
    num_nodes = rng.randint(max_depth + 1, 24)
    room = num_nodes + rng.randint(0, 20)
    block_size = rng.choice([1, 3, 16])
    max_blocks = -(-room // block_size)
    num_blocks = batch * max_blocks + rng.randint(0, 3)
    first, second = (num_blocks, block_size) if paged else (batch, room)
    capacity = max_blocks * block_size if paged else room
    buffers: list[Tensor] = []

    def new(*shape: int, dtype: torch.dtype = DTYPES[dtype], offset: int = 0) -> Tensor:
        numel = torch.Size(shape).numel()
        raw = torch.randint(0, 256, ((numel + offset) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        buffers.append(raw.to(device))
        return buffers[-1].view(dtype)[offset:].view(shape)

    def cache() -> tuple[Tensor, ...]:
        if layout == "layers":
            return new(first, second, heads, dim), new(first, second, heads, dim)
        if layout == "layers, heads before slots":
            return tuple(new(first, heads, second, dim).transpose(1, 2) for _ in "kv")
        if layout == "layers, head_dim not contiguous":
            return tuple(new(first, second, dim, heads + 1).transpose(2, 3)[:, :, 1:] for _ in "kv")
        if layout == "layers, misaligned":
            return tuple(new(first, second, heads, dim, offset=offset) for offset in (1, 3))
        if layout == "layers, one row dimension":
            return (new(first, second, heads * dim),)
        assert layout == "layers, scales per token"
        scales = [new(first, second, heads, dtype=torch.float32), new(first, second, dtype=torch.float16)]
        return (new(first, second, heads, dim), new(first, second, heads, dim), *scales)

    if layout == "stacked":
        kv: object = new(layers, 2, first, second, heads, dim)
    elif layout == "stacked, heads before slots":
        kv = new(layers, 2, first, heads, second, dim).transpose(3, 4)
    elif layout == "stacked, slice of a larger buffer":
        kv = new(layers, 2, first, second + 2, heads + 1, dim + 3)[:, :, :, 1:-1, 1:, :dim]
    else:
        kv = [cache() for _ in range(layers)]

    paths = torch.full((batch, max_depth + 1), -1, dtype=torch.int32)
    accepts, lengths = [], []
    for b in range(batch):
        accepted = rng.choice([-1, 0, max_depth, rng.randint(0, max_depth)])
        accepts.append(accepted)
        longest = capacity - num_nodes
        lengths.append(0 if accepted == -1 else rng.choice([0, longest, rng.randint(0, longest)]))
        nodes = [0, *sorted(rng.sample(range(1, num_nodes), accepted))] if accepted >= 0 else []
        if rng.random() < 0.2 and accepted >= 0:
            nodes = list(range(accepted + 1))  # nothing to move
        paths[b, : len(nodes)] = torch.tensor(nodes, dtype=torch.int32)
    table = None
    if paged:
        blocks = rng.sample(range(num_blocks), batch * max_blocks)
        table = torch.tensor(blocks, dtype=torch.int32).view(batch, max_blocks)
    if hostile:
        extreme = [-(2**31), 2**31 - 1, -1]
        wild = [*extreme, capacity, capacity - 1, 511, 512, 0, 1, 2, 3]
        # Block numbers stay distinct: two slots that share memory have no defined result.
        for tensor, values in ((paths, wild), (table, [*extreme, num_blocks])):
            if tensor is not None:
                for _ in range(rng.randint(0, 4)):
                    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(values)
        accepts = [rng.choice([a, a, *wild]) for a in accepts]
        lengths = [rng.choice([n, n, n, *wild]) for n in lengths]
    accept_length, cache_seqlens = (torch.tensor(x, dtype=torch.int32) for x in (accepts, lengths))
    if table is not None:
        table = torch.cat([table, table], 1)[:, :max_blocks].to(device)
    return Case(kv, paths.to(device), accept_length.to(device), cache_seqlens.to(device), table, buffers)


def check_against_reference(device="cpu", **options) -> None:
    case, expected = make_case(device=device, **options), make_case(**options)
    case.call(compact_kv_cache)
    expected.call(reference.compact_kv_cache)
    for got, want in zip(case.state(), expected.state(), strict=True):
        assert torch.equal(got, want)


# ---- the reference ----


def test_reference_by_hand():
    kv = torch.arange(10.0).view(1, 10, 1, 1).repeat(2, 1, 1, 1)  # each slot holds its number
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    path = torch.tensor([[0, 2, 5, -1], [0, -1, -1, -1]], dtype=torch.int32)
    reference.compact_kv_cache([(kv,)], path, torch.tensor([2, 0], dtype=torch.int32), lengths)
    assert kv[0].flatten().tolist() == [0, 1, 2, 3, 5, 8, 6, 7, 8, 9]
    assert kv[1].flatten().tolist() == list(range(10))
    assert lengths.tolist() == [6, 1]


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_reference_is_gather_then_copy(paged):
    for seed in range(60):
        case = make_case(seed, "layers, scales per token", "fp16", paged)
        wanted = []
        for layer in case.kv:
            for cache in layer:  # each request's slots side by side, moved by one indexing expression
                rows = cache if case.block_table is None else cache[case.block_table.long()].flatten(1, 2)
                rows = rows.clone()
                for b, (length, accepted) in enumerate(zip(case.cache_seqlens.tolist(), case.accept_length.tolist())):
                    nodes = case.path[b, : accepted + 1].long()
                    rows[b, length : length + accepted + 1] = rows[b, length + nodes]
                wanted.append(rows.view(torch.uint8) if rows.dim() > 2 else rows)
        lengths = case.cache_seqlens + case.accept_length + 1
        case.call(reference.compact_kv_cache)
        caches = [cache for layer in case.kv for cache in layer]
        for cache, rows in zip(caches, wanted, strict=True):
            got = cache if case.block_table is None else cache[case.block_table.long()].flatten(1, 2)
            got, rows = (x.contiguous().view(torch.uint8) for x in (got, rows))
            assert torch.equal(got, rows)
        assert torch.equal(case.cache_seqlens, lengths)


# ---- the kernels ----

OPTIONS = {
    "seed": st.integers(0, 2**32 - 1),
    "layout": st.sampled_from(LAYOUTS),
    "dtype": st.sampled_from(sorted(DTYPES)),
    "paged": st.booleans(),
    "hostile": st.booleans(),
}


@settings(max_examples=400, deadline=None)
@given(**OPTIONS)
def test_equals_reference(seed, layout, dtype, paged, hostile):
    check_against_reference(seed=seed, layout=layout, dtype=dtype, paged=paged, hostile=hostile)


@pytest.mark.gpu
@settings(max_examples=400, deadline=None)
@given(**OPTIONS)
def test_equals_reference_gpu(seed, layout, dtype, paged, hostile):
    check_against_reference("cuda", seed=seed, layout=layout, dtype=dtype, paged=paged, hostile=hostile)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_only_the_trees_slots_change(layout, paged):
    for seed in range(20):
        case = make_case(seed, layout, "fp16", paged)
        before, lengths = case.state(), case.cache_seqlens.tolist()
        caches = [c for layer in case.kv for c in layer]
        case.call(compact_kv_cache)
        # Slots that may change, marked in a copy of the buffers by writing zeros through the same views.
        for b, length in enumerate(lengths):
            for slot in range(length, length + int(case.accept_length[b]) + 1):
                at = (b, slot)
                if case.block_table is not None:
                    size = caches[0].shape[1]
                    at = (int(case.block_table[b, slot // size]), slot % size)
                for cache in caches:
                    cache[at] = 0
        for got, old in zip(case.buffers, before):
            assert ((got == old) | (got == 0)).all()


def check_again(device, seed, layout, paged, **options) -> None:
    """The checked call, then the same with other values in tensors at other addresses."""
    kept, known = [], None
    for number in range(3):
        case = make_case(seed, layout, "fp16", paged, device, **options)
        expected = make_case(seed, layout, "fp16", paged, **options)
        for x in (case, expected):  # another path each time
            x.accept_length.copy_((x.accept_length - number).clamp(min=-1))
        case.call(compact_kv_cache)
        expected.call(reference.compact_kv_cache)
        for got, want in zip(case.state(), expected.state(), strict=True):
            assert torch.equal(got, want)
        assert known is None or kv_cache._known.values() == known
        known = kv_cache._known.values()
        kept.append(case)  # so that no address comes twice


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_known_calls_equal_reference(layout, paged):
    kv_cache._known.clear()
    for seed in range(20):
        check_again("cpu", seed, layout, paged)
    assert len(kv_cache._known.values()) > 10


def test_known_calls_without_the_compiled_part(monkeypatch):
    monkeypatch.setattr(kv_cache, "_known", _calls.PythonCalls())
    for layout in LAYOUTS:
        check_again("cpu", 3, layout, False)
    assert len(kv_cache._known.values()) >= len(LAYOUTS) - 1


def test_a_known_call_does_not_let_the_same_tensor_twice_pass():
    """Alike in all but addresses, which a call's signature does not tell."""
    case = good()
    for _ in range(2):
        good().call(compact_kv_cache)
    case.kv = [case.kv[0], (case.kv[1][0], case.kv[0][1])]
    before = case.state()
    with pytest.raises(ValueError, match=r"^kv: .*twice"):
        case.call(compact_kv_cache)
    assert all(torch.equal(a, b) for a, b in zip(before, case.state(), strict=True))


def test_tensors_in_place_of_layers():
    """A list of tensors is not the call of one of them, and its layers are not the tensors that are moved."""
    options = {"layout": "stacked", "dtype": "fp32", "paged": False, "batch": 3}
    want = make_case(1, **options)
    want.call(reference.compact_kv_cache)
    kv_cache._known.clear()
    for _ in range(3):
        make_case(1, **options).call(compact_kv_cache)
        case = make_case(1, **options)
        case.kv = list(case.kv)
        case.call(compact_kv_cache)
        assert all(torch.equal(a, b) for a, b in zip(case.state(), want.state(), strict=True))
        alone = make_case(1, **options)
        alone.kv = [alone.kv]
        before = alone.state()
        with pytest.raises(TypeError, match=r"^kv: expected a tensor, or a tuple"):
            alone.call(compact_kv_cache)
        assert all(torch.equal(a, b) for a, b in zip(alone.state(), before, strict=True))
    assert len(kv_cache._known.values()) == 1


def test_layers_of_any_sequence():
    want = good()
    want.call(reference.compact_kv_cache)

    class Layer(NamedTuple):
        k: Tensor
        v: Tensor

    makers = [tuple, lambda kv: [list(layer) for layer in kv], lambda kv: [Layer(*layer) for layer in kv],
              lambda kv: (tuple(layer) for layer in kv), lambda kv: [iter(layer) for layer in kv]]  # fmt: skip
    for make in makers:
        for _ in range(2):
            case = good()
            case.kv = make(case.kv)
            case.call(compact_kv_cache)
            assert all(torch.equal(a, b) for a, b in zip(case.state(), want.state(), strict=True))


def test_where_something_has_to_see_the_operator():
    want = good()
    want.call(reference.compact_kv_cache)
    good().call(compact_kv_cache)  # known
    cases = [good(), good()]
    cases[0].kv = [tuple(x.as_subclass(Odd) for x in layer) for layer in cases[0].kv]
    cases[0].call(compact_kv_cache)
    with Seen() as seen:
        cases[1].call(compact_kv_cache)
    assert seen.names.count("medusa_kernels.compact_kv_cache.default") == 1
    for case in cases:
        assert all(torch.equal(a, b) for a, b in zip(case.state(), want.state(), strict=True))


def test_long_paths_run_to_512_nodes():
    nodes = torch.arange(512, dtype=torch.int32).repeat(2, 1)
    nodes[1] = torch.cat([torch.arange(0, 511, 2), torch.full((256,), -1)])
    kv = torch.randn(1, 2, 2, 520, 2, 4)
    other, lengths = kv.clone(), torch.tensor([8, 0], dtype=torch.int32)
    accepted = torch.tensor([511, 255], dtype=torch.int32)
    other_lengths = lengths.clone()
    compact_kv_cache(kv, nodes, accepted, lengths)
    reference.compact_kv_cache(other, nodes, accepted, other_lengths)
    assert torch.equal(kv, other) and lengths.tolist() == other_lengths.tolist() == [520, 256]


def test_nothing_of_a_padded_request_changes():
    case = make_case(3, "layers", "fp32", True, batch=3)
    case.accept_length.fill_(-1)
    case.path.fill_(-1)
    case.cache_seqlens.zero_()
    case.block_table.fill_(-1)
    before = case.state()
    case.call(compact_kv_cache)
    assert all(torch.equal(a, b) for a, b in zip(before, case.state()))


def test_no_requests():
    empty = torch.zeros(0, dtype=torch.int32)
    compact_kv_cache(torch.randn(1, 2, 0, 8, 1, 4), torch.zeros(0, 3, dtype=torch.int32), empty, empty)


# ---- bad input ----


def good() -> Case:
    return make_case(5, "layers", "fp16", False, batch=3, heads=2, dim=8)


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def change(name, to):
    """A case whose argument `name` is `to(what it was)`."""

    def edit(case: Case) -> None:
        setattr(case, name, to(getattr(case, name)))

    return edit


def first_cache(to):
    return change("kv", lambda kv: [(to(kv[0][0]), kv[0][1]), *kv[1:]])


BAD = {
    "kv is a number": (change("kv", lambda kv: 3), TypeError, "kv"),
    "kv is a flat list": (change("kv", lambda kv: [c for layer in kv for c in layer]), TypeError, "kv"),
    "kv holds None": (first_cache(lambda c: None), TypeError, "kv"),
    "kv is empty": (change("kv", lambda kv: []), ValueError, "kv"),
    "kv of another length": (first_cache(lambda c: c[:, 1:]), ValueError, "kv"),
    "kv of another batch": (first_cache(lambda c: c[:2]), ValueError, "kv"),
    "kv of one dimension": (first_cache(lambda c: c.flatten()), ValueError, "kv"),
    "kv expanded over slots": (first_cache(lambda c: c[:, :1].expand(c.shape)), ValueError, "kv.*expanded"),
    "kv expanded over heads": (first_cache(lambda c: c[:, :, :1].expand(c.shape)), ValueError, "kv.*expanded"),
    "kv of no elements": (first_cache(lambda c: c[..., :0]), ValueError, "kv.*empty"),
    "kv twice the same": (change("kv", lambda kv: [kv[0], kv[0]]), ValueError, "kv.*twice"),
    "kv with four strided row dimensions": (
        first_cache(lambda c: torch.zeros(*c.shape[:2], 4, 4, 4, 4)[..., ::2, ::2, ::2, ::2]),
        ValueError,
        "kv.*strided",
    ),
    "stacked kv without layers": (change("kv", lambda kv: kv[0][0]), ValueError, "kv"),
    "path is a list": (change("path", lambda x: x.tolist()), TypeError, "path"),
    "path of int64": (change("path", lambda x: x.long()), ValueError, "path.*int32.*int64"),
    "path of one dimension": (change("path", lambda x: x[0]), ValueError, "path"),
    "path without nodes": (change("path", lambda x: x[:, :0]), ValueError, "path"),
    "path too wide": (change("path", lambda x: x.new_zeros(3, 513)), ValueError, "path.*512"),
    "path strided": (change("path", lambda x: x.repeat(1, 2).t().contiguous().t()), ValueError, "path.*contiguous"),
    "accept_length is an int": (change("accept_length", lambda x: 2), TypeError, "accept_length"),
    "accept_length of another batch": (change("accept_length", lambda x: x[:2]), ValueError, "accept_length"),
    "accept_length of int64": (change("accept_length", lambda x: x.long()), ValueError, "accept_length.*int32"),
    "cache_seqlens of another batch": (change("cache_seqlens", lambda x: x[:2]), ValueError, "cache_seqlens"),
    "cache_seqlens of float": (change("cache_seqlens", lambda x: x.float()), ValueError, "cache_seqlens.*int32"),
    "cache_seqlens strided": (
        change("cache_seqlens", lambda x: x.repeat(2)[::2]),
        ValueError,
        "cache_seqlens.*contiguous",
    ),
    "block_table of another batch": (change("block_table", lambda _: int32(2, 4)), ValueError, "block_table"),
    "block_table of int64": (
        change("block_table", lambda _: torch.zeros(3, 4).long()),
        ValueError,
        "block_table.*int32",
    ),
    "block_table of one dimension": (change("block_table", lambda _: int32(3)), ValueError, "block_table"),
    "block_table without blocks": (change("block_table", lambda _: int32(3, 0)), ValueError, "block_table"),
    "path on another device": (change("path", lambda x: x.to("meta")), ValueError, "path"),
}


@pytest.mark.parametrize("edit, error, match", BAD.values(), ids=BAD)
def test_bad_input_raises_and_writes_nothing(edit, error, match):
    case = good()
    before, lengths = case.state(), case.cache_seqlens
    edit(case)
    with pytest.raises(error, match=match):
        case.call(compact_kv_cache)
    assert all(torch.equal(a, b) for a, b in zip(before, [*case.buffers, lengths], strict=True))


BAD_VALUES = {
    "path decreases": ("path", (0, 2), 1),
    "path repeats": ("path", (0, 1), 0),
    "path is negative": ("path", (0, 0), -1),
    "accept_length too large": ("accept_length", (0,), 3),
    "accept_length too small": ("accept_length", (0,), -2),
    "cache_seqlens negative": ("cache_seqlens", (0,), -1),
    "cache_seqlens too large": ("cache_seqlens", (0,), 31),
    "block_table out of range": ("block_table", (0, 0), 8),
}


@pytest.mark.parametrize("name, at, value", BAD_VALUES.values(), ids=BAD_VALUES)
def test_debug_checks_values(name, at, value, monkeypatch):
    kv = torch.randn(1, 2, 8, 8, 1, 4)
    args = {
        "path": torch.tensor([[0, 2, 4], [0, 1, -1]], dtype=torch.int32),
        "accept_length": torch.tensor([2, 1], dtype=torch.int32),
        "cache_seqlens": torch.tensor([5, 9], dtype=torch.int32),
        "block_table": torch.arange(8, dtype=torch.int32).view(2, 4),
    }
    compact_kv_cache(kv, **{k: v.clone() for k, v in args.items()})  # known, which changes nothing here
    monkeypatch.setenv("MEDUSA_KERNELS_DEBUG", "1")
    compact_kv_cache(kv, **{k: v.clone() for k, v in args.items()})
    args[name][at] = value
    before = kv.clone()
    with pytest.raises(ValueError, match=name):
        compact_kv_cache(kv, **args)
    assert torch.equal(kv, before)


def test_missing_extension_names_the_build_command(monkeypatch):
    monkeypatch.setattr(_ops, "HAS_CPU_OPS", False)
    kv_cache._known.clear()
    with pytest.raises(RuntimeError, match="pip install --no-build-isolation"):
        good().call(compact_kv_cache)


# ---- as an operator of torch ----


def check_opcheck(device) -> None:
    for layout in ("stacked, heads before slots", "layers, scales per token"):
        for paged in (False, True):
            case = make_case(11, layout, "fp16", paged, device, batch=2)
            for buffer in case.buffers:  # opcheck compares values, and a NaN is not equal to itself
                buffer.fill_(1)
            stacked = isinstance(case.kv, Tensor)
            caches = [case.kv] if stacked else [c for layer in case.kv for c in layer]
            args = (caches, 2 if stacked else 0, case.path, case.accept_length, case.cache_seqlens, case.block_table)
            torch.library.opcheck(torch.ops.medusa_kernels.compact_kv_cache.default, args)


def check_compile(device, backend) -> None:
    torch._dynamo.reset()

    def step(kv, path, accept_length, cache_seqlens, block_table):
        compact_kv_cache(kv, path, accept_length, cache_seqlens, block_table=block_table)
        return cache_seqlens * 2

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for layout, paged in (("stacked, heads before slots", False), ("layers", True)):
        case, expected = (make_case(7, layout, "fp32", paged, d, batch=2) for d in (device, "cpu"))
        out = compiled(case.kv, case.path, case.accept_length, case.cache_seqlens, case.block_table)
        expected.call(reference.compact_kv_cache)
        assert torch.equal(out.cpu(), expected.cache_seqlens * 2)
        for got, want in zip(case.state(), expected.state(), strict=True):
            assert torch.equal(got, want)


def test_opcheck():
    check_opcheck("cpu")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    check_compile("cpu", backend)


@pytest.mark.gpu
def test_opcheck_gpu():
    check_opcheck("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_gpu(backend):
    check_compile("cuda", backend)


# ---- what only a GPU has ----


@pytest.mark.gpu
def test_model_sized_cache_gpu():
    for layout in ("stacked", "layers, heads before slots"):
        for batch in (1, 7):
            check_against_reference(
                "cuda", seed=batch, layout=layout, dtype="bf16", paged=False, layers=32, batch=batch, heads=8, dim=128
            )


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [64, 65, 512, 700])
def test_more_tensors_than_a_launch_takes_gpu(layers):
    check_against_reference(
        "cuda", seed=1, layout="layers", dtype="fp16", paged=False, layers=layers, batch=2, heads=1, dim=8
    )


@pytest.mark.gpu
def test_more_layouts_than_a_launch_takes_gpu():
    torch.manual_seed(0)
    kv = [(torch.randn(2, 40, 2, d), torch.randn(2, 40, d)) for d in range(1, 14)]
    path = torch.tensor([[0, 3, 9], [0, 1, 7]], dtype=torch.int32)
    accepted, lengths = torch.tensor([2, 2], dtype=torch.int32), torch.tensor([20, 3], dtype=torch.int32)
    on_gpu = [tuple(c.cuda() for c in layer) for layer in kv]
    gpu_lengths = lengths.cuda()
    compact_kv_cache(on_gpu, path.cuda(), accepted.cuda(), gpu_lengths)
    reference.compact_kv_cache(kv, path, accepted, lengths)
    assert torch.equal(gpu_lengths.cpu(), lengths)
    for got, want in zip([c for layer in on_gpu for c in layer], [c for layer in kv for c in layer], strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_cuda_graph_with_changing_lengths_gpu(paged):
    options = {"layout": "stacked", "dtype": "bf16", "paged": paged, "layers": 8, "batch": 4, "heads": 4, "dim": 64}
    case, expected = make_case(2, device="cuda", **options), make_case(2, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call(compact_kv_cache)
    capacity = case.kv.shape[3] * (case.block_table.shape[1] if paged else 1)
    rng = random.Random(0)
    for _ in range(50):
        for b in range(4):
            accepted = rng.randint(-1, case.path.shape[1] - 1)
            reach = rng.randint(max(accepted, 0), min(capacity - 1, 30))
            expected.accept_length[b] = accepted
            expected.cache_seqlens[b] = rng.randint(0, capacity - 1 - reach)
            expected.path[b] = -1
            nodes = sorted(rng.sample(range(reach + 1), accepted + 1))
            expected.path[b, : accepted + 1] = torch.tensor(nodes, dtype=torch.int32)
        for name in ("path", "accept_length", "cache_seqlens"):
            getattr(case, name).copy_(getattr(expected, name))
        graph.replay()
        expected.call(reference.compact_kv_cache)
        for got, want in zip(case.state(), expected.state(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_streams_and_graphs_at_once_gpu():
    """Lengths are written by the last block to arrive: launches that overlap must not count each other's blocks."""
    batch, steps = 16, 300
    path = torch.zeros(batch, 1, dtype=torch.int32, device="cuda")
    accepted = torch.zeros(batch, dtype=torch.int32, device="cuda")
    kv = [torch.zeros(8, 2, batch, 2 * steps + 8, 4, 64, dtype=torch.half, device="cuda") for _ in range(4)]
    lengths = [torch.zeros(batch, dtype=torch.int32, device="cuda") for _ in kv]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            compact_kv_cache(kv[i], path, accepted, lengths[i])
    streams = [torch.cuda.Stream() for _ in kv]
    torch.cuda.synchronize()
    for _ in range(steps):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < len(graphs):
                    graphs[i].replay()
                else:
                    compact_kv_cache(kv[i], path, accepted, lengths[i])
    torch.cuda.synchronize()
    for length in lengths:
        assert length.tolist() == [steps] * batch


@pytest.mark.gpu
def test_no_host_sync_gpu():
    case = make_case(4, "layers", "fp16", True, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.call(compact_kv_cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cache_and_path_on_different_devices_gpu():
    case = make_case(4, "layers", "fp16", False, "cuda")
    with pytest.raises(ValueError, match="path"):
        compact_kv_cache(case.kv, case.path.cpu(), case.accept_length, case.cache_seqlens)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_calls_equal_reference_gpu(layout):
    for paged in (False, True):
        for seed in range(8):
            check_again("cuda", seed, layout, paged)


@pytest.mark.gpu
def test_known_calls_of_several_launches_gpu():
    for layers in (65, 700):
        check_again("cuda", 1, "layers", False, layers=layers, batch=2, heads=1, dim=8)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_where_another_device_is_current_gpu():
    for current in (0, 1):
        for device in ("cuda:0", "cuda:1"):
            with torch.cuda.device(current):
                check_again(device, 2, "layers", True, batch=3)
                assert torch.cuda.current_device() == current
