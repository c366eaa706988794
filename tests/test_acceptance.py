"""accept_candidates: the operator against the reference, that against plain loops, draws against plain sampling."""

import itertools
import math
import random

import pytest
import torch
from test_calls import Odd, Seen

from medusa_kernels import TokenTree, _calls, _ops, acceptance, reference
from medusa_kernels.acceptance import Acceptance, AcceptMode, accept_candidates

pytestmark = pytest.mark.skipif(not _ops.HAS_CPU_OPS, reason="the C++ operators are not built")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = math.inf, math.nan


# ---- random cases ----


def random_case(rng, vocab=None, max_size=14, dtype=None):
    """(logits, tokens, tree, options): ties, duplicate siblings, NaN, +-inf, padding, mixed modes, EOS, limits."""
    batch, size = rng.randint(1, 4), rng.choice([1, 2, 5, max_size])
    vocab = vocab or rng.choice([1, 3, 8, 40])
    generator = torch.Generator().manual_seed(rng.getrandbits(40))

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    deep = rng.random() < 0.4  # slim trees, likely tokens and no early end, so that long paths are accepted
    kind = "peaked" if deep else rng.choice(["ties", "flat", "peaked", "normal"])
    logits = torch.randn(batch, size, vocab, generator=generator)
    if kind == "ties":
        logits = logits.round()
    elif kind == "flat":
        logits = torch.zeros_like(logits)
    elif kind == "peaked":
        logits = logits * 4
    if rng.random() < (0.1 if deep else 0.4):
        at = rand(batch, size, vocab)
        logits[at < 0.2] = -INF
        logits[(at > 0.97) & (rand(batch, size, 1) < 0.3)] = INF
        logits[(at > 0.94) & (rand(batch, size, 1) < 0.3)] = NAN
        logits[rand(batch, size) < 0.05] = NAN
        logits[rand(batch, size) < 0.05] = -INF
    logits = logits.to(dtype or rng.choice(DTYPES))

    batched = rng.random() < 0.5
    parents = (rand(batch, size) * torch.arange(size)).int()
    num_nodes = torch.randint(0, size + 1, (batch,), generator=generator, dtype=torch.int32)
    if deep:
        parents = (torch.arange(size) - 1 - (rand(batch, size) ** 3 * 3).int()).clamp(min=0).int()
        num_nodes.clamp_(min=size // 2)
    parents[..., 0] = -1
    tree = TokenTree.from_parents(parents if batched else parents[0], num_nodes if batched else None)
    if not batched and rng.random() < 0.5:
        tree = tree.with_num_nodes(num_nodes)
    if rng.random() < 0.15 and tree.max_depth > 1:
        tree = TokenTree(tree.parents, tree.num_nodes, tree.max_depth - 1)

    # Tokens: mostly a parent's likely ones, so that paths grow; a few outside the vocabulary.
    order = logits.float().nan_to_num(-1e9, 1e9, -1e9).sort(dim=-1, descending=True, stable=True).indices
    above = tree.parents.clamp(min=0).long().expand(batch, size)
    rank = (rand(batch, size) ** (8 if deep else 2) * min(vocab, 4)).long()
    tokens = order.gather(1, above.unsqueeze(-1).expand(-1, -1, vocab)).gather(2, rank.unsqueeze(-1)).squeeze(-1)
    tokens = torch.where(rand(batch, size) < 0.03, torch.tensor(vocab + 5), tokens)
    tokens = torch.where(rand(batch, size) < 0.03, torch.tensor(-1), tokens)

    def each(values, dtype):
        picks = [rng.choice(values) for _ in range(batch)]
        return torch.tensor(picks, dtype=dtype) if rng.random() < 0.5 else picks[0]

    options = {
        "mode": rng.choice(["greedy", "typical", "sampling", torch.randint(0, 3, (batch,)).to(torch.int8)]),
        "temperature": each([0.0, 0.61, 1.0, 1.0, 2.3], torch.float32),
        "posterior_threshold": each([0.0, 0.0907, 0.31], torch.float32),
        "posterior_alpha": each([0.0, 0.3003, 1.1], torch.float32),
        "seed": rng.choice([None, rng.getrandbits(63), torch.tensor([rng.getrandbits(62), rng.getrandbits(30)])]),
        "eos_token_id": rng.choice([None, None, None if deep else 0, [0, 2], torch.tensor([1])]),
        "max_tokens": rng.choice([None, each([4, 6, 9] if deep else [0, 1, 2, 3, 9], torch.int32)]),
        "top_k": rng.choice([None, each([1, 2, 5, 100], torch.int32)]),
        "top_p": rng.choice([None, each([0.1234, 0.5171, 0.9012, 1.0], torch.float32)]),
    }
    if isinstance(options["mode"], str) and options["mode"] == "sampling" and options["seed"] is None:
        options["seed"] = rng.getrandbits(63)
    return logits, tokens, tree, options


def clone_seed(options):
    return {k: v.clone() if k == "seed" and isinstance(v, torch.Tensor) else v for k, v in options.items()}


def nudged(monkeypatch, options, sign):
    """Options with every threshold moved by the error that float32 may make, and draws too."""
    moved = clone_seed(options)
    for name in ("posterior_threshold", "posterior_alpha", "top_p"):
        if moved[name] is not None:
            value = torch.as_tensor(moved[name], dtype=torch.float64) * (1 + sign * 2e-6)
            value = value.clamp(max=1.0) if name == "top_p" and sign > 0 else value
            exact = torch.as_tensor(moved[name]) == 1.0  # top_p 1 is off
            moved[name] = torch.where(exact, 1.0, value) if name == "top_p" else value
            moved[name] = moved[name] if moved[name].dim() else float(moved[name])
    philox = ORIGINAL_PHILOX
    shift = int(sign * 2e-6 * 2**64)
    clip = lambda bits: min(max(bits + shift, 0), 2**64 - 1)  # noqa: E731
    monkeypatch.setattr(reference, "_philox", lambda *key: tuple(clip(bits) for bits in philox(*key)))
    return moved


ORIGINAL_PHILOX = reference._philox


def rows(result):
    return [tuple(tuple(field[b].flatten().tolist()) for field in result) for b in range(len(result.finished))]


def check_case(monkeypatch, got, logits, tokens, tree, options):
    """`got` equals the float64 reference for every request, or, where float32 can tip a comparison, the reference on
    one side of it. Returns how many requests were such."""
    want = []
    for sign in (0, -1, 1):
        with monkeypatch.context() as patch:
            moved = nudged(patch, options, sign)
            want.append(rows(reference.accept_candidates(logits, tokens, tree, **moved, upcast=True)))
    close = 0
    for b, row in enumerate(rows(got)):
        sides = {w[b] for w in want}
        close += len(sides) > 1
        assert row in sides, f"request {b}: {row} not in {sides} with {options}, {tree}, {tokens[b]}, {logits[b]}"
    return close


@pytest.mark.parametrize("chunk", range(6))
def test_equals_reference(monkeypatch, chunk):
    close = total = deep = 0
    for seed in range(chunk * 350, (chunk + 1) * 350):
        case = random_case(random.Random(seed))
        options = clone_seed(case[3])
        got = accept_candidates(*case[:3], **options)
        close += check_case(monkeypatch, got, *case)
        total += len(case[0])
        deep += int((got.accept_length >= 3).sum())
    assert total > 500 and close <= 0.01 * total, f"{close} of {total} too close to call"
    assert deep > 0.05 * total, f"{deep} of {total} paths are long"


def test_reference_in_float32_agrees():
    same = total = 0
    for seed in range(300):
        logits, tokens, tree, options = random_case(random.Random(seed))
        low = rows(reference.accept_candidates(logits, tokens, tree, **clone_seed(options)))
        high = rows(reference.accept_candidates(logits, tokens, tree, **clone_seed(options), upcast=True))
        same += sum(a == b for a, b in zip(low, high))
        total += len(low)
    assert same >= 0.99 * total, (same, total)


# ---- the reference against plain loops ----


def test_reference_greedy_equals_brute_force_over_paths():
    for seed in range(200):
        rng = random.Random(seed)
        logits, tokens, tree, _ = random_case(rng, vocab=rng.choice([2, 5]))
        got = reference.accept_candidates(logits, tokens, tree)
        for b in range(len(logits)):
            parents = (tree.parents[b] if tree.batched else tree.parents).tolist()
            nodes = len(parents) if tree.num_nodes is None else int(tree.num_nodes[b])
            choice = []
            for n in range(nodes):
                row = logits[b, n].tolist()
                numbers = [x for x in row if not math.isnan(x)]
                choice.append(row.index(max(numbers)) if numbers else None)
            paths = []
            for end in range(nodes):
                path, n = [end], end
                while n:
                    n = parents[n]
                    path.insert(0, n)
                matches = all(int(tokens[b, c]) == choice[n] for n, c in itertools.pairwise(path))
                if matches and len(path) <= tree.max_depth + 1:
                    paths.append(path)
            want = min(paths, key=lambda p: (-len(p), p)) if paths else []
            assert got.path[b].tolist() == want + [-1] * (tree.max_depth + 1 - len(want))
            assert int(got.next_token[b]) == ((choice[want[-1]] or 0) if want else -1)


def test_reference_typical_equals_a_loop_of_the_formula():
    for seed in range(200):
        rng = random.Random(1000 + seed)
        logits, tokens, tree, _ = random_case(rng, dtype=torch.float32)
        logits = logits.nan_to_num(0.0, 3.0, -3.0)
        threshold, alpha, temperature = (
            rng.choice([0.0907, 0.31]),
            rng.choice([0.3003, 1.1]),
            rng.choice([0.7, 1.0, 2.3]),
        )
        got = reference.accept_candidates(
            logits, tokens, tree, mode="typical", temperature=temperature, posterior_threshold=threshold,
            posterior_alpha=alpha, upcast=True,
        )  # fmt: skip
        for b in range(len(logits)):
            parents = (tree.parents[b] if tree.batched else tree.parents).tolist()
            nodes = len(parents) if tree.num_nodes is None else int(tree.num_nodes[b])
            score, path = {0: 0.0}, {0: [0]}
            for c in range(1, nodes):
                row, token = logits[b, parents[c]].tolist(), int(tokens[b, c])
                if parents[c] not in path or not 0 <= token < len(row) or len(path[parents[c]]) > tree.max_depth:
                    continue
                weights = [math.exp(x / temperature) for x in row]
                p = [w / sum(weights) for w in weights]
                h = -sum(x * math.log(x + 1e-5) for x in p)
                if p[token] > min(threshold, alpha * math.exp(-h)):
                    path[c] = path[parents[c]] + [c]
                    score[c] = score[parents[c]] + math.log(p[token])
            end = max(score, key=lambda c: (len(path[c]), round(score[c], 9), -c))
            want = path[end] if nodes else []
            assert got.path[b].tolist() == want + [-1] * (tree.max_depth + 1 - len(want))


def test_hand_written_tree():
    #       0
    #     1   2      tokens 5 | 7, 8 | 3 (below 2) | 9 (below 3)
    #         3
    #         4
    tree = TokenTree.from_parents(torch.tensor([-1, 0, 0, 2, 3]))
    tokens = torch.tensor([[5, 7, 8, 3, 9]])
    logits = torch.zeros(1, 5, 10)
    for node, token in enumerate([8, 1, 3, 4, 2]):
        logits[0, node, token] = 5.0
    got = accept_candidates(logits, tokens, tree)
    assert isinstance(got, Acceptance)
    assert got.accept_length.tolist() == [2] and got.path.tolist() == [[0, 2, 3, -1]]
    assert got.last_node.tolist() == [3] and got.tokens.tolist() == [[5, 8, 3, -1]]
    assert got.next_token.tolist() == [4] and got.finished.tolist() == [False]
    assert [x.dtype for x in got] == [torch.int32] * 3 + [torch.int64] * 2 + [torch.bool]


# ---- ends ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("accept", [accept_candidates, reference.accept_candidates])
def test_nan_is_never_the_argmax(accept, dtype):
    """Not even beside -inf alone, which is a number; without a number, 0 counts, and is no match."""
    rows = torch.tensor([[NAN, -INF, -INF], [NAN, -INF, NAN], [-INF, NAN, -INF], [NAN, NAN, -INF], [NAN, NAN, NAN]])
    logits, tree = torch.stack([rows, rows], 1).to(dtype), TokenTree.from_parents(torch.tensor([-1, 0]))
    for token, matches in ((0, [False, False, True, False, False]), (1, [True, True, False, False, False])):
        got = accept(logits, torch.tensor([[7, token]] * 5), tree)
        assert got.accept_length.tolist() == matches
        assert got.next_token.tolist() == [1, 1, 0, 2, 0]


@pytest.mark.parametrize("limit", range(6))
def test_max_tokens(limit):
    tree, tokens = TokenTree.chain(3), torch.tensor([[4, 1, 1, 1]])
    logits = torch.nn.functional.one_hot(torch.ones(1, 4, dtype=torch.int64), 6).float()
    got = accept_candidates(logits, tokens, tree, max_tokens=torch.tensor([limit], dtype=torch.int32))
    emitted = min(limit, 4)
    assert got.accept_length.tolist() == [emitted - 1]
    assert got.tokens.tolist() == [[4, 1, 1, 1][:emitted] + [-1] * (4 - emitted)]
    assert got.last_node.tolist() == [emitted - 1]
    assert got.finished.tolist() == [limit <= 4] and got.next_token.tolist() == [-1 if limit <= 4 else 1]
    if limit:
        assert rows(got) == rows(accept_candidates(logits, tokens, tree, max_tokens=limit))


@pytest.mark.parametrize("eos", [2, [9, 2], torch.tensor([2]), torch.tensor([], dtype=torch.int64), [7], 0])
def test_eos(eos):
    tree, tokens = TokenTree.chain(3), torch.tensor([[0, 1, 2, 3]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4]]), 6).float()
    got = accept_candidates(logits, tokens, tree, eos_token_id=eos)
    ids = torch.as_tensor(eos).flatten().tolist()
    emitted = next((i + 1 for i in range(4) if i in ids), 4)
    assert got.tokens.tolist() == [list(range(emitted)) + [-1] * (4 - emitted)]
    assert got.finished.tolist() == [emitted < 4] and got.next_token.tolist() == [4 if emitted == 4 else -1]


def test_no_batch():
    got = accept_candidates(torch.zeros(0, 3, 5), torch.zeros(0, 3, dtype=torch.int64), TokenTree.chain(2))
    assert [tuple(x.shape) for x in got] == [(0,), (0, 3), (0,), (0, 3), (0,), (0,)]


def test_strided_rows():
    wide = torch.randn(2, 5, 77)
    tokens = torch.randint(0, 71, (2, 9))[:, 1:6]
    tree = TokenTree.from_parents(torch.tensor([-1, 0, 0, 1, 2]))
    for mode in ("greedy", "typical", "sampling"):
        options = {"mode": mode, "seed": 3, "posterior_threshold": 0.0}
        got = accept_candidates(wide[..., 3:74], tokens, tree, **options)
        want = accept_candidates(wide[..., 3:74].contiguous(), tokens.contiguous(), tree, **options)
        assert rows(got) == rows(want)
        over_nodes = wide[..., 3:74].transpose(0, 1).contiguous().transpose(0, 1)
        assert rows(accept_candidates(over_nodes, tokens, tree, **options)) == rows(want)


# ---- sampling ----


def chi_square_bound(cells):
    """Above this a chi-square of that many degrees of freedom lies with a probability of 1e-5 (Wilson-Hilferty)."""
    free = cells - 1
    return free * (1 - 2 / (9 * free) + 4.27 * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.7, "top_k": 5, "top_p": 0.8}],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_sampling_is_distributed_as_plain_sampling(options):
    # Node i's row depends on the path's tokens alone, as a model's would; siblings 1 and 2 have the same token.
    vocab, calls, batch = 6, 12, 4096
    parents, tokens = [-1, 0, 0, 0, 1, 1, 3], [0, 2, 2, 4, 1, 5, 0]
    first = torch.tensor([0.3, 1.0, 1.2, -0.5, 0.9, 0.0])
    second = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(5))  # after each first token
    token_row = [first] + [second[t] for t in tokens[1:4]] + [torch.zeros(vocab)] * 3
    logits = torch.stack(token_row).expand(batch, -1, -1)
    tree = TokenTree.from_parents(torch.tensor(parents))
    seed = torch.tensor([77, 0])

    def target(row):
        probs = (row.double() / options.get("temperature", 1.0)).softmax(0)
        return reference._truncated(probs, options.get("top_k", 0), options.get("top_p", 1.0))

    counts, pairs = torch.zeros(vocab), torch.zeros(vocab, vocab)
    for _ in range(calls):
        toks = torch.tensor(tokens).expand(batch, -1)
        got = accept_candidates(logits, toks, tree, mode="sampling", seed=seed, **options)
        emitted = torch.cat([got.tokens[:, 1:], torch.full((batch, 1), -1)], 1)
        emitted.scatter_(1, got.accept_length.long().unsqueeze(1), got.next_token.unsqueeze(1))
        counts += torch.bincount(emitted[:, 0], minlength=vocab)
        two = got.accept_length >= 1  # the second token follows from this step
        pairs += torch.bincount(emitted[two, 0] * vocab + emitted[two, 1], minlength=vocab**2).view(vocab, vocab)
    assert seed.tolist() == [77, calls]

    expected = target(first) * calls * batch
    joint = torch.zeros(vocab, vocab, dtype=torch.float64)
    for token in (2, 4):
        joint[token] = target(first)[token] * target(second[token]) * calls * batch
    for got, want in ((counts, expected), (pairs.flatten(), joint.flatten())):
        assert got[want == 0].sum() == 0  # probability 0 is never emitted
        cells = want > 0
        chi_square = float(((got[cells] - want[cells]) ** 2 / want[cells]).sum())
        assert chi_square < chi_square_bound(max(int(cells.sum()), 2)), (chi_square, got, want)


def test_seed():
    logits, tokens = torch.zeros(64, 3, 50), torch.zeros(64, 3, dtype=torch.int64)
    tree = TokenTree.chain(2)

    def draw(seed):
        return accept_candidates(logits, tokens, tree, mode="sampling", seed=seed).next_token

    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))
    generator = torch.tensor([5, 0])
    first = draw(generator)
    assert torch.equal(first, draw(5)) and generator.tolist() == [5, 1]
    assert not torch.equal(first, draw(generator)) and generator.tolist() == [5, 2]
    assert torch.equal(draw(torch.tensor([-7, 2**40 - 1])), draw(torch.tensor([-7, 2**40 - 1])))


def test_philox_known_answers():
    # Random123's kat_vectors, philox4x32-10.
    words = [w for bits in reference._philox(0, 0, 0, 0) for w in (bits & 0xFFFFFFFF, bits >> 32)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**64 - 1
    words = [w for bits in reference._philox(ones, ones, 2**32 - 1, 2**32 - 1) for w in (bits & 0xFFFFFFFF, bits >> 32)]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


# ---- out ----


def filled(batch, columns, device="cpu"):
    """An Acceptance of garbage."""
    shapes = [(batch,), (batch, columns), (batch,), (batch, columns), (batch,), (batch,)]
    dtypes = [torch.int32] * 3 + [torch.int64] * 2 + [torch.bool]
    return Acceptance(*(torch.full(x, 77, device=device).to(dtype) for x, dtype in zip(shapes, dtypes)))


def other(x):
    """The same at another address, all else as it was."""
    if isinstance(x, TokenTree):
        return TokenTree(other(x.parents), other(x.num_nodes), x.max_depth)
    return x.clone() if isinstance(x, torch.Tensor) else x


def check_out_equals_new(logits, tokens, tree, options):
    """The checked call and those made again, each with its own tensors."""
    want = accept_candidates(logits, tokens, tree, **clone_seed(options))
    before = len(acceptance._known.values())
    kept = []  # so that no address comes twice
    for _ in range(3):
        arguments = [other(x) for x in (logits, tokens, tree)]
        more = {name: other(x) for name, x in options.items()}
        out = filled(len(logits), tree.max_depth + 1, logits.device)
        kept += [arguments, more, out]
        assert accept_candidates(*arguments, **more, out=out) is out
        assert rows(out) == rows(want), options
        if isinstance(more["seed"], torch.Tensor):
            assert more["seed"].tolist() == [int(options["seed"][0]), int(options["seed"][1]) + 1]
    return len(acceptance._known.values()) - before


def test_out_equals_new():
    acceptance._known.clear()
    told = set()
    for seed in range(400):
        *arguments, options = random_case(random.Random(seed))
        new = check_out_equals_new(*arguments, options)
        assert new <= (0 if isinstance(options["seed"], int) else 1)  # a seed would be kept for each value
        told.add(new)
    assert told == {0, 1}


def test_out_without_compiled_calls(monkeypatch):
    monkeypatch.setattr(acceptance, "_known", _calls.PythonCalls())
    for seed in range(40):
        *arguments, options = random_case(random.Random(seed))
        check_out_equals_new(*arguments, options)
    assert len(acceptance._known.values()) > 10


def test_what_was_told_apart_before_is_called_by_its_own_options():
    """Calls that differ in one option alone, made in turn."""
    logits, tokens, tree = torch.randn(3, 4, 20), torch.randint(0, 20, (3, 4)), TokenTree.full([3])
    tokens[:, 1:] = logits[:, 0].topk(3).indices
    each = torch.tensor([1.0, 0.3, 2.0])
    changes = [
        {}, {"temperature": 0.4}, {"temperature": each}, {"top_k": 1}, {"top_p": 0.2}, {"top_p": each.clamp(max=1)},
        {"mode": "greedy"}, {"mode": "typical", "posterior_threshold": 0.3, "posterior_alpha": 3.0},
        {"mode": "typical", "posterior_threshold": 0.001}, {"max_tokens": 1}, {"max_tokens": torch.ones(3).int()},
        {"eos_token_id": int(tokens[0, 1])}, {"eos_token_id": tokens[0, :2].tolist()}, {"eos_token_id": tokens[1, :2]},
        {"mode": torch.tensor([0, 1, 2], dtype=torch.int8)},
    ]  # fmt: skip
    seen = set()
    for _ in range(3):
        for change in changes:
            options = {"mode": "sampling", "seed": torch.tensor([3, 4]), **change}
            out = accept_candidates(logits, tokens, tree, **clone_seed(options), out=filled(3, 2))
            assert rows(out) == rows(accept_candidates(logits, tokens, tree, **clone_seed(options))), change
            seen.add(str(rows(out)))
    assert len(seen) > 5


WRONG_FIELDS = {
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    "dtype": lambda x: x.to(torch.int16),
    "batch": lambda x: torch.cat([x, x]),
    "rank": lambda x: x.unsqueeze(-1),
    "device": lambda x: x.to("meta"),
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("wrong", WRONG_FIELDS)
@pytest.mark.parametrize("field", Acceptance._fields)
def test_bad_out(field, wrong, known):
    logits, tokens, tree = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64), TokenTree.chain(2)
    seed, out = torch.tensor([1, 5]), filled(2, 3)
    acceptance._known.clear()
    if known:
        accept_candidates(logits, tokens, tree, mode="sampling", seed=seed.clone(), out=filled(2, 3))
    bad = out._replace(**{field: WRONG_FIELDS[wrong](getattr(out, field))})
    with pytest.raises((ValueError, TypeError), match=rf"^out\.{field}: expected"):
        accept_candidates(logits, tokens, tree, mode="sampling", seed=seed, out=bad)
    assert rows(out) == rows(filled(2, 3)) and seed.tolist() == [1, 5]


@pytest.mark.parametrize("out", [1, torch.zeros(2), tuple(filled(2, 3))], ids=["int", "tensor", "tuple"])
def test_out_of_another_type(out):
    with pytest.raises(TypeError, match=r"^out: expected an Acceptance"):
        accept_candidates(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64), TokenTree.chain(2), out=out)


def test_out_where_something_has_to_see_the_operator():
    logits, tokens, tree = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64), TokenTree.chain(2)
    want = rows(accept_candidates(logits, tokens, tree))
    accept_candidates(logits, tokens, tree, out=filled(2, 3))  # known
    assert rows(accept_candidates(logits.as_subclass(Odd), tokens, tree, out=filled(2, 3))) == want
    with Seen() as seen:
        out = accept_candidates(logits, tokens, tree, out=filled(2, 3))
    assert "medusa_kernels.accept_candidates.default" in seen.names and rows(out) == want


def check_compile_out(device):
    tree = TokenTree.from_parents(torch.tensor([-1, 0, 0, 1, 2])).to(device)
    logits, tokens = torch.randn(3, 5, 30, device=device), torch.randint(0, 30, (3, 5), device=device)

    def step(logits, tokens, seed, out):
        return accept_candidates(logits * 2, tokens, tree, mode="sampling", seed=seed, out=out)

    seeds = [torch.tensor([4, 0], device=device) for _ in range(2)]
    want = rows(step(logits, tokens, seeds[0], None))
    out = filled(3, 3, device)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(logits, tokens, seeds[1], out)
    assert rows(got) == rows(out) == want and seeds[1].tolist() == [4, 1]


def test_compile_out():
    check_compile_out("cpu")


# ---- registration ----


def op_arguments(logits, tokens, tree, mode, generator):
    return (
        logits, tokens, tree.parents, tree.num_nodes, tree.max_depth, [float(mode), -1.0, 0.09, 0.3, 4.0, 0.9],
        [torch.full((len(logits),), 0.8, device=logits.device)], None, 5, None, [1], generator, None,
    )  # fmt: skip


def check_op(device):
    tree = TokenTree.from_parents(torch.tensor([-1, 0, 0, 1, 2])).to(device)
    logits, tokens = torch.randn(3, 5, 30, device=device), torch.randint(0, 30, (3, 5), device=device)
    for mode in AcceptMode:
        for generator in (None, torch.tensor([1, 2], device=device)):
            if mode == AcceptMode.SAMPLING and generator is None:
                continue
            arguments = op_arguments(logits, tokens, tree, mode, generator)
            torch.library.opcheck(torch.ops.medusa_kernels.accept_candidates.default, arguments)


def check_compile(device):
    tree = TokenTree.from_parents(torch.tensor([-1, 0, 0, 1, 2])).to(device)
    logits, tokens = torch.randn(3, 5, 30, device=device), torch.randint(0, 30, (3, 5), device=device)

    def step(logits, tokens, seed):
        return accept_candidates(logits * 2, tokens, tree, mode="sampling", seed=seed, top_p=0.9, eos_token_id=3)

    seeds = [torch.tensor([4, 0], device=device) for _ in range(2)]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(logits, tokens, seeds[0])
    assert rows(got) == rows(step(logits, tokens, seeds[1])) and seeds[0].tolist() == seeds[1].tolist() == [4, 1]


def test_opcheck():
    check_op("cpu")


def test_compile():
    check_compile("cpu")


# ---- bad input ----

BAD = [
    ("logits", {"logits": torch.zeros(2, 3)}),
    ("logits", {"logits": torch.zeros(2, 3, 8, dtype=torch.float64)}),
    ("logits", {"logits": torch.zeros(2, 3, 8, dtype=torch.int32)}),
    ("logits", {"logits": torch.zeros(2, 4, 8)}),
    ("logits", {"logits": torch.zeros(2, 3, 16)[..., ::2]}),
    ("logits", {"logits": torch.zeros(2, 3, 0)}),
    ("logits", {"logits": None}),
    ("logits", {"logits": [[1.0]]}),
    ("tokens", {"tokens": torch.zeros(2, 3, dtype=torch.int32)}),
    ("tokens", {"tokens": torch.zeros(2, 4, dtype=torch.int64)}),
    ("tokens", {"tokens": torch.zeros(3, dtype=torch.int64)}),
    ("tokens", {"tokens": torch.zeros(2, 6, dtype=torch.int64)[:, ::2]}),
    ("tokens", {"tokens": torch.zeros(2, 3, dtype=torch.int64, device="meta")}),
    ("tokens", {"tokens": None}),
    ("tree", {"tree": None}),
    ("tree", {"tree": torch.tensor([-1, 0, 1])}),
    ("tree", {"tree": TokenTree.from_parents(torch.tensor([[-1, 0, 1]] * 3))}),
    ("num_nodes", {"tree": TokenTree.chain(2).with_num_nodes(torch.ones(3, dtype=torch.int32))}),
    ("mode", {"mode": "Greedy"}),
    ("mode", {"mode": 3.0}),
    ("mode", {"mode": torch.zeros(2, dtype=torch.int64)}),
    ("mode", {"mode": torch.zeros(3, dtype=torch.int8)}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": NAN}),
    ("temperature", {"temperature": INF}),
    ("temperature", {"temperature": "1"}),
    ("temperature", {"temperature": torch.ones(2, dtype=torch.float64)}),
    ("temperature", {"temperature": torch.ones(1)}),
    ("temperature", {"temperature": torch.ones(2, device="meta")}),
    ("posterior_threshold", {"posterior_threshold": -0.1}),
    ("posterior_threshold", {"posterior_threshold": None}),
    ("posterior_alpha", {"posterior_alpha": NAN}),
    ("posterior_alpha", {"posterior_alpha": torch.ones(2, 1)}),
    ("top_k", {"top_k": 0}),
    ("top_k", {"top_k": 1.5}),
    ("top_k", {"top_k": torch.ones(2, dtype=torch.int64)}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": torch.ones(3)}),
    ("seed", {"mode": "sampling"}),
    ("seed", {"seed": 1.0}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": torch.zeros(2)}),
    ("seed", {"seed": torch.zeros(3, dtype=torch.int64)}),
    ("seed", {"seed": torch.tensor(1)}),
    ("eos_token_id", {"eos_token_id": 1.0}),
    ("eos_token_id", {"eos_token_id": "2"}),
    ("eos_token_id", {"eos_token_id": [1, None]}),
    ("eos_token_id", {"eos_token_id": list(range(17))}),
    ("eos_token_id", {"eos_token_id": torch.tensor(1)}),
    ("eos_token_id", {"eos_token_id": torch.tensor([1.0])}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": torch.ones(2)}),
]


@pytest.mark.parametrize("name, wrong", BAD, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BAD)])
def test_bad_input(name, wrong):
    good = {"logits": torch.zeros(2, 3, 8), "tokens": torch.zeros(2, 3, dtype=torch.int64), "tree": TokenTree.chain(2)}
    accept_candidates(**good)
    generator = torch.tensor([1, 5])
    arguments = {**good, **({} if name == "seed" else {"seed": generator}), **wrong}
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    with pytest.raises((ValueError, TypeError), match=name):
        accept_candidates(**arguments)
    assert all(torch.equal(v, arguments[k]) for k, v in before.items()) and generator.tolist() == [1, 5]
    accept_candidates(**good, max_tokens=0, top_k=1, top_p=1.0, temperature=0, eos_token_id=list(range(16)))


# ---- GPU ----


def to(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", range(3))
def test_cuda_equals_cpu(device, chunk):
    for seed in range(chunk * 300, (chunk + 1) * 300):
        logits, tokens, tree, options = random_case(random.Random(seed))
        seeds = [clone_seed(options), to(device, clone_seed(options))]
        want = accept_candidates(logits, tokens, tree, **seeds[0])
        got = accept_candidates(logits.to(device), tokens.to(device), tree.to(device), **seeds[1])
        assert rows(got) == rows(want), (seed, options)
        if isinstance(options["seed"], torch.Tensor):
            assert seeds[0]["seed"].tolist() == seeds[1]["seed"].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("vocab", [32000, 49152, 128256, 32003])
def test_cuda_equals_cpu_with_large_vocabularies(device, vocab, batch, dtype):
    tree = TokenTree.preset("mc_sim_7b_63")
    generator = torch.Generator().manual_seed(vocab + batch)
    wide = (torch.randn(batch, tree.size, vocab + 5, generator=generator) * 3).to(dtype)
    logits = wide[..., 3 : vocab + 3]  # rows that are not aligned
    above = tree.parents.clamp(min=0).long()
    top = logits.float().topk(8).indices[:, above]
    rank = (torch.rand(batch, tree.size, generator=generator) * 8).long()
    tokens = top.gather(2, rank.unsqueeze(-1)).squeeze(-1)
    on_gpu = wide.to(device)[..., 3 : vocab + 3], tokens.to(device), tree.to(device)
    cases = [{}, {"mode": "typical"}, {"mode": "typical", "posterior_threshold": 1e-4, "seed": 4, "temperature": 0.7},
             {"mode": "sampling", "seed": 1}, {"mode": "sampling", "seed": 2, "top_p": 0.9},
             {"mode": "sampling", "seed": 3, "top_k": 50, "top_p": 0.95, "temperature": 0.8}]  # fmt: skip
    for options in cases:
        want = accept_candidates(logits, tokens, tree, **options)
        assert rows(accept_candidates(*on_gpu, **options)) == rows(want), options


@pytest.mark.gpu
def test_cuda_graph(device):
    tree = TokenTree.preset("mc_sim_7b_63").to(device)
    logits = torch.randn(2, tree.size, 5000, device=device)
    tokens = torch.randint(0, 5000, (2, tree.size), device=device)
    seed = torch.tensor([9, 0], device=device)
    modes = torch.tensor([AcceptMode.SAMPLING, AcceptMode.TYPICAL], dtype=torch.int8, device=device)
    options = {"mode": modes, "posterior_threshold": 1e-5, "top_p": 0.9}
    accept_candidates(logits, tokens, tree, seed=seed.clone(), **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = accept_candidates(logits, tokens, tree, seed=seed, **options)
    drawn = set()
    for step in range(20):
        logits.normal_()
        graph.replay()
        want = accept_candidates(logits, tokens, tree, seed=torch.tensor([9, step], device=device), **options)
        assert rows(captured) == rows(want) and seed.tolist() == [9, step + 1]
        drawn.add(int(captured.next_token[0]))
    assert len(drawn) > 1


@pytest.mark.gpu
def test_cuda_is_deterministic(device):
    tree = TokenTree.preset("mc_sim_7b_63").to(device)
    logits = torch.randn(3, tree.size, 32000, device=device, dtype=torch.bfloat16)
    tokens = torch.randint(0, 32000, (3, tree.size), device=device)
    modes = torch.tensor([0, 1, 2], dtype=torch.int8, device=device)
    results = [accept_candidates(logits, tokens, tree, mode=modes, seed=8, posterior_threshold=1e-6) for _ in range(50)]
    assert len({tuple(rows(result)) for result in results}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["greedy", "typical", "sampling"])
def test_cuda_streams_and_graphs_at_once(device, mode):
    """The blocks of a launch mail each other results: launches that overlap must not get each other's."""
    tree = TokenTree.preset("mc_sim_7b_63").to(device)
    above = tree.parents.clamp(min=0).long()
    options = {"mode": mode, "seed": 6, "top_p": 0.9} if mode == "sampling" else {"mode": mode}
    logits = [torch.randn(1, tree.size, 32000, device=device, dtype=torch.bfloat16) for _ in range(4)]
    tokens = [x.argmax(-1)[:, above] for x in logits]
    want = [rows(accept_candidates(x.cpu(), t.cpu(), tree.to("cpu"), **options)) for x, t in zip(logits, tokens)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    got: list[list[Acceptance]] = [[] for _ in logits]
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            got[i].append(accept_candidates(logits[i], tokens[i], tree, **options))
    streams = [torch.cuda.Stream() for _ in logits]
    torch.cuda.synchronize()
    for _ in range(200):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < len(graphs):
                    graphs[i].replay()
                else:
                    got[i].append(accept_candidates(logits[i], tokens[i], tree, **options))
    torch.cuda.synchronize()
    for i, results in enumerate(got):
        assert all(rows(result) == want[i] for result in results)


@pytest.mark.gpu
def test_cuda_trees_of_every_size(device):
    for size in (1, 2, 31, 32, 33, 63, 65, 128, 511, 512):
        parents = (torch.rand(2, size) * torch.arange(size)).int()
        parents[:, 0] = -1
        tree = TokenTree.from_parents(parents)
        logits, tokens = torch.randn(2, size, 100).round(), torch.randint(0, 3, (2, size))
        for options in ({}, {"mode": "typical", "posterior_threshold": 0.001}, {"mode": "sampling", "seed": 3}):
            want = accept_candidates(logits, tokens, tree, **options)
            got = accept_candidates(logits.to(device), tokens.to(device), tree.to(device), **options)
            assert rows(got) == rows(want)


@pytest.mark.gpu
def test_cuda_opcheck_and_compile(device):
    check_op(device)
    check_compile(device)
    check_compile_out(device)


@pytest.mark.gpu
def test_cuda_out_equals_new(device):
    acceptance._known.clear()
    for seed in range(150):
        logits, tokens, tree, options = random_case(random.Random(seed))
        check_out_equals_new(logits.to(device), tokens.to(device), tree.to(device), to(device, options))
    assert len(acceptance._known.values()) > 30


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["greedy", "typical", "sampling"])
def test_cuda_out_again_and_again(device, mode):
    """Blocks that mail each other: each launch has words of its own, though its plan is kept. Unlike inputs in turn,
    without a synchronisation in between, on two streams."""
    tree = TokenTree.preset("mc_sim_7b_63").to(device)
    above = tree.parents.clamp(min=0).long()
    logits = [torch.randn(1, tree.size, 32000, device=device, dtype=torch.bfloat16) for _ in range(4)]
    tokens = [x.argmax(-1)[:, above] for x in logits]
    seeds = [torch.tensor([6, 0], device=device) for _ in logits]

    def options(i):
        return {"mode": mode, "seed": seeds[i], "top_p": 0.9} if mode == "sampling" else {"mode": mode}

    steps = 30
    want = [[rows(accept_candidates(x, t, tree, **options(i))) for _ in range(steps)]
            for i, (x, t) in enumerate(zip(logits, tokens))]  # fmt: skip
    for seed in seeds:
        seed.copy_(torch.tensor([6, 0]))
    acceptance._known.clear()
    outs = [[filled(1, tree.max_depth + 1, device) for _ in range(steps)] for _ in logits]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for step in range(steps):
        for i in range(len(logits)):
            with torch.cuda.stream(streams[i % 2]):
                accept_candidates(logits[i], tokens[i], tree, out=outs[i][step], **options(i))
    torch.cuda.synchronize()
    assert len(acceptance._known.values()) == 1
    assert [[rows(out) for out in all_steps] for all_steps in outs] == want


@pytest.mark.gpu
def test_cuda_graph_of_a_known_call(device):
    tree = TokenTree.preset("mc_sim_7b_63").to(device)
    logits = torch.randn(2, tree.size, 5000, device=device)
    tokens = torch.randint(0, 5000, (2, tree.size), device=device)
    tokens[:, 1:] = logits.argmax(-1)[:, tree.parents[1:].long()]
    out, seed = filled(2, tree.max_depth + 1, device), torch.tensor([9, 0], device=device)
    accept_candidates(logits, tokens, tree, mode="sampling", seed=seed.clone(), out=out)
    known = acceptance._known.values()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accept_candidates(logits, tokens, tree, mode="sampling", seed=seed, out=out)
    assert acceptance._known.values() == known
    for step in range(10):
        logits.normal_()
        want = accept_candidates(logits, tokens, tree, mode="sampling", seed=torch.tensor([9, step], device=device))
        for x in out:
            x.zero_()
        graph.replay()
        assert rows(out) == rows(want) and seed.tolist() == [9, step + 1]


@pytest.mark.gpu
def test_cuda_out_does_not_synchronise(device):
    tree = TokenTree.chain(3, device)
    logits, tokens = torch.randn(2, 4, 500, device=device), torch.zeros(2, 4, dtype=torch.int64, device=device)
    out = filled(2, 4, device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            accept_candidates(logits, tokens, tree, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_out_where_another_device_is_current():
    tree = TokenTree.preset("mc_sim_7b_63")
    logits, tokens = torch.randn(1, tree.size, 32000), torch.zeros(1, tree.size, dtype=torch.int64)
    tokens[:, 1:] = logits.argmax(-1)[:, tree.parents[1:].long()]
    want = rows(accept_candidates(logits, tokens, tree))
    for current in (0, 1):
        for device in ("cuda:0", "cuda:1"):
            arguments = logits.to(device), tokens.to(device), tree.to(device)
            with torch.cuda.device(current):
                for _ in range(2):
                    out = accept_candidates(*arguments, out=filled(1, tree.max_depth + 1, device))
                    assert rows(out) == want
                    assert torch.cuda.current_device() == current
