"""Head accuracies on held-out answers, and the sparse tree with the most tokens a step by them."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..decoding import load_model
from ..decoding.heads import MedusaHeads
from ..decoding.medusa import TREE_NAME
from ..tree import TokenTree
from .config import SearchConfig
from .data import Answers
from .medusa1 import last_hidden


@torch.inference_mode()
def head_ranks(
    model: PreTrainedModel, heads: MedusaHeads, answers: Answers, indices: np.ndarray, top_k: int, batch_size: int
) -> Tensor:
    """[positions, heads] int64: the rank of the right token among each head's `top_k`, `top_k` where it is not there,
    -1 where the answer has ended. Sequential heads see the right tokens before it: where they do not, its rank does not
    count either."""
    found = []
    batches = answers.batches(indices, batch_size, seed=0, epoch=0)
    for batch_indices in tqdm(batches, unit="batch", desc="measuring heads"):
        batch = answers.batch(batch_indices, heads.num_heads).to(model.device)
        hidden = last_hidden(model, batch.ids, batch.at)
        for x, labels in zip(hidden.split(1024), batch.labels.split(1024, dim=1)):
            tokens, _ = heads.topk(x, top_k, labels[:-1].clamp(min=0))
            right = labels[1:].T
            hit = tokens == right.unsqueeze(-1)
            rank = torch.where(hit.any(-1), hit.int().argmax(-1), top_k)
            found.append(torch.where(right >= 0, rank, -1).cpu())
    return torch.cat(found)


def head_accuracies(ranks: Tensor, top_k: int) -> Tensor:
    """[heads, top_k] float64: how often the rank-k token of each head was right."""
    counts = torch.stack([(ranks == k).sum(0) for k in range(top_k)], dim=1).double()
    return counts / (ranks >= 0).sum(0).clamp(min=1).unsqueeze(1)


def path_counts(ranks: Tensor, top_k: int) -> Counter[tuple[int, ...]]:
    """How often all tokens of a path were right at once, for each path that ever was."""
    counts: Counter[tuple[int, ...]] = Counter()
    for row in ranks.tolist():
        path: tuple[int, ...] = ()
        for rank in row:
            if not 0 <= rank < top_k:
                break
            path = (*path, rank)
            counts[path] += 1
    return counts


def best_first(paths: Iterable[tuple[int, ...]], counts: Counter[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The most frequent path first: a path is never more frequent than its prefix, so that any first part of the list
    is a tree."""
    return sorted(paths, key=lambda path: (-counts[path], len(path), path))


def joint_search(ranks: Tensor, top_k: int, num_nodes: int) -> TokenTree:
    """The tree of the `num_nodes - 1` paths whose tokens were most often all right at once.

    A path's share of positions is how much it adds to the tokens of a greedy step, and never more than its prefix's:
    the most frequent paths are a tree, and the best one for these positions, with no assumption of independence.
    """
    counts = path_counts(ranks, top_k)
    best = best_first(counts, counts)[: num_nodes - 1]
    if len(best) < num_nodes - 1:
        raise ValueError(f"num_nodes: only {len(best)} paths were ever right, so at most {len(best) + 1}")
    return TokenTree.from_choices(best)


def tree_choices(tree: TokenTree) -> list[list[int]]:
    """Medusa's list of paths, from which `TokenTree.from_choices` builds the tree again."""
    paths: list[list[int]] = [[]]
    for parent, rank in zip(tree.parents.tolist()[1:], tree.ranks.tolist()[1:]):
        paths.append([*paths[parent], rank])
    return sorted(paths[1:], key=lambda path: (len(path), path))


def tokens_per_step(ranks: Tensor, tree: TokenTree) -> float:
    """What a greedy step gains at these positions, on average, if they are as likely to be a root as any other."""
    choices = {tuple(path) for path in tree_choices(tree)}
    total = 0
    for row in ranks.tolist():
        depth = 0
        while depth < len(row) and tuple(row[: depth + 1]) in choices:
            depth += 1
        total += depth + 1
    return total / len(ranks)


def search(config: SearchConfig) -> dict[str, Any]:
    """Measure, search and write `tree.json` beside the heads; returns what it holds.

    The tree is chosen on half of the held-out sequences and its tokens a step are measured on the other half.
    """
    model, _ = load_model(config.model, dtype=config.torch_dtype, device=config.device)
    heads = MedusaHeads.from_pretrained(config.heads, model)
    if config.top_k > heads.vocab_size:
        raise ValueError(f"top_k: expected at most {heads.vocab_size}, the vocabulary, got {config.top_k}")
    answers = Answers.read(config.data, config.max_length, heads.vocab_size)
    _, held = answers.split(config.holdout, config.split_seed)
    if len(held) < 2:
        raise ValueError(f"holdout: expected at least 2 sequences, got {len(held)}")
    order = np.random.default_rng(config.split_seed).permutation(held)
    chosen_on, measured_on = (
        head_ranks(model, heads, answers, half, config.top_k, config.batch_size) for half in np.array_split(order, 2)
    )
    accuracies = head_accuracies(chosen_on, config.top_k)
    trees = {"independent": TokenTree.search(accuracies, config.num_nodes)}
    if config.method == "joint":
        trees["joint"] = joint_search(chosen_on, config.top_k, config.num_nodes)
    # In an order that allows a smaller tree to be cut from it (`load_tree`).
    choices = best_first(map(tuple, tree_choices(trees[config.method])), path_counts(chosen_on, config.top_k))
    sizes = [size for size in (2, 4, 8, 16, 32, 64, 128, 256) if size <= config.num_nodes]
    result = {
        "method": config.method,
        "num_nodes": config.num_nodes,
        "choices": choices,
        "tokens_per_step_by_num_nodes": {
            size: tokens_per_step(measured_on, TokenTree.from_choices(choices[: size - 1])) for size in sizes
        },
        "tokens_per_step": {name: tokens_per_step(measured_on, tree) for name, tree in trees.items()},
        "head_accuracies": head_accuracies(measured_on, config.top_k).tolist(),
        "positions": len(measured_on),
    }
    path = Path(config.heads) / TREE_NAME
    part = path.with_name(f"{TREE_NAME}.part")
    part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    os.replace(part, path)
    return result
