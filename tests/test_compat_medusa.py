"""The four functions of Medusa's loop against independent loops, and the loop itself against plain greedy decoding."""

import collections
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_kernels._presets import PRESETS
from medusa_kernels.compat import medusa

SMALL = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
WIDE = [[0], [11], [0, 0], [0, 13], [11, 2], [11, 2, 10]]  # ranks that Medusa's fixed top-10 cannot hold


def nodes_of(choices):
    return [()] + sorted(map(tuple, choices), key=lambda p: (len(p), p))


def medusa_rows(choices):
    """Medusa's `retrieve_indices`: from the last node to the first, the path to each that is not on one already."""
    nodes, seen, rows = nodes_of(choices), set(), []
    for node in reversed(nodes[1:]):
        if node not in seen:
            prefixes = [node[:n] for n in range(len(node) + 1)]
            seen.update(prefixes)
            rows.append([nodes.index(p) for p in prefixes])
    width = max(map(len, rows))
    return [row + [-1] * (width - len(row)) for row in rows]


# ---- generate_medusa_buffers ----


@pytest.mark.parametrize("choices", [*PRESETS.values(), SMALL], ids=[*PRESETS, "small"])
def test_buffers(choices):
    buffers = medusa.generate_medusa_buffers(choices, device="cpu")
    nodes = nodes_of(choices)
    assert set(buffers) == {"medusa_attn_mask", "tree_indices", "medusa_position_ids", "retrieve_indices"}
    mask = [[float(b == a[: len(b)]) for b in nodes] for a in nodes]
    assert buffers["medusa_attn_mask"].tolist() == [[mask]]
    assert buffers["medusa_attn_mask"].dtype == torch.float32
    assert buffers["medusa_position_ids"].tolist() == [len(a) for a in nodes]
    assert buffers["tree_indices"].tolist() == [0] + [1 + 10 * (len(a) - 1) + a[-1] for a in nodes[1:]]
    assert buffers["retrieve_indices"].tolist() == medusa_rows(choices)
    assert all(buffers[key].dtype == torch.int64 for key in buffers if key != "medusa_attn_mask")
    # what evaluate_posterior takes in: paths times their length
    assert choices is SMALL or buffers["retrieve_indices"].numel() <= 225


def test_buffers_bad_input():
    with pytest.raises(ValueError, match=r"^choices: path \[1, 0\] needs its prefix"):
        medusa.generate_medusa_buffers([[0], [1, 0]], device="cpu")


# ---- generate_candidates ----


def random_logits(heads, vocab, length=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, 1, length, vocab, generator=generator), torch.randn(1, length, vocab, generator=generator)


@pytest.mark.parametrize("choices", [SMALL, WIDE, PRESETS["mc_sim_7b_63"]], ids=["small", "wide", "mc_sim_7b_63"])
@pytest.mark.parametrize("copied", [False, True], ids=["own", "copied"])
def test_generate_candidates(choices, copied):
    buffers = medusa.generate_medusa_buffers(choices, device="cpu")
    if copied:  # as when a caller moves or stores the buffers: the tree is then read from them
        buffers = {key: value.clone() for key, value in buffers.items()}
    medusa_logits, logits = random_logits(4, 50)
    got, tree = medusa.generate_candidates(medusa_logits, logits, buffers["tree_indices"], buffers["retrieve_indices"])
    ranked = medusa_logits[:, 0, -1].argsort(dim=-1, descending=True).tolist()
    want = [int(logits[0, -1].argmax())] + [ranked[len(a) - 1][a[-1]] for a in nodes_of(choices)[1:]]
    assert tree.tolist() == [want] and tree.dtype == torch.int64
    assert got.tolist() == [[want[i] if i >= 0 else -1 for i in row] for row in medusa_rows(choices)]
    assert got.dtype == torch.int64


def drawn_roots(logits, count, **options):
    buffers = medusa.generate_medusa_buffers([[0]], device="cpu")
    medusa_logits = torch.zeros(1, 1, 1, logits.shape[-1])
    torch.manual_seed(0)
    indices = buffers["tree_indices"], buffers["retrieve_indices"]
    draws = (medusa.generate_candidates(medusa_logits, logits, *indices, **options)[1] for _ in range(count))
    return collections.Counter(int(tree_candidates[0, 0]) for tree_candidates in draws)


def check_frequencies(counts, probs):
    """Pearson's chi-square at about one in ten thousand, and nothing where the probability is zero."""
    total = sum(counts.values())
    assert all(probs[token] > 0 for token in counts)
    cells = [(counts[t], total * float(p)) for t, p in enumerate(probs) if p > 0]
    chi_square = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 10, (counts, probs)


def typical_probs(logits, temperature, threshold, alpha):
    probs = (logits.double() / temperature).softmax(-1)
    entropy = -(probs * (probs + 1e-5).log()).sum()
    kept = torch.where(probs > min(threshold, alpha * math.exp(-entropy)), probs, 0)
    return kept / kept.sum()


def nucleus_probs(logits, temperature, top_p):
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept, mass = torch.zeros_like(probs), 0.0
    for token in order.tolist():
        if mass >= top_p:
            break
        kept[token] = probs[token]
        mass += float(probs[token])
    return kept / kept.sum()


LOGITS = torch.tensor([[[2.0, 1.5, 0.5, -1.0, -4.0, 1.0]]])


def test_generate_candidates_draws_typical():
    counts = drawn_roots(LOGITS, 1000, temperature=0.8)
    check_frequencies(counts, typical_probs(LOGITS[0, 0], 0.8, 0.09, 0.3))


def test_generate_candidates_draws_nucleus():
    counts = drawn_roots(LOGITS, 1000, temperature=0.8, top_p=0.7, sampling="nucleus")
    check_frequencies(counts, nucleus_probs(LOGITS[0, 0], 0.8, 0.7))


def test_generate_candidates_fast_takes_the_argmax():
    assert drawn_roots(LOGITS, 20, temperature=0.8, fast=True) == {0: 20}


def test_generate_candidates_bad_input():
    buffers = medusa.generate_medusa_buffers(WIDE, device="cpu")
    indices = buffers["tree_indices"], buffers["retrieve_indices"]
    medusa_logits, logits = random_logits(3, 14)
    medusa.generate_candidates(medusa_logits, logits, *indices)  # at the limit: 3 heads, 14 tokens
    with pytest.raises(ValueError, match=r"^medusa_logits: the tree needs 3 heads and 14 tokens"):
        medusa.generate_candidates(medusa_logits[:2], logits, *indices)
    with pytest.raises(ValueError, match=r"^medusa_logits: the tree needs 3 heads and 14 tokens"):
        medusa.generate_candidates(medusa_logits[..., :13], logits[..., :13], *indices)
    with pytest.raises(ValueError, match=r"^logits:"):
        medusa.generate_candidates(medusa_logits, logits.expand(2, -1, -1), *indices)
    with pytest.raises(ValueError, match=r"^sampling:"):
        medusa.generate_candidates(medusa_logits, logits, *indices, sampling="beam")


# ---- evaluate_posterior ----


def path_inputs(choices, vocab, seed, spread=1.0):
    """Logits and candidates path by path, as Medusa's tree_decoding and generate_candidates hand them on."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor(medusa_rows(choices))
    size = len(choices) + 1
    tokens = torch.zeros(size + 1, dtype=torch.int64)
    tokens[size] = -1
    for i, node in enumerate(nodes_of(choices)[1:], start=1):  # siblings differ, as top-k tokens do
        tokens[i] = (node[-1] + seed) % vocab
    tree_logits = torch.randn(size, vocab, generator=generator) * spread
    return tree_logits[rows], tokens[rows]


def evaluate(logits, candidates, accepts, score):
    """Medusa's choice in loops: the longest accepted path, then the highest score, then the first."""
    best = (-1, -math.inf, 0)
    for p, row in enumerate(candidates.tolist()):
        length = 0
        while length + 1 < len(row) and row[length + 1] >= 0 and accepts(logits[p, length], row[length + 1]):
            length += 1
        likelihood = sum(score(logits[p, i], row[i + 1]) for i in range(length))
        if (length, likelihood) > best[:2]:
            best = (length, likelihood, p)
    return best[2], best[0]


def check_posterior(got, want, candidates):
    """Of two paths with the same accepted beginning either may be named."""
    (path, length), (want_path, want_length) = got, want
    assert path.dtype == length.dtype == torch.int64 and path.dim() == length.dim() == 0
    assert int(length) == want_length
    assert candidates[int(path), : want_length + 1].tolist() == candidates[want_path, : want_length + 1].tolist()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([SMALL, PRESETS["mc_sim_7b_63"]]), st.integers(3, 12), st.integers(0, 10**6))
def test_evaluate_posterior_greedy(choices, vocab, seed):
    vocab = max(vocab, 1 + max(max(p) for p in choices))
    logits, candidates = path_inputs(choices, vocab, seed)
    got = medusa.evaluate_posterior(logits, candidates, temperature=0)
    want = evaluate(logits, candidates, lambda row, token: int(row.argmax()) == token, lambda row, token: 0.0)
    check_posterior(got, want, candidates)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([SMALL, PRESETS["mc_sim_7b_63"]]),
    st.integers(3, 12),
    st.integers(0, 10**6),
    st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    st.sampled_from([None, (0.09, 0.3), (0.3, 0.09), (0.2, 0.9)]),
)
def test_evaluate_posterior_typical(choices, vocab, seed, temperature, thresholds):
    vocab = max(vocab, 1 + max(max(p) for p in choices))
    logits, candidates = path_inputs(choices, vocab, seed, spread=2.0)
    options = {} if thresholds is None else {"posterior_threshold": thresholds[0], "posterior_alpha": thresholds[1]}
    got = medusa.evaluate_posterior(logits, candidates, temperature, **options)
    threshold, alpha = thresholds or (0.09, 0.3)  # the paper's, not Medusa's swapped ones

    def accepts(row, token):
        probs = (row / temperature).softmax(-1)
        entropy = -(probs * (probs + 1e-5).log()).sum()
        return bool(probs[token] > min(threshold, alpha * math.exp(-entropy)))

    want = evaluate(logits, candidates, accepts, lambda row, token: float((row / temperature).log_softmax(-1)[token]))
    check_posterior(got, want, candidates)


def test_evaluate_posterior_never_accepts_past_the_end_of_a_path():
    logits = torch.zeros(2, 4, 5)
    logits[..., 0] = 9.0  # token 0 is the best one everywhere: Medusa reads the padding as just that
    candidates = torch.tensor([[3, 1, 1, 1], [3, 0, -1, -1]])
    for temperature in (0, 1.0):
        path, length = medusa.evaluate_posterior(logits, candidates, temperature)
        assert (int(path), int(length)) == (1, 1)


@pytest.mark.parametrize("sampling", ["typical", "nucleus"])
def test_evaluate_posterior_draws(sampling):
    """One draw a node: each child is accepted as often as a draw from the kept tokens gives it."""
    choices = [[0], [1], [0, 0], [0, 1], [1, 0]]
    logits, candidates = path_inputs(choices, 6, seed=0)
    logits[:, 0], logits[candidates[:, 1] == 0, 1] = LOGITS[0, 0], LOGITS[0, 0] * 0.5
    options = {"temperature": 0.8, "sampling": sampling, "fast": False, "top_p": 0.7}
    torch.manual_seed(1)
    counts = collections.Counter()
    for _ in range(600):
        path, length = medusa.evaluate_posterior(logits, candidates, **options)
        counts[tuple(candidates[path, 1 : int(length) + 1].tolist())] += 1

    def kept(row):
        return typical_probs(row, 0.8, 0.09, 0.3) if sampling == "typical" else nucleus_probs(row, 0.8, 0.7)

    want, first = {}, kept(logits[0, 0])
    children = {0: {0, 1}, 1: {0}}  # tokens are the ranks
    want[()] = 1 - float(first[0] + first[1])
    for token in (0, 1):
        row = logits[int((candidates[:, 1] == token).nonzero()[0]), 1]
        second = kept(row)
        for child in children[token]:
            want[token, child] = float(first[token] * second[child])
        want[(token,)] = float(first[token]) - sum(want[token, child] for child in children[token])
    outcomes = list(want)
    check_frequencies({outcomes.index(k): v for k, v in counts.items()}, [max(want[k], 0.0) for k in outcomes])


def test_evaluate_posterior_bad_input():
    logits, candidates = path_inputs(SMALL, 5, 0)
    with pytest.raises(ValueError, match=r"^candidates:"):
        medusa.evaluate_posterior(logits, candidates.int(), 0)
    with pytest.raises(ValueError, match=r"^candidates:"):
        medusa.evaluate_posterior(logits, candidates[:, :-1], 0)
    with pytest.raises(ValueError, match=r"^logits:"):
        medusa.evaluate_posterior(logits[0], candidates, 0)
    with pytest.raises(ValueError, match=r"^sampling:"):
        medusa.evaluate_posterior(logits, candidates, 1.0, sampling="beam")
    medusa.evaluate_posterior(torch.zeros(128, 4, 3), torch.zeros(128, 4, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"^candidates: expected at most 512"):
        medusa.evaluate_posterior(torch.zeros(129, 4, 3), torch.zeros(129, 4, dtype=torch.int64), 0)


# ---- update_inference_inputs ----


@pytest.mark.parametrize("accept_length", [0, 1, 3])
def test_update_inference_inputs(accept_length):
    heads, layers, kv_heads, slots, head_dim, vocab, committed = 2, 3, 2, 40, 8, 7, 9
    logits, candidates = path_inputs(SMALL, vocab, 0)
    medusa_logits = torch.randn(heads, *logits.shape)
    rows = torch.tensor(medusa_rows(SMALL))
    input_ids = torch.arange(committed).view(1, -1)
    cache = torch.randn(layers * 2, 1, kv_heads, slots, head_dim)
    lengths = torch.full((layers * 2,), committed + len(SMALL) + 1)
    before, ids_before = cache.clone(), input_ids.clone()
    path = 0
    got = medusa.update_inference_inputs(
        input_ids, candidates, torch.tensor(path), torch.tensor(accept_length), rows, None, logits, medusa_logits,
        5, cache, lengths,
    )  # fmt: skip
    kept = accept_length + 1
    assert got[0].tolist() == [list(range(committed)) + candidates[path, :kept].tolist()]
    assert torch.equal(got[1], logits[path, accept_length].view(1, 1, vocab))
    assert torch.equal(got[2], medusa_logits[:, path, accept_length].view(heads, 1, 1, vocab))
    assert got[3] == 5 + kept
    assert lengths.tolist() == [committed + kept] * (layers * 2)
    assert torch.equal(input_ids, ids_before)
    for i in range(kept):
        assert torch.equal(cache[:, :, :, committed + i], before[:, :, :, committed + int(rows[path, i])])
    assert torch.equal(cache[:, :, :, :committed], before[:, :, :, :committed])
    after = committed + len(SMALL) + 1
    assert torch.equal(cache[:, :, :, after:], before[:, :, :, after:])


# ---- the loop ----


class FakeModel:
    """Random logits as a function of the tokens so far, which it reads from its cache, as a model does."""

    vocab, heads, layers, slots = 17, 3, 2, 200

    def __init__(self):
        self.base_model = types.SimpleNamespace(model=types.SimpleNamespace(medusa_mask=None, medusa_mode=None))
        self.data = torch.zeros(self.layers * 2, 1, 1, self.slots, 4)
        self.lengths = torch.zeros(self.layers * 2, dtype=torch.int64)
        self.cache = [
            [types.SimpleNamespace(current_length=self.lengths[2 * i + j]) for j in range(2)]
            for i in range(self.layers)
        ]

    def logits(self, prefix):
        generator = torch.Generator().manual_seed(hash(tuple(prefix)) % 2**31)
        return torch.randn(self.vocab, generator=generator) * 2

    def head_logits(self, prefix):
        """A head that guesses well: what greedy decoding will give, at rank 0 to 3."""
        rows, text = [], list(prefix) + [int(self.logits(prefix).argmax())]
        for head in range(self.heads):
            row = self.logits([head + 100, *prefix])
            best = int(self.logits(text).argmax())
            row[best] = row.sort(descending=True).values[sum(text) % 4] + 1e-3
            rows.append(row)
            text.append(best)
        return torch.stack(rows)

    def __call__(self, input_ids, past_key_values=None, output_orig=False, position_ids=None, medusa_forward=False):
        assert past_key_values is self.cache and output_orig and medusa_forward
        start, count = int(self.lengths[0]), input_ids.shape[1]
        self.data[..., start : start + count, :] = input_ids[0].view(1, 1, 1, -1, 1).float()
        self.lengths += count
        mask = self.base_model.model.medusa_mask
        mask = torch.ones(count, count).tril() if mask is None else mask[0, 0]
        prefixes = []
        for i in range(count):
            visible = [*range(start), *(start + j for j in range(count) if mask[i, j])]
            assert position_ids is None or int(position_ids[i]) == len(visible) - 1
            tokens = self.data[:, 0, 0, visible, 0]
            assert (tokens == tokens[0]).all()  # all layers, keys and values agree
            prefixes.append([int(t) for t in tokens[0]])
        medusa_logits = torch.stack([self.head_logits(p) for p in prefixes], 1).unsqueeze(1)
        return medusa_logits, None, torch.stack([self.logits(p) for p in prefixes]).unsqueeze(0)


def medusa_loop(model, input_ids, choices, steps, temperature=0.0, **options):
    """Medusa's `medusa_generate`, written against its functions alone."""
    input_ids = input_ids.clone()
    buffers = medusa.generate_medusa_buffers(choices, device="cpu")
    medusa.reset_medusa_mode(model)
    medusa.reset_past_key_values(model.cache)
    medusa_logits, logits = medusa.initialize_medusa(input_ids, model, buffers["medusa_attn_mask"], model.cache)
    new_token, accepted = 0, []
    for _ in range(steps):
        candidates, tree_candidates = medusa.generate_candidates(
            medusa_logits, logits, buffers["tree_indices"], buffers["retrieve_indices"], temperature, **options
        )
        medusa_logits, logits, outputs = medusa.tree_decoding(
            model, tree_candidates, model.cache, buffers["medusa_position_ids"], input_ids, buffers["retrieve_indices"]
        )
        best_candidate, accept_length = medusa.evaluate_posterior(logits, candidates, temperature, **options)
        input_ids, logits, medusa_logits, new_token = medusa.update_inference_inputs(
            input_ids, candidates, best_candidate, accept_length, buffers["retrieve_indices"], outputs, logits,
            medusa_logits, new_token, model.data, model.lengths,
        )  # fmt: skip
        accepted.append(int(accept_length))
    return input_ids, new_token, accepted


@pytest.mark.parametrize("choices", [SMALL, WIDE, PRESETS["mc_sim_7b_63"]], ids=["small", "wide", "mc_sim_7b_63"])
def test_loop_is_greedy_decoding(choices):
    choices = [path for path in choices if len(path) <= FakeModel.heads]
    model, prompt = FakeModel(), torch.tensor([[3, 1, 4, 1, 5]])
    for _ in range(2):  # twice: the cache starts over
        got, new_token, accepted = medusa_loop(model, prompt, choices, steps=8)
        text = prompt[0].tolist()
        while len(text) < got.shape[1]:
            text.append(int(model.logits(text).argmax()))
        assert got.tolist() == [text]
        assert new_token == len(text) - 5 == sum(accepted) + 8
        assert sum(accepted) > 0


@pytest.mark.parametrize("options", [{"fast": True}, {"fast": False}, {"sampling": "nucleus", "fast": False}], ids=str)
def test_loop_at_a_temperature(options):
    """Each token of the text is one that the sampling keeps, and `torch.manual_seed` repeats the text."""
    model, prompt = FakeModel(), torch.tensor([[3, 1, 4, 1, 5]])
    texts = []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(medusa_loop(model, prompt, SMALL, steps=8, temperature=0.7, **options)[0][0].tolist())
    assert texts[0] == texts[1] and len(texts[0]) >= 13
    for i in range(5, len(texts[0])):
        row = model.logits(texts[0][:i])
        nucleus = options.get("sampling") == "nucleus"
        kept = nucleus_probs(row, 0.7, 0.8) if nucleus else typical_probs(row, 0.7, 0.09, 0.3)
        assert kept[texts[0][i]] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_step_on_the_gpu_equals_the_cpu(temperature):
    choices, committed = PRESETS["mc_sim_7b_63"], 9
    medusa_logits, logits = random_logits(4, 500)
    generator = torch.Generator().manual_seed(1)
    tree_logits = torch.randn(64, 500, generator=generator) * 3
    cache = torch.randn(6, 1, 2, 100, 64, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        buffers = medusa.generate_medusa_buffers(choices, device)
        rows = buffers["retrieve_indices"]
        given = medusa_logits.to(device), logits.to(device), buffers["tree_indices"], rows
        candidates, tree_candidates = medusa.generate_candidates(*given)
        row_logits = tree_logits.clone().to(device)
        # So that something is accepted: node 1, and its first child.
        row_logits[0, tree_candidates[0, 1]] = row_logits[1, tree_candidates[0, 11]] = 99.0
        row_logits = row_logits[rows]
        best, length = medusa.evaluate_posterior(row_logits, candidates, temperature)
        data, lengths = cache.clone().to(device), torch.zeros(6, dtype=torch.int64)
        input_ids = torch.arange(committed, device=device).view(1, -1)
        updated = medusa.update_inference_inputs(
            input_ids, candidates, best, length, rows, None, row_logits, row_logits[None].repeat(4, 1, 1, 1), 0, data,
            lengths,
        )  # fmt: skip
        results.append([candidates, tree_candidates, best, length, data, lengths, *map(torch.as_tensor, updated)])
    assert int(results[0][3]) >= 2
    for on_cpu, on_gpu in zip(*results):
        assert torch.equal(on_cpu, on_gpu.cpu())
