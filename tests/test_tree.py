"""TokenTree against plain Python loops over parent pointers."""

import heapq
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_kernels import TokenTree
from medusa_kernels._presets import PRESETS

SIZES = [1, 2, 63, 64, 65, 128, 512]


@st.composite
def parent_lists(draw, max_size=70):
    size = draw(st.integers(1, max_size))
    return [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]


def random_parents(size, seed=0, shape=()):
    """[*shape, size] int32: a parent drawn evenly from the nodes before."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(*shape, size, generator=generator)
    parents = (draw * torch.arange(size)).int()
    parents[..., 0] = -1
    return parents


def chains(parents):
    """For each node its path from the root: the brute force that everything else here is checked with."""
    paths = []
    for i, parent in enumerate(parents):
        paths.append((paths[parent] if i else []) + [i])
    return paths


def check_fields(tree, parents):
    """All fields of an unbatched tree against `chains`; `ranks` apart, which choices set otherwise."""
    paths, size = chains(parents), len(parents)
    assert tree.size == size and not tree.batched
    assert tree.parents.tolist() == parents and tree.parents.dtype == torch.int32
    assert tree.depths.tolist() == [len(p) - 1 for p in paths] and tree.depths.dtype == torch.int32
    assert tree.max_depth == max(len(p) - 1 for p in paths)
    want = torch.zeros(size, size, dtype=torch.bool)
    for i, path in enumerate(paths):
        want[i, path] = True
    assert torch.equal(tree.mask.cpu(), want) and tree.mask.is_contiguous()
    words = [[0] * math.ceil(size / 64) for _ in range(size)]
    for i, path in enumerate(paths):
        for j in path:
            words[i][j // 64] |= 1 << (j % 64)
    got = [[word % 2**64 for word in row] for row in tree.packed_mask.tolist()]
    assert got == words and tree.packed_mask.dtype == torch.int64 and tree.packed_mask.is_contiguous()
    leaves = sorted(set(range(size)) - set(parents))
    assert tree.paths.tolist() == [paths[i] + [-1] * (tree.max_depth + 1 - len(paths[i])) for i in leaves]
    assert tree.paths.dtype == torch.int32


def sibling_ranks(parents):
    return [parents[:i].count(parent) for i, parent in enumerate(parents)]


# ---- from_parents ----


@settings(max_examples=60, deadline=None)
@given(parent_lists(), st.sampled_from([torch.int32, torch.int64]))
def test_from_parents(parents, dtype):
    tree = TokenTree.from_parents(torch.tensor(parents, dtype=dtype))
    check_fields(tree, parents)
    assert tree.ranks.tolist() == sibling_ranks(parents) and tree.ranks.dtype == torch.int32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", ["random", "chain", "star"])
def test_sizes(size, shape):
    parents = {
        "random": random_parents(size).tolist(),
        "chain": list(range(-1, size - 1)),
        "star": [-1] + [0] * (size - 1),
    }[shape]
    check_fields(TokenTree.from_parents(torch.tensor(parents)), parents)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_from_parents_batched_with_padding(data):
    size, batch = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 4))
    nodes = [data.draw(st.integers(0, size)) for _ in range(batch)]
    parents = random_parents(size, data.draw(st.integers(0, 99)), (batch,))
    want = parents.tolist()
    for b, n in enumerate(nodes):
        parents[b, n:] = torch.tensor([2**31 - 1, -7, 5] * size, dtype=torch.int32)[: size - n]
    tree = TokenTree.from_parents(parents, torch.tensor(nodes, dtype=torch.int32))
    assert tree.batched and tree.paths.shape == (batch, size, tree.max_depth + 1)
    assert tree.mask.shape == (batch, size, size)
    assert tree.max_depth == max([0] + [len(p) - 1 for w, n in zip(want, nodes) for p in chains(w)[:n]])
    for b, n in enumerate(nodes):
        if n:
            alone = TokenTree.from_parents(torch.tensor(want[b][:n]))
            assert torch.equal(tree.depths[b, :n], alone.depths)
            assert torch.equal(tree.ranks[b, :n], alone.ranks)
            assert torch.equal(tree.mask[b, :n, :n], alone.mask) and not tree.mask[b, :n, n:].any()
            words = alone.packed_mask.shape[1]
            assert torch.equal(tree.packed_mask[b, :n, :words], alone.packed_mask)
            leaves = sorted(set(range(n)) - set(want[b][:n]))
            rows = tree.paths[b, leaves, : alone.max_depth + 1]
            assert torch.equal(rows, alone.paths) and (tree.paths[b, leaves, alone.max_depth + 1 :] == -1).all()
            others = torch.ones(size, dtype=torch.bool)
            others[leaves] = False
            assert (tree.paths[b, others] == -1).all()
        else:
            assert (tree.paths[b] == -1).all()


@pytest.mark.parametrize(
    "parents",
    [[0], [-1, 1], [-1, -1], [-1, 0, 3, 0], [-1, 0, 2], [1, -1], [-1, 0, 2**31 - 1]],
    ids=str,
)
def test_from_parents_refuses_what_is_not_sorted(parents):
    with pytest.raises(ValueError, match=r"^parents: expected -1 at node 0"):
        TokenTree.from_parents(torch.tensor(parents))
    with pytest.raises(ValueError, match=r"^parents: expected -1 at node 0"):
        TokenTree.from_parents(torch.tensor([parents]))
    # What is wrong only in the padding is fine.
    tree = TokenTree.from_parents(torch.tensor([parents]), torch.zeros(1, dtype=torch.int32))
    assert tree.max_depth == 0


@pytest.mark.parametrize(
    "match, error, call",
    [
        ("parents", TypeError, lambda: TokenTree.from_parents([-1, 0])),
        ("parents", ValueError, lambda: TokenTree.from_parents(torch.tensor([-1.0, 0.0]))),
        ("parents", ValueError, lambda: TokenTree.from_parents(torch.tensor(-1))),
        ("parents", ValueError, lambda: TokenTree.from_parents(torch.empty(0, dtype=torch.int32))),
        ("parents", ValueError, lambda: TokenTree.from_parents(torch.empty(0, 3, dtype=torch.int32))),
        ("parents", ValueError, lambda: TokenTree.from_parents(torch.zeros(1, 1, 1, dtype=torch.int32))),
        ("parents", ValueError, lambda: TokenTree.from_parents(torch.arange(-1, 512))),
        ("num_nodes", ValueError, lambda: TokenTree.from_parents(random_parents(4, 0, (2,)), torch.tensor([1, 2]))),
        ("num_nodes", ValueError, lambda: TokenTree.from_parents(random_parents(4, 0, (2,)), torch.ones(3).int())),
        ("num_nodes", TypeError, lambda: TokenTree.from_parents(random_parents(4, 0, (2,)), [1, 2])),
        ("max_depth", ValueError, lambda: TokenTree.from_parents(random_parents(4), max_depth=4)),
        ("max_depth", ValueError, lambda: TokenTree.from_parents(random_parents(4), max_depth=-1)),
    ],
)
def test_from_parents_bad_input(match, error, call):
    with pytest.raises(error, match=f"^{match}:"):
        call()


def test_max_depth_cuts_paths_alone():
    tree = TokenTree.from_parents(torch.tensor([-1, 0, 1, 2, 0]), max_depth=1)
    assert tree.max_depth == 1 and tree.depths.tolist() == [0, 1, 2, 3, 1]
    assert tree.mask[3].tolist() == [True, True, True, True, False]
    assert tree.paths.tolist() == [[0, 1], [0, 4]]


# ---- from_choices, chain, full, preset ----


def medusa_buffers(choices, top_k=10):
    """Medusa's buffers from the definition: mask, position ids, tree indices, the set of retrieve rows."""
    nodes = [()] + sorted(map(tuple, choices), key=lambda p: (len(p), p))
    mask = [[b == a[: len(b)] for b in nodes] for a in nodes]
    positions = [len(a) for a in nodes]
    indices = [0] + [1 + top_k * (len(a) - 1) + a[-1] for a in nodes[1:]]
    leaves = [a for a in nodes if not any(b[:-1] == a for b in nodes[1:])]
    depth = max(positions)
    rows = {tuple(nodes.index(a[:n]) for n in range(len(a) + 1)) + (-1,) * (depth - len(a)) for a in leaves}
    return mask, positions, indices, rows


def check_choices(tree, choices):
    mask, positions, indices, rows = medusa_buffers(choices)
    assert tree.mask.tolist() == mask
    assert tree.depths.tolist() == positions
    assert [0] + [1 + 10 * (d - 1) + r for d, r in zip(positions[1:], tree.ranks.tolist()[1:])] == indices
    assert len(tree.paths) == len(rows) and set(map(tuple, tree.paths.tolist())) == rows
    check_fields(tree, tree.parents.tolist())


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    choices = PRESETS[name]
    assert len(choices) == 63 and all(0 <= r < 10 for path in choices for r in path)
    seen = {()}
    for path in map(tuple, choices):  # the order of a greedy search: prefixes and better ranks come first
        assert path not in seen and path[:-1] in seen
        assert path[-1] == 0 or path[:-1] + (path[-1] - 1,) in seen
        seen.add(path)
    tree = TokenTree.preset(name)
    assert tree.size == 64
    check_choices(tree, choices)


def test_presets_are_the_nine_published():
    stages = [f"vicuna_{size}_stage{stage}" for size in ("7b", "13b", "33b") for stage in (1, 2)]
    assert set(PRESETS) == {*stages, "mc_sim_7b_63", "vicuna_7b_stage1_ablation", "zephyr_stage2"}
    assert TokenTree.preset("mc_sim_7b_63").paths.shape == (42, 5)
    with pytest.raises(ValueError, match=r"^name: .*mc_sim_7b_63"):
        TokenTree.preset("mc_sim")


@st.composite
def choice_lists(draw):
    paths = set()
    for path in draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=15)):
        paths |= {tuple(path[:n]) for n in range(1, len(path) + 1)}
    return draw(st.permutations(sorted(paths)))


@settings(max_examples=60, deadline=None)
@given(choice_lists())
def test_from_choices(choices):
    check_choices(TokenTree.from_choices(choices), choices)


def test_from_choices_takes_ranks_of_any_size():
    tree = TokenTree.from_choices([[12], [12, 300], [0]])
    assert tree.parents.tolist() == [-1, 0, 0, 2] and tree.ranks.tolist() == [0, 0, 12, 300]


@pytest.mark.parametrize(
    "choices, error, match",
    [
        ([], ValueError, "empty list"),
        ([[]], ValueError, r"got \[\]"),
        ([[0], [-1]], ValueError, r"got \[-1\]"),
        ([[0], [1], [0]], ValueError, r"path \[0\] is there twice"),
        ([[0], [1, 2]], ValueError, r"path \[1, 2\] needs its prefix \[1\]"),
        ([[i] for i in range(512)], ValueError, "at most 512"),
        ([[0.5]], TypeError, "paths of integers"),
        ([0, 1], TypeError, "paths of integers"),
    ],
)
def test_from_choices_bad_input(choices, error, match):
    with pytest.raises(error, match=f"^choices: .*{match}"):
        TokenTree.from_choices(choices)


@pytest.mark.parametrize("k", [0, 1, 5, 511])
def test_chain(k):
    tree = TokenTree.chain(k)
    check_fields(tree, list(range(-1, k)))
    assert tree.ranks.tolist() == [0] * (k + 1)


@pytest.mark.parametrize("k", [-1, 512])
def test_chain_bad_input(k):
    with pytest.raises(ValueError, match=r"^k: expected 0..511"):
        TokenTree.chain(k)


@pytest.mark.parametrize("widths", [[1], [3], [2, 3], [2, 1, 4], [511], [2] * 8])
def test_full(widths):
    choices = [p for n in range(1, len(widths) + 1) for p in itertools.product(*map(range, widths[:n]))]
    check_choices(TokenTree.full(widths), choices)


@pytest.mark.parametrize("widths", [[], [2, 0], [-1], [512], [2] * 9])
def test_full_bad_input(widths):
    with pytest.raises(ValueError, match=r"^widths:"):
        TokenTree.full(widths)


# ---- best_first, search ----


def path_scores(tree, probs):
    """Each node's score from `ranks` and `parents`: the float32 product in the order in which a path grows."""
    scores = []
    for i, (parent, rank) in enumerate(zip(tree.parents.tolist(), tree.ranks.tolist())):
        depth = 0 if i == 0 else int(tree.depths[i])
        scores.append(torch.tensor(1.0) if i == 0 else scores[parent] * probs[depth - 1, rank])
    return [float(s) for s in scores]


def best_scores(probs, num_nodes):
    """Scores of the most probable paths, by a heap over the whole tree: best first, the root left out."""
    heads, top_k = probs.shape
    heap = [(-float(probs[0, r]), (r,)) for r in range(top_k)] if heads else []
    heapq.heapify(heap)
    best = []
    while len(best) < num_nodes - 1:
        score, path = heapq.heappop(heap)
        best.append(-score)
        if len(path) < heads:
            for r in range(top_k):
                heapq.heappush(heap, (float(torch.tensor(score) * probs[len(path), r]), path + (r,)))
    return best


def check_best(tree, probs, num_nodes):
    assert tree.size == num_nodes
    parents, ranks = tree.parents.tolist(), tree.ranks.tolist()
    assert parents[0] == -1 and all(0 <= p < i for i, p in enumerate(parents) if i)
    assert len(set(zip(parents, ranks))) == num_nodes and all(0 <= r < probs.shape[1] for r in ranks)
    assert int(tree.depths.max()) <= min(tree.max_depth, probs.shape[0])
    assert path_scores(tree, probs)[1:] == best_scores(probs, num_nodes)  # exactly: the same float products, sorted


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_best_first_is_optimal(data):
    batch, heads, top_k = (data.draw(st.integers(1, n)) for n in (3, 4, 4))
    most = 1 + sum(top_k**d for d in range(1, heads + 1))
    num_nodes = data.draw(st.integers(1, min(most, 70)))
    if data.draw(st.booleans()):  # few values, so that most scores tie; 0 and 1 too, so that prefixes tie with paths
        values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 0.1, 0.3])
    else:
        values = st.floats(0, 1, width=32)
    count = batch * heads * top_k
    probs = torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count)))
    probs = probs.view(batch, heads, top_k)
    trees = TokenTree.best_first(probs, num_nodes)
    assert trees.batched and trees.parents.shape == trees.ranks.shape == (batch, num_nodes)
    assert trees.parents.dtype == trees.ranks.dtype == torch.int32
    for b in range(batch):
        check_best(TokenTree(trees.parents[b], None, trees.max_depth, trees.ranks[b]), probs[b], num_nodes)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_best_first_when_all_scores_tie(value):
    probs = torch.full((1, 4, 10), value)
    trees = TokenTree.best_first(probs, 512)
    check_best(TokenTree(trees.parents[0], None, 4, trees.ranks[0]), probs[0], 512)


def test_best_first_prefixes_are_the_best_smaller_trees():
    probs = torch.rand(2, 4, 10, generator=torch.Generator().manual_seed(3))
    large, small = TokenTree.best_first(probs, 64), TokenTree.best_first(probs, 17)
    assert torch.equal(large.parents[:, :17], small.parents) and torch.equal(large.ranks[:, :17], small.ranks)


def test_best_first_underflow_stays_a_tree():
    probs = torch.full((1, 8, 2), 1e-20)
    tree = TokenTree.best_first(probs, 300)
    assert all(0 <= p < i for i, p in enumerate(tree.parents[0].tolist()) if i)
    assert len(set(zip(tree.parents[0].tolist(), tree.ranks[0].tolist()))) == 300


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_best_first_dtypes(dtype):
    probs = (torch.arange(1, 13).view(1, 3, 4) / 16).to(dtype)  # exact in all of them
    tree = TokenTree.best_first(probs, 20)
    assert torch.equal(tree.parents, TokenTree.best_first(probs.float(), 20).parents)


@pytest.mark.parametrize(
    "match, probs, num_nodes",
    [
        ("head_probs", torch.rand(2, 3), 2),
        ("head_probs", torch.ones(1, 2, 3, dtype=torch.int64), 2),
        ("head_probs", torch.tensor([[[0.5, 1.5]]]), 2),
        ("head_probs", torch.tensor([[[-0.5, 0.5]]]), 2),
        ("head_probs", torch.tensor([[[math.nan, 0.5]]]), 2),
        ("num_nodes", torch.rand(1, 2, 3), 0),
        ("num_nodes", torch.rand(1, 2, 3), -3),
        ("num_nodes", torch.rand(1, 2, 3), 14),
        ("num_nodes", torch.rand(1, 4, 10), 513),
        ("num_nodes", torch.rand(1, 0, 3), 2),
    ],
)
def test_best_first_bad_input(match, probs, num_nodes):
    with pytest.raises(ValueError, match=f"^{match}:"):
        TokenTree.best_first(probs, num_nodes)


def test_best_first_at_the_limits():
    assert TokenTree.best_first(torch.rand(1, 2, 3), 13).size == 13
    assert TokenTree.best_first(torch.rand(2, 0, 3), 1).parents.tolist() == [[-1], [-1]]


def all_trees(heads, top_k, num_nodes):
    """Every set of `num_nodes - 1` paths that holds all its prefixes."""
    paths = [p for n in range(1, heads + 1) for p in itertools.product(range(top_k), repeat=n)]
    for some in itertools.combinations(paths, num_nodes - 1):
        if all(len(p) == 1 or p[:-1] in some for p in some):
            yield some


def expected_tokens(paths, accuracies):
    return sum(math.prod(float(accuracies[d, r]) for d, r in enumerate(p)) for p in paths)


def paths_of(tree):
    paths = [()]
    for parent, rank in list(zip(tree.parents.tolist(), tree.ranks.tolist()))[1:]:
        paths.append(paths[parent] + (rank,))
    return paths[1:]


@pytest.mark.parametrize("heads, top_k, num_nodes", [(1, 4, 3), (2, 2, 4), (2, 3, 5), (3, 2, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_search_is_optimal(heads, top_k, num_nodes, seed):
    accuracies = torch.rand(heads, top_k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tree = TokenTree.search(accuracies, num_nodes)
    best = max(expected_tokens(paths, accuracies) for paths in all_trees(heads, top_k, num_nodes))
    assert expected_tokens(paths_of(tree), accuracies) == pytest.approx(best)
    check_fields(tree, tree.parents.tolist())  # max_depth too: exact, not a bound


def medusa_greedy(accuracies, count):
    """Medusa's own search: again and again add the best of the new tree's next siblings and first children."""

    def score(path):
        return math.prod(float(accuracies[d, r]) for d, r in enumerate(path))

    chosen, frontier = [], [(0,)]
    while len(chosen) < count:
        best = max(frontier, key=score)
        frontier.remove(best)
        chosen.append(best)
        if best[-1] + 1 < accuracies.shape[1]:
            frontier.append(best[:-1] + (best[-1] + 1,))
        if len(best) < accuracies.shape[0]:
            frontier.append(best + (0,))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_search_is_medusas_greedy(seed):
    accuracies = torch.rand(4, 10, generator=torch.Generator().manual_seed(seed)).sort(dim=1, descending=True).values
    assert paths_of(TokenTree.search(accuracies, 64)) == medusa_greedy(accuracies, 63)


def test_search_bad_input():
    with pytest.raises(ValueError, match=r"^head_accuracies:"):
        TokenTree.search(torch.rand(1, 4, 10), 8)


# ---- candidates, with_num_nodes, to ----


@settings(max_examples=40, deadline=None)
@given(choice_lists(), st.integers(1, 3), st.integers(10, 12))
def test_candidates(choices, batch, top_k):
    tree = TokenTree.from_choices(choices)
    generator = torch.Generator().manual_seed(0)
    roots = torch.randint(1000, (batch,), generator=generator)
    topk = torch.randint(1000, (batch, tree.max_depth + 1, top_k), generator=generator)
    got = tree.candidates(roots, topk)
    nodes = sorted(map(tuple, choices), key=lambda p: (len(p), p))
    want = [[int(roots[b])] + [int(topk[b, len(p) - 1, p[-1]]) for p in nodes] for b in range(batch)]
    assert got.tolist() == want and got.dtype == torch.int64


def test_candidates_with_a_tree_a_request():
    probs = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1))
    trees = TokenTree.best_first(probs, 30)
    topk = torch.arange(60).view(3, 4, 5)
    got = trees.candidates(torch.tensor([100, 200, 300]), topk)
    for b in range(3):
        tree = TokenTree(trees.parents[b], None, 4, trees.ranks[b])
        assert got[b].tolist() == [100 * (b + 1)] + [int(topk[b, len(p) - 1, p[-1]]) for p in paths_of(tree)]


def test_candidates_ignores_the_ranks_of_padding():
    parents = torch.tensor([[-1, 0, 0, 0, 0, 0], [-1, 0, 1, 0, 0, 0]], dtype=torch.int32)
    tree = TokenTree.from_parents(parents, torch.tensor([3, 3], dtype=torch.int32))
    topk = torch.tensor([[[5, 6], [7, 8]], [[15, 16], [17, 18]]])
    assert tree.candidates(torch.tensor([1, 2]), topk)[:, :3].tolist() == [[1, 5, 6], [2, 15, 17]]


@pytest.mark.parametrize(
    "match, roots, topk",
    [
        ("head_topk", torch.zeros(2).long(), torch.zeros(2, 1, 3).long()),
        ("head_topk", torch.zeros(2).long(), torch.zeros(2, 2, 2).long()),
        ("head_topk", torch.zeros(2).long(), torch.zeros(2, 2, 0).long()),
        ("head_topk", torch.zeros(2).long(), torch.zeros(1, 2, 3).long()),
        ("head_topk", torch.zeros(2).long(), torch.zeros(2, 6).long()),
        ("head_topk", torch.zeros(2).long(), torch.zeros(2, 2, 3).int()),
        ("head_topk", torch.zeros(2).long(), torch.zeros(2, 2, 3, device="meta").long()),
        ("root_tokens", torch.zeros(2, 1).long(), torch.zeros(2, 2, 3).long()),
        ("root_tokens", torch.zeros(2).int(), torch.zeros(2, 2, 3).long()),
        ("root_tokens", torch.zeros(2, device="meta").long(), torch.zeros(2, 2, 3).long()),
    ],
)
def test_candidates_bad_input(match, roots, topk):
    tree = TokenTree.from_choices([[0], [2], [0, 1]])
    with pytest.raises(ValueError, match=f"^{match}:"):
        tree.candidates(roots, topk)
    assert tree.candidates(torch.zeros(2).long(), torch.zeros(2, 2, 3).long()).shape == (2, 4)


def test_candidates_of_a_root_alone():
    roots = torch.tensor([4, 5])
    got = TokenTree.chain(0).candidates(roots, torch.empty(2, 0, 0).long())
    assert got.tolist() == [[4], [5]] and got.data_ptr() != roots.data_ptr()


def test_with_num_nodes():
    tree = TokenTree.from_parents(random_parents(20, 5, (3,)))
    nodes = torch.tensor([20, 7, 0], dtype=torch.int32)
    for derived in (False, True):  # before and after the tree's own fields were derived
        if derived:
            _ = tree.paths, tree._max_rank, tree.packed_mask
        cut = tree.with_num_nodes(nodes)
        assert tree.num_nodes is None and cut.num_nodes is nodes
        fresh = TokenTree.from_parents(tree.parents, nodes, max_depth=tree.max_depth)
        assert torch.equal(cut.paths, fresh.paths)
        for b, n in enumerate(nodes.tolist()):
            assert torch.equal(cut.mask[b, :n, :n], fresh.mask[b, :n, :n])
            assert torch.equal(cut.ranks[b, :n], fresh.ranks[b, :n])
    shared = TokenTree.chain(3).with_num_nodes(torch.tensor([4, 0], dtype=torch.int32))
    assert shared.num_nodes.tolist() == [4, 0] and shared.paths.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("nodes", [torch.tensor([1, 2]), torch.zeros(3).int(), torch.zeros(2, 1).int(), [1, 2]])
def test_with_num_nodes_bad_input(nodes):
    with pytest.raises((ValueError, TypeError), match=r"^num_nodes:"):
        TokenTree.from_parents(random_parents(5, 0, (2,))).with_num_nodes(nodes)


FIELDS = ("parents", "num_nodes", "depths", "ranks", "mask", "packed_mask", "paths")


def check_moved(tree, device):
    moved = tree.to(device)
    assert moved.device.type == torch.device(device).type and moved.max_depth == tree.max_depth
    for name in FIELDS:
        want, got = getattr(tree, name), getattr(moved, name)
        assert (want is None and got is None) or torch.equal(want, got.cpu()), name
    back = moved.to("cpu")
    assert back._max_rank == tree._max_rank and torch.equal(back.paths, tree.paths)


TREES = {
    "preset": lambda: TokenTree.preset("mc_sim_7b_63"),
    "root": lambda: TokenTree.chain(0),
    "batched": lambda: TokenTree.from_parents(random_parents(30, 1, (2,)), torch.tensor([30, 9], dtype=torch.int32)),
    "best_first": lambda: TokenTree.best_first(torch.rand(2, 3, 4), 20),
}


@pytest.mark.parametrize("name", TREES)
def test_to(name):
    check_moved(TREES[name](), "cpu")


def test_repr():
    assert repr(TokenTree.chain(2)) == "TokenTree(3 nodes, max_depth=2, device=cpu)"


def test_compile():
    def step(parents, num_nodes):
        tree = TokenTree.from_parents(parents, num_nodes, max_depth=3)
        return tree.packed_mask, tree.depths, tree.paths

    parents = torch.tensor([[-1, 0, 0, 1, 3], [-1, 0, 1, 0, 9]], dtype=torch.int32)
    nodes = torch.tensor([5, 4], dtype=torch.int32)
    got = torch.compile(step, backend="eager")(parents, nodes)
    assert all(torch.equal(a, b) for a, b in zip(got, step(parents, nodes)))


# ---- on the device ----


@pytest.mark.gpu
@pytest.mark.parametrize("name", TREES)
def test_to_gpu(name):
    check_moved(TREES[name](), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_gpu_equals_cpu(size):
    parents = random_parents(size, 2, (3,))
    nodes = torch.tensor([size, size // 2, 0], dtype=torch.int32)
    want = TokenTree.from_parents(parents, nodes, max_depth=min(size - 1, 20))
    got = TokenTree.from_parents(parents.cuda(), nodes.cuda(), max_depth=min(size - 1, 20))
    for name in FIELDS:
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    assert TokenTree.from_parents(parents.cuda()).max_depth == size - 1  # not known without a stall


@pytest.mark.gpu
@pytest.mark.parametrize("ties", [False, True])
def test_best_first_gpu_is_optimal(ties):
    probs = torch.rand(4, 4, 10, generator=torch.Generator().manual_seed(0))
    probs = (probs * 4).floor() / 4 if ties else probs
    trees = TokenTree.best_first(probs.cuda(), 64).to("cpu")
    for b in range(4):
        check_best(TokenTree(trees.parents[b], None, 4, trees.ranks[b]), probs[b], 64)


@pytest.mark.gpu
def test_gpu_clamps_what_is_not_sorted(monkeypatch):
    parents = torch.tensor([[5, 7, -9, 2]], device="cuda")
    monkeypatch.delenv("MEDUSA_KERNELS_DEBUG", raising=False)
    assert TokenTree.from_parents(parents).parents.tolist() == [[-1, 0, 0, 2]]
    probs = torch.tensor([[[math.nan, 3.0, -1.0]] * 2], device="cuda")
    tree = TokenTree.best_first(probs, 8).parents[0].tolist()
    assert all(0 <= p < i for i, p in enumerate(tree) if i)
    monkeypatch.setenv("MEDUSA_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"^parents:"):
        TokenTree.from_parents(parents)
    with pytest.raises(ValueError, match=r"^head_probs:"):
        TokenTree.best_first(probs, 8)


def device_step(parents, nodes, probs, roots, topk):
    """Everything that a decoder does with trees in a step."""
    trees = TokenTree.from_parents(parents, nodes, max_depth=20)
    best = TokenTree.best_first(probs, 40)
    cut = best.with_num_nodes(nodes)
    fields = [getattr(tree, name) for tree in (trees, best, cut) for name in FIELDS]
    return [x for x in fields if x is not None] + [best.candidates(roots, topk)]


def device_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    parents = random_parents(40, seed, (3,))
    nodes = torch.randint(0, 41, (3,), generator=generator, dtype=torch.int32)
    probs = torch.rand(3, 4, 10, generator=generator)
    roots = torch.randint(1000, (3,), generator=generator)
    topk = torch.randint(1000, (3, 4, 10), generator=generator)
    return parents, nodes, probs, roots, topk


@pytest.mark.gpu
def test_no_host_sync(monkeypatch):
    monkeypatch.delenv("MEDUSA_KERNELS_DEBUG", raising=False)
    inputs = [x.cuda() for x in device_inputs(0)]
    device_step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        device_step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph(monkeypatch):
    monkeypatch.delenv("MEDUSA_KERNELS_DEBUG", raising=False)
    inputs = [x.cuda() for x in device_inputs(0)]
    device_step(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = device_step(*inputs)
    for seed in (1, 2):
        for x, new in zip(inputs, device_inputs(seed)):
            x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(outputs, device_step(*inputs)):
            assert torch.equal(got, want)
