"""verify_step: against the reference on random cases, and by hand."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from medusa_kernels import TokenTree, _calls, reference, verify, verify_step
from medusa_kernels.acceptance import Acceptance

VOCAB = 6  # few tokens, so that drafts are often right


@dataclass
class Case:
    """Arguments of a call; `state()` is all that it changes."""

    logits: Tensor
    tokens: Tensor
    tree: TokenTree
    kv: Tensor
    cache_seqlens: Tensor
    max_tokens: Tensor
    root: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def call(self, function, **more) -> verify.VerifiedStep:
        return function(self.logits, self.tokens, self.tree, self.kv, self.cache_seqlens, self.max_tokens, self.root,
                        **self.options, **more)  # fmt: skip

    def state(self) -> list[Tensor]:
        extra = [self.options.get(name) for name in ("last_hidden", "seed")]
        tensors = [self.kv, self.cache_seqlens, self.max_tokens, self.root]
        return [x.cpu().clone() for x in tensors + extra if isinstance(x, Tensor)]

    def to(self, device) -> "Case":
        """A copy, on that device."""
        move = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        tensors = (self.kv, self.cache_seqlens, self.max_tokens, self.root)
        return Case(self.logits.to(device), self.tokens.to(device), self.tree.to(device),
                    *(x.to(device, copy=True) for x in tensors), move)  # fmt: skip


def make_case(seed: int, paged: bool = False) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randint(low, high, *shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    batch, size = int(randint(1, 6)), int(randint(1, 13))
    batched = bool(randint(0, 2))
    parents = (torch.rand(*([batch] if batched else []), size, generator=generator) * torch.arange(size)).int()
    parents[..., 0] = -1
    num_nodes = randint(0, size + 1, batch, dtype=torch.int32) if randint(0, 2) else None
    tree = TokenTree.from_parents(parents, num_nodes if batched else None)
    if num_nodes is not None and not batched:
        tree = tree.with_num_nodes(num_nodes)
    slots = 32
    shape = (2, 2, batch, slots, 1, 8)
    options: dict[str, Any] = {}
    if paged:
        shape = (2, 2, batch * slots // 8, 8, 1, 8)
        table = torch.randperm(batch * slots // 8, generator=generator).view(batch, -1)
        options["block_table"] = table.int()
    mode = int(randint(0, 4))
    if mode == 3:
        options["mode"] = randint(0, 3, batch, dtype=torch.int8)
    else:
        options["mode"] = ("greedy", "typical", "sampling")[mode]
    if mode >= 2 or randint(0, 2):
        options["seed"] = torch.tensor([seed, 3])
    eos = [None, 2, [2, 4], [], torch.tensor([1, 5, 2])][int(randint(0, 5))]
    if eos is not None:
        options["eos_token_id"] = eos
    if randint(0, 2):
        # A slice of something wider, so that strides matter.
        options["hidden"] = torch.randn(batch, size, 40, generator=generator)[:, :, 3:36]
        options["last_hidden"] = torch.randn(batch, 40, generator=generator)[:, 2:35]
    options |= {"posterior_threshold": 0.1, "posterior_alpha": 0.4}
    logits = 2 * torch.randn(batch, size, VOCAB, generator=generator)
    return Case(
        logits, randint(0, VOCAB, batch, size), tree, torch.randn(shape, generator=generator),
        randint(0, slots - size + 1, batch, dtype=torch.int32), randint(-1, 7, batch, dtype=torch.int32),
        randint(0, VOCAB, batch), options,
    )  # fmt: skip


def flat(step: verify.VerifiedStep) -> list[Tensor]:
    return [x.cpu() for x in (step.new_tokens, step.done, step.report, *step.accepted)]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ---- against the reference ----


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_random_cases(paged):
    seen = {"accepted": 0, "done": 0, "goes on": 0, "padded": 0}
    for seed in range(150):
        case = make_case(seed, paged)
        want_case = case.to("cpu")
        got, want = case.call(verify_step), want_case.call(reference.verify_step)
        assert_equal(flat(got), flat(want))
        assert_equal(case.state(), want_case.state())
        seen["accepted"] += int((got.accepted.accept_length > 0).sum())
        seen["done"] += int((got.done & (got.accepted.accept_length >= 0)).sum())
        seen["goes on"] += int((~got.done).sum())
        seen["padded"] += int((got.accepted.accept_length < 0).sum())
    assert min(seen.values()) > 20, seen


def by_hand(max_tokens: int, eos=None, num_nodes: int = 4) -> tuple[verify.VerifiedStep, Case]:
    """Chain 5 -> 1 -> 2 -> 3; the model says 1, 2, 0: two drafts are right, 0 comes next."""
    logits = torch.zeros(1, 4, VOCAB)
    for node, token in enumerate((1, 2, 0, 4)):
        logits[0, node, token] = 1
    kv = torch.arange(16.0).view(1, 1, 1, 16, 1, 1).repeat(1, 2, 1, 1, 1, 1)
    case = Case(
        logits, torch.tensor([[5, 1, 2, 3]]), TokenTree.chain(3).with_num_nodes(torch.tensor([num_nodes]).int()), kv,
        torch.tensor([7], dtype=torch.int32), torch.tensor([max_tokens], dtype=torch.int32), torch.tensor([5]),
        {"hidden": torch.arange(4.0).view(1, 4, 1), "last_hidden": torch.full((1, 1), -7.0), "eos_token_id": eos},
    )  # fmt: skip
    return case.call(verify_step), case


def test_by_hand():
    step, case = by_hand(10)
    assert step.new_tokens.tolist() == [[1, 2, 0, -1]] and step.done.tolist() == [False]
    assert step.report.tolist() == [[1, 2, 0, -1, 0]]
    assert case.root.tolist() == [0] and case.cache_seqlens.tolist() == [10] and case.max_tokens.tolist() == [7]
    assert case.options["last_hidden"].tolist() == [[2.0]]


@pytest.mark.parametrize(
    "max_tokens, eos, new, root, committed, left",
    [
        (5, None, [1, 2, 0], 0, 3, 2),  # one may follow the next root
        (4, None, [1, 2, 0], 0, 3, 0),  # the next root is the last
        (3, None, [1, 2], 5, 3, 0),  # the path uses the budget up
        (2, None, [1], 5, 2, 0),
        (1, None, [], 5, 1, 0),
        (0, None, [], 5, 0, 0),
        (10, 2, [1, 2], 5, 3, 0),  # an EOS on the path
        (10, 0, [1, 2, 0], 0, 3, 0),  # the next root is one
        (10, [4, 5], [], 5, 1, 0),  # the root is one
        (10, torch.tensor([3, 0]), [1, 2, 0], 0, 3, 0),
    ],
)
def test_ends(max_tokens, eos, new, root, committed, left):
    step, case = by_hand(max_tokens, eos)
    assert [t for t in step.new_tokens[0].tolist() if t >= 0] == new
    assert step.done.tolist() == [left == 0] and case.root.tolist() == [root]
    assert case.cache_seqlens.tolist() == [7 + committed] and case.max_tokens.tolist() == [left]


@pytest.mark.parametrize("max_tokens, num_nodes", [(0, 4), (-3, 4), (10, 0)], ids=["ended", "negative", "padding"])
def test_nothing_changes_where_nothing_is_emitted(max_tokens, num_nodes):
    step, case = by_hand(max_tokens, num_nodes=num_nodes)
    assert step.new_tokens.tolist() == [[-1] * 4] and step.done.tolist() == [max_tokens <= 0]
    assert case.root.tolist() == [5] and case.cache_seqlens.tolist() == [7]
    assert case.max_tokens.tolist() == [max_tokens] and case.options["last_hidden"].tolist() == [[-7.0]]
    assert torch.equal(case.kv[0, 0].flatten(), torch.arange(16.0))


def test_steps_give_plain_greedy_text():
    """A model that knows a cycle of tokens and drafts that are sometimes wrong: the text is the cycle's."""
    tree = TokenTree.full([2, 2])
    cache_seqlens = torch.zeros(2, dtype=torch.int32)
    max_tokens, root = torch.tensor([11, 4], dtype=torch.int32), torch.tensor([0, 3])
    kv = torch.zeros(1, 2, 2, 64, 1, 8)
    texts = [[0], [3]]
    for step_index in range(12):
        drafts = torch.stack([(root + d + 1) % VOCAB for d in range(2)], 1)
        wrong = (drafts + 1 + step_index % 3) % VOCAB
        tokens = tree.candidates(root, torch.stack([wrong, drafts], 2))
        logits = torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float()
        step = verify_step(logits, tokens, tree, kv, cache_seqlens, max_tokens, root)
        for text, (*new, _) in zip(texts, step.report.tolist()):
            text += [token for token in new if token >= 0]
        if step.done.all():
            break
    assert texts == [[i % VOCAB for i in range(11)], [(3 + i) % VOCAB for i in range(4)]]


# ---- out ----


def filled(batch: int, columns: int, device="cpu") -> verify.VerifiedStep:
    """Garbage to write to."""

    def full(*shape, dtype=torch.int64):
        return torch.full(shape, 77, device=device).to(dtype)

    int32 = {"dtype": torch.int32}
    accepted = Acceptance(
        full(batch, **int32), full(batch, columns, **int32), full(batch, **int32), full(batch, columns), full(batch),
        full(batch, dtype=torch.bool),
    )  # fmt: skip
    report = full(batch, columns + 1)
    return verify.VerifiedStep(report[:, :-1], full(batch, dtype=torch.bool), report, accepted)


def check_out_equals_new(device, seeds) -> None:
    """Of each case the checked call and those made again, each with its own tensors."""
    for paged in (False, True):
        for seed in seeds:
            want_case = make_case(seed, paged).to(device)
            want = flat(want_case.call(verify_step))
            kept = []  # so that no address comes twice
            for _ in range(3):
                case = make_case(seed, paged).to(device)
                out = filled(len(case.tokens), case.tree.max_depth + 1, device)
                kept += [case, out]
                assert case.call(verify_step, out=out) is out
                assert_equal(flat(out), want)
                assert_equal(case.state(), want_case.state())


def test_out_equals_new():
    check_out_equals_new("cpu", range(100))


def test_known_calls_make_steps(monkeypatch):
    """A result that is written again and again, by calls that were made before; its parts go into the next step."""
    tree, batch = TokenTree.full([2, 2]), 2
    verify._known.clear()
    verify._checked.clear()
    results = []
    for out in (None, filled(batch, 3)):
        kv, lengths = torch.zeros(1, 2, batch, 64, 1, 8), torch.zeros(batch, dtype=torch.int32)
        max_tokens, root = torch.tensor([11, 4], dtype=torch.int32), torch.tensor([0, 3])
        reports = []
        for step_index in range(6):
            drafts = torch.stack([(root + d + step_index % 2) % VOCAB for d in (1, 2)], 1)
            tokens = tree.candidates(root, torch.stack([drafts, drafts + 1], 2))
            logits = torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float()
            step = verify_step(logits, tokens, tree, kv, lengths, max_tokens, root, out=out)
            reports.append(step.report.tolist())
            assert step.new_tokens.tolist() == [row[:-1] for row in reports[-1]]
            if out is not None:
                monkeypatch.setattr(_calls, "planned", None)  # nothing is planned from now on
        results.append((reports, lengths.tolist(), root.tolist()))
    assert results[0] == results[1] and results[0][1] == [11, 3]
    assert len(verify._known.values()) == 1 and len(verify._checked.values()) == 2  # with `out` and without


def test_finish_step_out_keeps_the_acceptance_of_the_call():
    """`accepted` may be another than the one in `out`, which is not written then."""
    case = make_case(24)
    accepted = case.call(verify_step).accepted
    for _ in range(2):
        states = [[x.clone() for x in (make_case(24).max_tokens, make_case(24).root)] for _ in range(2)]
        want = verify.finish_step(accepted, *states[0], 2)
        out = filled(*accepted.path.shape)
        got = verify.finish_step(accepted, *states[1], 2, out=out)
        assert got.accepted is accepted and got.report is out.report and got.done is out.done
        assert_equal(flat(got), flat(want))
        assert_equal(states[1], states[0])
        assert_equal(list(out.accepted), list(filled(*accepted.path.shape).accepted))
        own = verify.finish_step(out.accepted, *states[1], 2, out=out)
        assert own is out


WRONG = {
    "a list": lambda x: x.tolist(),
    "dtype": lambda x: x.to(torch.int16),
    "batch": lambda x: torch.cat([x, x]),
    "device": lambda x: x.to("meta"),
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
}
PLACES = ["report", "done", "new_tokens", *(f"accepted.{name}" for name in Acceptance._fields)]


def replaced(out: verify.VerifiedStep, place: str, change) -> verify.VerifiedStep:
    name, _, field = place.partition(".")
    if field:
        return out._replace(accepted=out.accepted._replace(**{field: change(getattr(out.accepted, field))}))
    return out._replace(**{name: change(getattr(out, name))})


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("place", PLACES)
def test_bad_out(place, wrong, known):
    def case():
        return make_case(24)

    verify._known.clear()
    verify._checked.clear()
    out = filled(len(case().tokens), case().tree.max_depth + 1)
    if known:
        case().call(verify_step, out=filled(len(case().tokens), case().tree.max_depth + 1))
    made = case()
    with pytest.raises((ValueError, TypeError), match=rf"^out\.{place}: expected"):
        made.call(verify_step, out=replaced(out, place, WRONG[wrong]))
    assert_equal(made.state(), case().state())
    assert_equal(flat(out), flat(filled(len(made.tokens), made.tree.max_depth + 1)))
    if not place.startswith("accepted"):
        accepted = case().call(verify_step).accepted
        with pytest.raises((ValueError, TypeError), match=rf"^out\.{place}: expected"):
            verify.finish_step(accepted, made.max_tokens, made.root, out=replaced(out, place, WRONG[wrong]))
        assert_equal(made.state(), case().state())


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_new_tokens_must_be_a_view_of_report(known):
    """Alike in all but where they lie, which a call's signature does not tell."""
    case = make_case(24)
    shape = len(case.tokens), case.tree.max_depth + 1
    if known:
        make_case(24).call(verify_step, out=filled(*shape))
    out = filled(*shape)._replace(new_tokens=filled(*shape).new_tokens)
    with pytest.raises(ValueError, match=r"^out\.new_tokens: expected .*a view"):
        case.call(verify_step, out=out)
    assert_equal(case.state(), make_case(24).state())
    accepted = make_case(24).call(verify_step).accepted
    if known:
        other = make_case(24)
        verify.finish_step(accepted, other.max_tokens, other.root, out=filled(*shape))
    with pytest.raises(ValueError, match=r"^out\.new_tokens: expected .*a view"):
        verify.finish_step(accepted, case.max_tokens, case.root, out=out)
    assert_equal(case.state(), make_case(24).state())


def test_out_of_another_type():
    case = make_case(24)
    out = filled(len(case.tokens), case.tree.max_depth + 1)
    for wrong in (1, tuple(out), out.accepted):
        with pytest.raises(TypeError, match=r"^out: expected a VerifiedStep"):
            case.call(verify_step, out=wrong)
    with pytest.raises(TypeError, match=r"^out\.accepted: expected an Acceptance"):
        case.call(verify_step, out=out._replace(accepted=tuple(out.accepted)))
    assert_equal(case.state(), make_case(24).state())


def test_a_known_state_does_not_let_another_tree_pass():
    """The tree's depth is not in a tensor that was looked at."""
    case = make_case(24)
    case.call(verify_step, out=filled(len(case.tokens), case.tree.max_depth + 1))
    case.tree = TokenTree(case.tree.parents, case.tree.num_nodes, case.tree.max_depth - 1)
    with pytest.raises(ValueError, match=r"^out\.report"):
        case.call(verify_step, out=filled(len(case.tokens), case.tree.max_depth + 2))


# ---- bad input ----

BAD = [
    ("max_tokens", {"max_tokens": 5}, TypeError),
    ("max_tokens", {"max_tokens": torch.zeros(2, dtype=torch.int64)}, ValueError),
    ("max_tokens", {"max_tokens": torch.zeros(3, dtype=torch.int32)}, ValueError),
    ("max_tokens", {"max_tokens": torch.zeros(4, dtype=torch.int32)[::2]}, ValueError),
    ("root", {"root": torch.zeros(2, dtype=torch.int32)}, ValueError),
    ("root", {"root": torch.zeros(2, 1, dtype=torch.int64)}, ValueError),
    ("root", {"root": None}, TypeError),
    ("tokens", {"tokens": torch.zeros(2, dtype=torch.int64)}, ValueError),
    ("tokens", {"tokens": torch.zeros(2, 3, dtype=torch.int32)}, ValueError),
    ("last_hidden", {"hidden": torch.zeros(2, 3, 4)}, ValueError),
    ("hidden", {"last_hidden": torch.zeros(2, 4)}, ValueError),
    ("hidden", {"hidden": torch.zeros(2, 4, 4), "last_hidden": torch.zeros(2, 4)}, ValueError),
    ("hidden", {"hidden": torch.zeros(2, 3, 8)[..., ::2], "last_hidden": torch.zeros(2, 4)}, ValueError),
    ("last_hidden", {"hidden": torch.zeros(2, 3, 4), "last_hidden": torch.zeros(2, 5)}, ValueError),
    ("last_hidden", {"hidden": torch.zeros(2, 3, 4), "last_hidden": torch.zeros(2, 4).half()}, ValueError),
    ("logits", {"logits": torch.zeros(2, 4, VOCAB)}, ValueError),
    ("mode", {"mode": "beam"}, ValueError),
    ("eos_token_id", {"eos_token_id": "2"}, TypeError),
    ("kv", {"kv": []}, ValueError),
    ("cache_seqlens", {"cache_seqlens": torch.zeros(2, dtype=torch.int64)}, ValueError),
    ("block_table", {"block_table": torch.zeros(2, 1)}, ValueError),
]


@pytest.mark.parametrize("name, change, error", BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_bad_input(name, change, error):
    arguments = {
        "logits": torch.zeros(2, 3, VOCAB), "tokens": torch.zeros(2, 3, dtype=torch.int64), "tree": TokenTree.chain(2),
        "kv": torch.zeros(1, 2, 2, 8, 1, 4), "cache_seqlens": torch.zeros(2, dtype=torch.int32),
        "max_tokens": torch.full((2,), 9, dtype=torch.int32), "root": torch.ones(2, dtype=torch.int64),
        "seed": torch.tensor([1, 2]),
    }  # fmt: skip
    arguments |= change
    before = copy.deepcopy({k: v for k, v in arguments.items() if isinstance(v, Tensor)})
    with pytest.raises(error, match=f"^{name}"):
        verify_step(**arguments)
    for key, value in before.items():
        assert torch.equal(arguments[key], value), key


# ---- torch.compile, opcheck, and on a GPU ----


def check_op(device) -> None:
    for seed in (1, 4, 5, 9):
        case = make_case(seed).to(device)
        accepted = case.call(verify_step).accepted
        fresh = make_case(seed).to(device)
        eos_tensor, eos = verify.acceptance._eos(fresh.options.get("eos_token_id"))
        hidden, last_hidden = (fresh.options.get(name) for name in ("hidden", "last_hidden"))
        torch.library.opcheck(
            torch.ops.medusa_kernels.finish_step.default,
            (accepted.accept_length, accepted.last_node, accepted.tokens, accepted.next_token, accepted.finished,
             fresh.max_tokens, fresh.root, eos_tensor, eos, hidden, last_hidden),
        )  # fmt: skip


def check_compile(device) -> None:
    for seed in (1, 4):
        case, other = make_case(seed).to(device), make_case(seed).to(device)
        tree, options = case.tree, case.options

        def step(logits, tokens, kv, cache_seqlens, max_tokens, root, tree=tree, options=options):
            return verify_step(logits, tokens, tree, kv, cache_seqlens, max_tokens, root, **options)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got = compiled(case.logits, case.tokens, case.kv, case.cache_seqlens, case.max_tokens, case.root)
        assert_equal(flat(got), flat(other.call(verify_step)))
        assert_equal(case.state(), other.state())


def check_compile_out(device) -> None:
    case, other = make_case(24).to(device), make_case(24).to(device)
    tree, options = case.tree, case.options

    def step(logits, tokens, kv, cache_seqlens, max_tokens, root, out):
        return verify_step(logits, tokens, tree, kv, cache_seqlens, max_tokens, root, **options, out=out)

    out = filled(len(case.tokens), tree.max_depth + 1, device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(case.logits, case.tokens, case.kv, case.cache_seqlens, case.max_tokens, case.root, out)
    want = flat(other.call(verify_step))
    assert_equal(flat(got), want)
    assert_equal(flat(out), want)
    assert_equal(case.state(), other.state())


def test_opcheck():
    check_op("cpu")


def test_compile():
    check_compile("cpu")


def test_compile_out():
    check_compile_out("cpu")


@pytest.mark.gpu
def test_gpu_equals_cpu(device):
    for paged in (False, True):
        for seed in range(100):
            case = make_case(seed, paged)
            on_gpu = case.to(device)
            assert_equal(flat(on_gpu.call(verify_step)), flat(case.call(verify_step)))
            assert_equal(on_gpu.state(), case.state())


@pytest.mark.gpu
def test_gpu_wide_hidden_and_long_paths(device):
    tree = TokenTree.chain(511)
    tokens = torch.arange(512).repeat(2, 1)
    logits = torch.nn.functional.one_hot((tokens + 1) % 513, 513).half()
    case = Case(
        logits, tokens, tree, torch.randn(1, 2, 2, 600, 1, 8), torch.tensor([3, 80], dtype=torch.int32),
        torch.tensor([1000, 300], dtype=torch.int32), torch.zeros(2, dtype=torch.int64),
        {"hidden": torch.randn(2, 512, 5000), "last_hidden": torch.randn(2, 5000)},
    )  # fmt: skip
    on_gpu = case.to(device)
    assert_equal(flat(on_gpu.call(verify_step)), flat(case.call(verify_step)))
    assert_equal(on_gpu.state(), case.state())
    assert case.root.tolist() == [512, 0] and case.max_tokens.tolist() == [1000 - 512, 0]


@pytest.mark.gpu
def test_gpu_does_not_synchronise(device):
    case = make_case(4).to(device)
    case.call(verify_step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.call(verify_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_graph_replays_steps(device):
    """Drafts, verifies and moves on in one graph; each replay continues where the one before stopped."""
    tree = TokenTree.full([2, 2], device)
    batch, vocab = 3, 50

    def fresh():
        return (torch.zeros(1, 2, batch, 128, 1, 8, device=device),
                torch.zeros(batch, dtype=torch.int32, device=device),
                torch.tensor([40, 9, 0], dtype=torch.int32, device=device),
                torch.tensor([0, 3, 7], device=device), torch.tensor([5, 0], device=device))  # fmt: skip

    table = torch.randn(vocab, vocab, device=device, generator=torch.Generator(device).manual_seed(1))

    def step(kv, cache_seqlens, max_tokens, root, seed):
        top = table[root].topk(2).indices
        tokens = tree.candidates(root, torch.stack([top, table[top[:, 0]].topk(2).indices], 1))
        return verify_step(table[tokens], tokens, tree, kv, cache_seqlens, max_tokens, root, seed=seed, mode="sampling",
                           temperature=0.5, eos_token_id=[11, 12]).report  # fmt: skip

    eager_state = fresh()
    eager = [step(*eager_state).tolist() for _ in range(12)]
    state = fresh()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(*state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = step(*state)
    for buffer, start in zip(state, fresh()):
        buffer.copy_(start)
    replayed = []
    for _ in range(12):
        graph.replay()
        replayed.append(report.tolist())
    assert replayed == eager
    assert_equal([x.cpu() for x in state], [x.cpu() for x in eager_state])
    assert eager[-1][1][-1] == 1 and eager[0][2] == [-1, -1, -1, 1]


@pytest.mark.gpu
def test_gpu_opcheck_and_compile(device):
    check_op(device)
    check_compile(device)
    check_compile_out(device)


@pytest.mark.gpu
def test_gpu_out_equals_new(device):
    check_out_equals_new(device, range(50))


@pytest.mark.gpu
def test_gpu_graph_of_known_calls(device):
    case, want_case = make_case(24).to(device), make_case(24)
    out = filled(len(case.tokens), case.tree.max_depth + 1, device)
    make_case(24).to(device).call(verify_step, out=out)
    torch.cuda.synchronize()
    known = verify._known.values()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call(verify_step, out=out)
    assert verify._known.values() == known
    for _ in range(3):
        graph.replay()
        want = want_case.call(verify_step)
        assert_equal(flat(out), flat(want))
        assert_equal(case.state(), want_case.state())


@pytest.mark.gpu
def test_gpu_out_does_not_synchronise(device):
    case = make_case(24).to(device)
    out = filled(len(case.tokens), case.tree.max_depth + 1, device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            case.call(verify_step, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_out_where_another_device_is_current():
    want_case = make_case(24)
    want = flat(want_case.call(verify_step))
    for current in (0, 1):
        for device in ("cuda:0", "cuda:1"):
            with torch.cuda.device(current):
                for _ in range(2):
                    case = make_case(24).to(device)
                    out = filled(len(case.tokens), case.tree.max_depth + 1, device)
                    assert_equal(flat(case.call(verify_step, out=out)), want)
                    assert_equal(case.state(), want_case.state())
                    assert torch.cuda.current_device() == current
