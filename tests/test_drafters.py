"""n-gram look-up against a brute force that follows its description word by word."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_kernels import TokenTree
from medusa_kernels.decoding import DraftState, NgramDrafter, NoDrafter


def make_state(texts, finished=None) -> DraftState:
    root = torch.tensor([text[-1] for text in texts])
    return DraftState(root, torch.zeros(len(texts), 4), root.int() * 0, texts, finished or [False] * len(texts))


def brute_force(text, num_nodes, max_depth, max_ngram, min_ngram) -> list[tuple[int, ...]]:
    """Paths of the tree's nodes, in order."""
    matches = []
    for start in range(1, len(text)):
        n = 0
        while n < max_ngram and n < start and text[start - 1 - n] == text[len(text) - 1 - n]:
            n += 1
        if n >= min_ngram:
            matches.append((-n, -start))
    paths: list[tuple[int, ...]] = []
    for _, start in sorted(matches):
        follow = text[-start:][:max_depth]
        for depth in range(1, len(follow) + 1):
            if tuple(follow[:depth]) not in paths:
                paths.append(tuple(follow[:depth]))
    return paths[: num_nodes - 1]


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents):
        paths.append((*paths[parent], token))
    return paths[1:]


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    num_nodes=st.integers(2, 20),
    max_depth=st.integers(1, 6),
    ngrams=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
)
def test_ngram_equals_brute_force(text, num_nodes, max_depth, ngrams):
    drafter = NgramDrafter(num_nodes, max_depth, min_ngram=ngrams[0], max_ngram=ngrams[1])
    got = paths_of(*drafter.propose(text))
    assert got == brute_force(text, num_nodes, drafter.max_depth, ngrams[1], ngrams[0])
    assert len(set(got)) == len(got)


def test_continuations_become_one_tree():
    # The text ends in 1, 2. Latest first: after 1, 2 came 3, 9 and before that 3, 4; after a lone 2 came 8.
    text = [1, 2, 3, 4, 1, 2, 3, 9, 7, 2, 8, 1, 2]
    tokens, parents = NgramDrafter(num_nodes=8, max_depth=2).propose(text)
    assert paths_of(tokens, parents) == [(3,), (3, 9), (3, 4), (8,), (8, 1)]


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 16])
def test_ngram_batch_is_padded(num_nodes):
    drafter = NgramDrafter(num_nodes=num_nodes, max_depth=3)
    texts = [[1, 2, 1, 2, 1], [5], [4, 4, 4, 4], [4, 4, 4, 4]]
    tokens, tree = drafter.draft(make_state(texts, [False, False, False, True]))
    assert tokens.shape == tree.parents.shape == (4, num_nodes) and tokens.dtype == torch.int64
    assert tokens[:, 0].tolist() == [1, 5, 4, 4]
    assert tree.max_depth == drafter.max_depth == min(3, num_nodes - 1)
    nodes = tree.num_nodes.tolist()
    assert nodes == [min(num_nodes, 4), 1, min(num_nodes, 4), 1]
    assert tokens[0, 1 : nodes[0]].tolist() == ([2, 1, 2] if num_nodes > 2 else [2])[: nodes[0] - 1]
    # TokenTree.from_parents takes what is drafted, so parents are sorted; depths stay within the bound.
    for b in range(4):
        assert int(tree.depths[b, : nodes[b]].max()) <= drafter.max_depth


def test_text_is_read_up_to_its_end():
    tokens, parents = NgramDrafter(num_nodes=16, max_depth=8).propose([6, 6])
    assert (tokens, parents) == ([6], [0])
    assert NgramDrafter().propose([6]) == ([], [])
    assert NgramDrafter().propose([1, 2, 3]) == ([], [])


def test_min_ngram_ignores_short_matches():
    text = [1, 2, 9, 2]
    assert NgramDrafter(min_ngram=2).propose(text) == ([], [])
    assert NgramDrafter(min_ngram=1).propose(text)[0] == [9, 2]


def test_no_drafter():
    tokens, tree = NoDrafter().draft(make_state([[1, 2], [3]]))
    assert tokens.tolist() == [[2], [3]] and isinstance(tree, TokenTree) and tree.size == 1


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"num_nodes": 0}, "num_nodes"),
        ({"num_nodes": 513}, "num_nodes"),
        ({"max_depth": 0}, "max_depth"),
        ({"min_ngram": 0}, "min_ngram"),
        ({"min_ngram": 5, "max_ngram": 4}, "min_ngram"),
    ],
)
def test_bad_input(arguments, name):
    with pytest.raises(ValueError, match=name):
        NgramDrafter(**arguments)
