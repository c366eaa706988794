"""Drafting with Medusa heads: from the hidden state that decided the root, a tree of each head's likeliest tokens."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._checks import check_tensor
from ..tree import MAX_NODES, TokenTree
from .cpu import linear
from .drafters import DraftState
from .gpu import topk
from .heads import WEIGHTS_NAME, MedusaHeads, SequentialHeads
from .models import SMOLLM2

TREE_NAME = "tree.json"


class MedusaDrafter:
    """The same tree each step, its nodes filled with the heads' top-k by rank.

    heads:  in the model's dtype and on its device
    tree:   one for all requests, no deeper than there are heads; with ranks, as `TokenTree.from_choices`, `preset`
            and `search` give them

    Source: Medusa section 2.1.2 (arXiv 2401.10774).
    """

    on_device = True

    def __init__(self, heads: MedusaHeads, tree: TokenTree):
        if heads.sequential:
            raise TypeError("heads: SequentialDrafter takes sequential heads")
        _check_tree(heads, tree)
        self.heads = heads
        self.top_k = int(tree.ranks.max()) + 1
        self.tree = tree.to(heads.weight.device)
        self.num_nodes, self.max_depth = tree.size, tree.max_depth
        # As `TokenTree.candidates`, with the nodes' places looked up once.
        self.head, self.rank = self.tree.depths[1:].long() - 1, self.tree.ranks[1:].long()

    def draft(self, state: DraftState) -> tuple[Tensor, TokenTree]:
        check_tensor("state.hidden", state.hidden, shape=(None, self.heads.hidden_size), dtype=self.heads.weight.dtype)
        root = state.root.unsqueeze(1)
        if self.num_nodes == 1:
            return root, self.tree
        tokens = topk(self.heads(state.hidden, state.root.unsqueeze(0)), self.top_k)[1]  # [heads, B, k]
        return torch.cat([root, tokens[self.head, :, self.rank].T], 1), self.tree


class DynamicMedusaDrafter:
    """A tree of its own for each request and step: the likeliest paths by the heads' probabilities at that step.

    heads:      in the model's dtype and on its device
    num_nodes:  of every tree, root included
    top_k:      tokens of each head to choose from
    """

    on_device = True

    def __init__(self, heads: MedusaHeads, num_nodes: int = 64, top_k: int = 10):
        if heads.sequential:
            raise TypeError("heads: DynamicSequentialDrafter takes sequential heads")
        if not 1 <= top_k <= heads.vocab_size:
            raise ValueError(f"top_k: expected 1..{heads.vocab_size}, the vocabulary, got {top_k}")
        probs = heads.weight.new_zeros(1, heads.num_heads, top_k)
        self.max_depth = TokenTree.best_first(probs, num_nodes).max_depth  # raises for what cannot be built
        self.heads, self.num_nodes, self.top_k = heads, num_nodes, top_k

    def draft(self, state: DraftState) -> tuple[Tensor, TokenTree]:
        check_tensor("state.hidden", state.hidden, shape=(None, self.heads.hidden_size), dtype=self.heads.weight.dtype)
        tokens, probs = self.heads.topk(state.hidden, self.top_k, state.root.unsqueeze(0))
        tree = TokenTree.best_first(probs.clamp(max=1.0), self.num_nodes)  # rounding may leave 1 + eps
        return tree.candidates(state.root, tokens), tree


class SequentialDrafter:
    """The same tree each step, drafted level by level: a node's children are its own head's likeliest tokens.

    heads, tree: as for `MedusaDrafter`
    """

    on_device = True

    def __init__(self, heads: SequentialHeads, tree: TokenTree):
        if not heads.sequential:
            raise TypeError("heads: MedusaDrafter takes heads that are not sequential")
        _check_tree(heads, tree)
        self.heads, device = heads, heads.weight.device
        self.tree = tree.to(device)
        self.num_nodes, self.max_depth = tree.size, tree.max_depth
        parents, ranks, depths = tree.parents.tolist(), tree.ranks.tolist(), tree.depths.tolist()
        # Of each level: nodes with children, by their place among the level's nodes; and the next level's nodes, each
        # by the place of its parent among the former, and its rank.
        self.levels = []
        for depth in range(tree.max_depth):
            nodes, below = ([n for n in range(tree.size) if depths[n] == d] for d in (depth, depth + 1))
            inner = [n for n in nodes if n in parents]
            top_k = max(ranks[n] for n in below) + 1
            places = (
                [nodes.index(n) for n in inner],
                [inner.index(parents[n]) for n in below],
                [ranks[n] for n in below],
            )
            self.levels.append((top_k, *(torch.tensor(place, device=device) for place in places)))
        order = sorted(range(tree.size), key=lambda n: (depths[n], n))  # as `draft` meets the nodes
        self.place = torch.tensor([order.index(n) for n in range(tree.size)], device=device)

    def draft(self, state: DraftState) -> tuple[Tensor, TokenTree]:
        check_tensor("state.hidden", state.hidden, shape=(None, self.heads.hidden_size), dtype=self.heads.weight.dtype)
        tokens, states = state.root.unsqueeze(1), state.hidden.unsqueeze(1)  # of the level's nodes, states above them
        drafted = [tokens]
        for head, (top_k, inner, parent, rank) in enumerate(self.levels):
            states = self.heads.step(head, states[:, inner], tokens[:, inner])
            best = topk(linear(states, self.heads.projection(head)), top_k)[1]
            tokens, states = best[:, parent, rank], states[:, parent]
            drafted.append(tokens)
        return torch.cat(drafted, 1)[:, self.place], self.tree


class DynamicSequentialDrafter:
    """A tree of its own for each request and step: the likeliest paths by the product of the heads' probabilities.

    heads:      in the model's dtype and on its device
    num_nodes:  of every tree, root included
    top_k:      children drafted for a node
    width:      nodes of a level that get children, its likeliest

    Source: EAGLE-2 (arXiv 2406.16858): the likeliest nodes of a level are expanded, then the likeliest of all are kept.
    """

    on_device = True

    def __init__(self, heads: SequentialHeads, num_nodes: int = 64, top_k: int = 10, width: int = 8):
        if not heads.sequential:
            raise TypeError("heads: DynamicMedusaDrafter takes heads that are not sequential")
        if not 1 <= top_k <= heads.vocab_size:
            raise ValueError(f"top_k: expected 1..{heads.vocab_size}, the vocabulary, got {top_k}")
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        expanded = [1]
        for _ in range(heads.num_heads - 1):
            expanded.append(min(width, expanded[-1] * top_k))
        most = min(1 + top_k * sum(expanded), MAX_NODES)
        if not 2 <= num_nodes <= most:
            raise ValueError(f"num_nodes: expected 2..{most}, got {num_nodes}")
        self.heads, self.num_nodes, self.top_k, self.width = heads, num_nodes, top_k, width
        self.max_depth = min(heads.num_heads, num_nodes - 1)

    def draft(self, state: DraftState) -> tuple[Tensor, TokenTree]:
        check_tensor("state.hidden", state.hidden, shape=(None, self.heads.hidden_size), dtype=self.heads.weight.dtype)
        tokens, states = state.root.unsqueeze(1), state.hidden.unsqueeze(1)  # of the nodes to expand, states above them
        scores = torch.zeros_like(tokens, dtype=torch.float32)  # log-probability of the path to each
        places = torch.full_like(tokens, -1)  # of each among all drafted nodes; the root is none of them
        drafted: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, scores and the parents' places, level by level
        count = 0
        for head in range(self.max_depth):
            states = self.heads.step(head, states, tokens)
            logits = linear(states, self.heads.projection(head))
            best, children = topk(logits, self.top_k)
            log_p = best.float() - logits.float().logsumexp(-1, keepdim=True)
            # No child is likelier than its parent: rounding may leave more than 0.
            below = (scores.unsqueeze(-1) + log_p.clamp(max=0.0)).flatten(1)
            drafted.append((children.flatten(1), below, places.repeat_interleave(self.top_k, 1)))
            if head + 1 == self.max_depth:
                break
            scores, chosen = below.topk(min(self.width, below.shape[1]))
            tokens = children.flatten(1).gather(1, chosen)
            states = states.gather(1, (chosen // self.top_k).unsqueeze(-1).expand(-1, -1, states.shape[2]))
            places = count + chosen
            count += below.shape[1]
        every_token, every_score, every_parent = (torch.cat(each, 1) for each in zip(*drafted))
        # Parents come before their children, and a stable sort keeps that among equal scores: what is kept is a tree.
        order = every_score.argsort(dim=1, descending=True, stable=True)
        kept = order[:, : self.num_nodes - 1].sort(dim=1).values
        parents = every_parent.gather(1, kept)
        parents = torch.where(parents < 0, 0, torch.searchsorted(kept, parents) + 1)
        parents = torch.cat([torch.full_like(parents[:, :1], -1), parents], 1)
        tree = TokenTree.from_parents(parents, None, self.max_depth)
        return torch.cat([state.root.unsqueeze(1), every_token.gather(1, kept)], 1), tree


def load_drafter(
    folder: str | Path, model: PreTrainedModel, num_nodes: int | None = None
) -> "MedusaDrafter | SequentialDrafter":
    """The drafter of the heads in `folder` and the tree that `medusa_kernels.training search` saved beside them, or its
    best `num_nodes` nodes."""
    heads = MedusaHeads.from_pretrained(folder, model)
    tree = load_tree(folder, num_nodes)
    return SequentialDrafter(heads, tree) if isinstance(heads, SequentialHeads) else MedusaDrafter(heads, tree)


def shipped_heads(name_or_path: str) -> Path | None:
    """The folder of the heads that this package brings for a model, named as for `load_model`; None if it has none."""
    folder = Path(__file__).parent / "smollm2_medusa"
    return folder if name_or_path == SMOLLM2 and (folder / WEIGHTS_NAME).is_file() else None


def _check_tree(heads: MedusaHeads, tree: TokenTree) -> None:
    if tree.batched or tree.num_nodes is not None:
        raise ValueError(f"tree: expected one tree for all requests, got {tree}")
    if tree.max_depth > heads.num_heads:
        raise ValueError(f"tree: expected a depth of at most {heads.num_heads}, as many as heads, got {tree}")
    if (rank := int(tree.ranks.max())) >= heads.vocab_size:
        raise ValueError(f"tree: expected ranks below {heads.vocab_size}, the vocabulary, got {rank}")


def load_tree(folder: str | Path, num_nodes: int | None = None) -> TokenTree:
    """The tree in `tree.json`, on the CPU; ValueError, naming the file, for one that cannot be read.

    num_nodes:  take the root and the first `num_nodes - 1` paths, which `search` writes best first; None: all
    """
    if num_nodes is not None and num_nodes < 1:
        raise ValueError(f"num_nodes: expected at least 1, got {num_nodes}")
    path = Path(folder) / TREE_NAME
    try:
        choices: Any = json.loads(path.read_text(encoding="utf-8"))["choices"]
        tree = TokenTree.from_choices(choices)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; python -m medusa_kernels.training search writes it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected an object with a list of paths under `choices`: {error!r}") from None
    if num_nodes is None or num_nodes >= tree.size:
        return tree
    if num_nodes == 1:
        return TokenTree.chain(0)
    try:
        return TokenTree.from_choices(choices[: num_nodes - 1])
    except ValueError as error:
        raise ValueError(f"num_nodes: the first {num_nodes - 1} paths of {path} are no tree: {error}") from None
