"""FasterDecoding/Medusa's `medusa/model/utils.py` on this package's operators: its own loop runs with this import.

    from medusa_kernels.compat.medusa import *  # instead of: from .utils import *

Signatures, shapes and keys are Medusa's; the batch is one request, as there. What differs, on purpose:

- The default thresholds are the paper's (threshold 0.09, alpha 0.3); Medusa's defaults have the two swapped.
- Past the end of a path a candidate is -1, which is never accepted, instead of token 0.
- Ranks of 10 and more are read from their own head's top-k, not from the next head's.
- `fast=False` works. It draws one token a tree node, where Medusa draws one for each path through the node.

With `fast=False` a rejected draw is drawn again, by the next `generate_candidates`, as Medusa does; for text that is
distributed exactly as plain sampling use `accept_candidates(..., mode="sampling")` itself and its `next_token`.
Paths times their length may not pass 512 (Medusa's nine trees: at most 225).
Source: FasterDecoding/Medusa, Apache License 2.0.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._checks import check_tensor
from ..acceptance import accept_candidates
from ..kv_cache import compact_kv_cache
from ..tree import MAX_NODES, TokenTree

__all__ = [
    "evaluate_posterior",
    "generate_candidates",
    "generate_medusa_buffers",
    "initialize_medusa",
    "reset_medusa_mode",
    "reset_past_key_values",
    "tree_decoding",
    "update_inference_inputs",
]

_TOP_K = 10  # Medusa's: the stride of `tree_indices` unless a rank needs more
_trees = WeakTensorKeyDictionary()  # tree_indices -> its tree and top-k, as the loop hands on the tensors alone


def generate_medusa_buffers(medusa_choices, device="cuda"):
    """The buffers of a tree of choices, T nodes with the root, P paths.

    Returns a dict: `medusa_attn_mask` [1, 1, T, T] float, 1 where the row attends to the column; `tree_indices` [T]
    int64, places in [root, head 0's top-k, head 1's, ...]; `medusa_position_ids` [T] int64, depths;
    `retrieve_indices` [P, max_depth + 1] int64, root-to-leaf paths, longest first, -1 padded.
    Raises ValueError for choices that are no tree.
    """
    tree = TokenTree.from_choices(medusa_choices)
    depths, ranks = tree.depths.long(), tree.ranks.long()
    top_k = int(ranks.max()) + 1
    stride = max(_TOP_K, top_k)
    tree_indices = torch.where(depths > 0, 1 + stride * (depths - 1) + ranks, 0).to(device)
    _trees[tree_indices] = tree.to(device), top_k
    return {
        "medusa_attn_mask": tree.mask.float()[None, None].to(device),
        "tree_indices": tree_indices,
        "medusa_position_ids": depths.to(device),
        "retrieve_indices": tree.paths.flip(0).long().to(device),  # Medusa starts from the last leaf
    }


def _tree_of(tree_indices, retrieve_indices) -> tuple[TokenTree, int]:
    """The tree behind Medusa's buffers, and the top-k that it needs; read from them once if they are copies."""
    if tree_indices not in _trees:
        rows, places = retrieve_indices.tolist(), tree_indices.tolist()
        parents, depths = [-1] * len(places), [0] * len(places)
        for row in rows:
            for depth, (parent, node) in enumerate(itertools.pairwise(row), start=1):
                if node >= 0:
                    parents[node], depths[node] = parent, depth
        # A rank below 10 cannot reach the last place of its head; of a larger stride the largest rank does.
        stride = max([_TOP_K] + [-(-place // depth) for place, depth in zip(places, depths) if depth])
        ranks = [place - 1 - stride * (depth - 1) if depth else 0 for place, depth in zip(places, depths)]
        tree = TokenTree.from_parents(torch.tensor(parents))
        tree.ranks = torch.tensor(ranks, dtype=torch.int32)
        _trees[tree_indices] = tree.to(tree_indices.device), max(ranks) + 1
    return _trees[tree_indices]


def initialize_medusa(input_ids, model, medusa_attn_mask, past_key_values):
    """Prefill. Returns the heads' logits [heads, 1, L, V] and the model's [1, L, V]; sets the model's tree mask."""
    medusa_logits, _, logits = model(input_ids, past_key_values=past_key_values, output_orig=True, medusa_forward=True)
    model.base_model.model.medusa_mask = medusa_attn_mask
    return medusa_logits, logits


def reset_medusa_mode(model):
    """Take the tree mask off the model."""
    model.base_model.model.medusa_mask = None
    model.base_model.model.medusa_mode = None


def reset_past_key_values(passed_key_values):
    """Set the length of every cache to 0, in place, and return them."""
    for layer in passed_key_values:
        for cache in layer:
            cache.current_length.fill_(0)
    return passed_key_values


def generate_candidates(
    medusa_logits,
    logits,
    tree_indices,
    retrieve_indices,
    temperature=0,
    posterior_threshold=0.09,
    posterior_alpha=0.3,
    top_p=0.8,
    sampling="typical",
    fast=False,
):
    """The tree's tokens: the root from the model's logits, the rest from the heads' top-k.

    medusa_logits:  [heads, 1, L, V];  logits: [1, L, V]; the last position of each is used
    tree_indices, retrieve_indices:  as `generate_medusa_buffers` gives them
    temperature, fast:  0 or True: the root is the argmax; else drawn, from the tokens that pass the typical test, or
                        with `sampling="nucleus"` from the top-p ones (random numbers follow `torch.manual_seed`)

    Returns candidates [P, max_depth + 1] int64, one path a row, -1 padded, and tree_candidates [1, T] int64.
    """
    _check_sampling(sampling)
    check_tensor("logits", logits, shape=(1, None, None))
    check_tensor("medusa_logits", medusa_logits, shape=(None, 1, None, logits.shape[-1]), device=logits.device)
    tree, top_k = _tree_of(tree_indices, retrieve_indices)
    if medusa_logits.shape[0] < tree.max_depth or logits.shape[-1] < top_k:
        raise ValueError(
            f"medusa_logits: the tree needs {tree.max_depth} heads and {top_k} tokens, got {tuple(medusa_logits.shape)}"
        )
    last = logits[:, -1:]
    root = TokenTree.chain(0, logits.device)
    some_token = tree_indices.new_zeros(1, 1)  # the operator emits a root and the token after it: the latter is wanted
    if temperature == 0 or fast:
        drawn = accept_candidates(last, some_token, root, mode="greedy")
    elif sampling == "typical":
        drawn = accept_candidates(
            last, some_token, root, mode="typical", temperature=temperature, posterior_threshold=posterior_threshold,
            posterior_alpha=posterior_alpha, seed=_draw_seed(),
        )  # fmt: skip
    else:
        drawn = accept_candidates(
            last, some_token, root, mode="sampling", temperature=temperature, top_p=top_p, seed=_draw_seed()
        )
    head_topk = medusa_logits[:, 0, -1].topk(top_k, dim=-1).indices.unsqueeze(0)
    tree_candidates = tree.candidates(drawn.next_token, head_topk)
    padded = torch.cat([tree_candidates[0], tree_candidates.new_full((1,), -1)])
    return padded[retrieve_indices], tree_candidates


def tree_decoding(model, tree_candidates, past_key_values, medusa_position_ids, input_ids, retrieve_indices):
    """Run the model on the tree. Returns the heads' logits [heads, P, max_depth + 1, V], the model's
    [P, max_depth + 1, V], both path by path (past a path's end: anything), and the model's outputs."""
    tree_medusa_logits, outputs, tree_logits = model(
        tree_candidates,
        output_orig=True,
        past_key_values=past_key_values,
        position_ids=medusa_position_ids + input_ids.shape[1],
        medusa_forward=True,
    )
    return tree_medusa_logits[:, 0, retrieve_indices], tree_logits[0, retrieve_indices], outputs


def evaluate_posterior(
    logits,
    candidates,
    temperature,
    posterior_threshold=0.09,
    posterior_alpha=0.3,
    top_p=0.8,
    sampling="typical",
    fast=True,
):
    """Which path is accepted, and how far.

    logits:      [P, max_depth + 1, V], the model's at each node of each path
    candidates:  [P, max_depth + 1] int64, -1 padded; equal beginnings of two paths are the same nodes
    temperature: 0: a token is accepted where it is the argmax
    sampling, fast:  "typical" and True: the paper's typical acceptance, deterministic; "typical" and False, or
                     "nucleus": a token is accepted where it equals one drawn from the tokens that pass the typical
                     test, or from the top-p ones (random numbers follow `torch.manual_seed`)

    Returns best_candidate, a path, and accept_length, its accepted nodes below the root: int64, 0-dimensional.
    """
    _check_sampling(sampling)
    check_tensor("logits", logits, shape=(None, None, None))
    count, width = logits.shape[:2]
    check_tensor("candidates", candidates, shape=(count, width), dtype=torch.int64, device=logits.device)
    if count * width > MAX_NODES:
        raise ValueError(f"candidates: expected at most {MAX_NODES} entries, got {count} paths of {width}")
    # The logits as they lie, path by path, are a tree's: of nodes that several paths share, the first path's counts,
    # and the others are cut off by a token that is never accepted. No row of logits is copied.
    path = torch.arange(count, device=candidates.device).unsqueeze(1)
    same = (candidates.unsqueeze(1) == candidates.unsqueeze(0)).long().cumprod(-1)  # [P, P, max_depth + 1]
    owner = same.argmax(1)  # the first path with this beginning
    node = owner * width + torch.arange(width, device=candidates.device)
    parents = torch.cat([node.new_zeros(count, 1), node[:, :-1]], 1)
    parents[0, 0] = -1
    tree = TokenTree.from_parents(parents.flatten(), max_depth=width - 1)
    tokens = torch.where(owner == path, candidates, -1).view(1, -1)

    if temperature == 0:
        options: dict[str, Any] = {"mode": "greedy"}
    elif sampling == "typical" and fast:
        options = {
            "mode": "typical",
            "temperature": temperature,
            "posterior_threshold": posterior_threshold,
            "posterior_alpha": posterior_alpha,
        }
    else:
        options = {"mode": "sampling", "temperature": temperature, "seed": _draw_seed()}
        if sampling == "typical":
            logits = _keep_typical(logits, temperature, posterior_threshold, posterior_alpha)
        else:
            options["top_p"] = top_p
    accepted = accept_candidates(logits.reshape(1, count * width, -1), tokens, tree, **options)
    return (accepted.last_node[0] // width).long(), accepted.accept_length[0].long()


def update_inference_inputs(
    input_ids,
    candidates,
    best_candidate,
    accept_length,
    retrieve_indices,
    outputs,
    logits,
    medusa_logits,
    new_token,
    past_key_values_data,
    current_length_data,
):
    """Take over the accepted tokens.

    past_key_values_data:  [layers * 2, 1, Hkv, S, D], compacted in place
    current_length_data:   [layers * 2], set to the new length, in place

    Returns input_ids [1, L + accept_length + 1], the logits [1, 1, V] and medusa_logits [heads, 1, 1, V] at the last
    accepted node, and new_token + accept_length + 1.
    """
    check_tensor("past_key_values_data", past_key_values_data, shape=(None, 1, None, None, None))
    committed = input_ids.shape[1]
    kv = past_key_values_data.unflatten(0, (-1, 2)).transpose(3, 4)
    device = kv.device
    length = torch.full((1,), committed, dtype=torch.int32, device=device)
    path = retrieve_indices[best_candidate].int().to(device).unsqueeze(0)
    compact_kv_cache(kv, path, torch.as_tensor(accept_length, dtype=torch.int32, device=device).view(1), length)

    end = int(accept_length) + 1
    current_length_data.fill_(committed + end)
    input_ids = torch.cat([input_ids, candidates[best_candidate, :end].unsqueeze(0)], dim=-1)
    logits = logits[None, best_candidate, end - 1 : end]
    medusa_logits = medusa_logits[:, None, best_candidate, end - 1 : end]
    return input_ids, logits, medusa_logits, new_token + accept_length + 1


def _check_sampling(sampling: str) -> None:
    if sampling not in ("typical", "nucleus"):
        raise ValueError(f"sampling: expected 'typical' or 'nucleus', got {sampling!r}")


def _draw_seed() -> int:
    return int(torch.randint(2**62, ()))


def _keep_typical(logits: Tensor, temperature: float, threshold: float, alpha: float) -> Tensor:
    """`logits` with -inf where a token fails the typical test; the most probable one always passes."""
    probs = (logits.float() / temperature).softmax(-1)
    entropy = -(probs * (probs + 1e-5).log()).sum(-1, keepdim=True)
    limit = (alpha * (-entropy).exp()).clamp(max=threshold)
    return logits.masked_fill((probs <= limit) & (probs < probs.amax(-1, keepdim=True)), -torch.inf)
