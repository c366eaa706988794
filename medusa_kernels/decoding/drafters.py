"""Where draft tokens come from: one small protocol, a drafter that proposes nothing, and n-gram look-up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..tree import MAX_NODES, TokenTree


@dataclass
class DraftState:
    """What a drafter may look at before a step. Tensors are on the model's device and keep their addresses.

    root:           [B] int64, the token already decided, not yet in the cache: node 0 of the next tree
    hidden:         [B, hidden], the model's last hidden state at the node that predicted `root`
    cache_seqlens:  [B] int32, committed tokens
    texts:          host: each request's prompt and text so far, `root` included. For a drafter on the host alone: one
                    on the device runs before the host has seen the step before
    finished:       host: requests that are done, likewise
    """

    root: Tensor
    hidden: Tensor
    cache_seqlens: Tensor
    texts: list[list[int]]
    finished: list[bool]


class Drafter(Protocol):
    """Proposes a tree of draft tokens for every request of a batch.

    num_nodes:  `T` of every tree it returns, root included: a captured step has one shape
    max_depth:  a bound on the depth of its trees
    on_device:  False: `draft` reads `texts` and returns tensors on the CPU. True: it reads the tensors alone, returns
                tensors on the model's device and never reads them back, so that it can be captured with the step
    """

    num_nodes: int
    max_depth: int
    on_device: bool

    def draft(self, state: DraftState) -> tuple[Tensor, TokenTree]:
        """tokens [B, T] int64, `state.root` in column 0 and valid tokens elsewhere, and the tree or trees that they
        form; `num_nodes` of the tree where a request has fewer."""
        ...


class NoDrafter:
    """Proposes nothing, so that the decoder does plain decoding, one token a step."""

    num_nodes, max_depth, on_device = 1, 0, True

    def __init__(self) -> None:
        self._trees: dict[torch.device, TokenTree] = {}

    def draft(self, state: DraftState) -> tuple[Tensor, TokenTree]:
        device = state.root.device
        if device not in self._trees:
            self._trees[device] = TokenTree.chain(0, device)
        return state.root.unsqueeze(1), self._trees[device]


class NgramDrafter:
    """Looks the last tokens up in the prompt and the text so far, and proposes what followed them there.

    num_nodes:   nodes of a tree, root included
    max_depth:   longest continuation
    max_ngram:   a longer match than this counts as one of this length
    min_ngram:   shortest match that is used

    Continuations of the longest match come first, of equal ones the latest; equal beginnings are merged, so that
    several continuations form one tree.
    Source: prompt look-up decoding (github.com/apoorvumang/prompt-lookup-decoding), which proposes one continuation.
    """

    on_device = False

    def __init__(self, num_nodes: int = 16, max_depth: int = 8, *, max_ngram: int = 4, min_ngram: int = 1):
        if not 1 <= num_nodes <= MAX_NODES:
            raise ValueError(f"num_nodes: expected 1..{MAX_NODES}, got {num_nodes}")
        if max_depth < 1:
            raise ValueError(f"max_depth: expected at least 1, got {max_depth}")
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram: expected 1..max_ngram = {max_ngram}, got {min_ngram}")
        self.num_nodes, self.max_depth = num_nodes, min(max_depth, num_nodes - 1)
        self.max_ngram, self.min_ngram = max_ngram, min_ngram

    def draft(self, state: DraftState) -> tuple[Tensor, TokenTree]:
        batch = len(state.texts)
        tokens = np.zeros((batch, self.num_nodes), dtype=np.int64)
        parents = np.zeros((batch, self.num_nodes), dtype=np.int32)
        parents[:, 0] = -1
        num_nodes = np.ones(batch, dtype=np.int32)
        for b, (text, finished) in enumerate(zip(state.texts, state.finished)):
            tokens[b, 0] = text[-1]
            if not finished:
                draft, above = self.propose(text)
                num_nodes[b] = 1 + len(draft)
                tokens[b, 1 : num_nodes[b]], parents[b, 1 : num_nodes[b]] = draft, above
        tree = TokenTree.from_parents(torch.from_numpy(parents), torch.from_numpy(num_nodes), self.max_depth)
        return torch.from_numpy(tokens), tree

    def propose(self, text: Sequence[int]) -> tuple[list[int], list[int]]:
        """Draft tokens of nodes 1, 2, ... for one text, and each one's parent node."""
        tokens: list[int] = []
        parents: list[int] = []
        child: dict[tuple[int, int], int] = {}  # (node, token) -> node
        for start in self._continuations(text):
            node = 0
            for token in text[start : start + self.max_depth]:
                if (node, token) not in child:
                    if len(tokens) + 1 >= self.num_nodes:
                        return tokens, parents
                    tokens.append(token)
                    parents.append(node)
                    child[node, token] = len(tokens)
                node = child[node, token]
        return tokens, parents

    def _continuations(self, text: Sequence[int]) -> list[int]:
        """Places just after an earlier occurrence of the text's last tokens, best first."""
        array = np.asarray(text)
        starts = np.flatnonzero(array[:-1] == array[-1]) + 1
        length = np.ones_like(starts)
        for n in range(2, min(self.max_ngram, len(text) - 1) + 1):
            longer = (length == n - 1) & (starts >= n)
            longer[longer] = array[starts[longer] - n] == array[-n]
            length += longer
        starts, length = starts[length >= self.min_ngram], length[length >= self.min_ngram]
        return starts[np.lexsort((-starts, -length))].tolist()
