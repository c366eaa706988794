"""Tree attention inside unmodified `transformers` models: Llama, Mistral, Qwen and others of their make.

`transformers` lets a model's attention be chosen by name (its AttentionInterface). Importing this module registers
`medusa_tree`; `tree_forward` runs a model with it. Positions, cache slots and the mask follow the tree, so the model's
own cache and masks are not used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from ..attention import tree_attention
from ..kv_cache import compact_kv_cache
from ..tree import TokenTree

ATTENTION_NAME = "medusa_tree"
PREFILL_CHUNK = 512  # the longest chain that tree attention takes


class TreeCache:
    """A static KV cache for one batch, and the tree whose nodes the forward pass under way appends to it.

    kv:             [layers, 2, B, S, Hkv, D], keys and values; node `i` of request `b` goes to `cache_seqlens[b] + i`
    cache_seqlens:  [B] int32, committed tokens
    tree:           set by `tree_forward`
    """

    def __init__(self, model: PreTrainedModel, batch: int, max_cache_len: int):
        config = check_model(model)
        heads_kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, batch, max_cache_len, heads_kv, head_dim)
        self.kv = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self.tree: TokenTree | None = None
        self.layers = [layer.unbind(0) for layer in self.kv.unbind(0)]  # views, made once: each step reads them all

    @property
    def batch(self) -> int:
        return self.kv.shape[2]

    @property
    def max_cache_len(self) -> int:
        """`S`: slots of each request."""
        return self.kv.shape[3]

    def compact(self, path: Tensor, accept_length: Tensor) -> None:
        """Commit the accepted path of every request, in place (`compact_kv_cache`)."""
        compact_kv_cache(self.kv, path, accept_length, self.cache_seqlens)


class TreeOutput(NamedTuple):
    """logits [B, T, V], and hidden [B, T, hidden]: what the LM head read, that is, the last layer's normed output."""

    logits: Tensor
    hidden: Tensor


def check_model(model: PreTrainedModel) -> Any:
    """The model's text configuration; ValueError for a model whose attention this module cannot replace."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"model: {name} does not take its attention from transformers' AttentionInterface")
    if model.get_output_embeddings() is None or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"model: expected a decoder with a language-model head, got {name}")
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(f"model: expected full or sliding-window attention in every layer, got {sorted(other)}")
    return config


def tree_forward(model: PreTrainedModel, tokens: Tensor, tree: TokenTree, cache: TreeCache) -> TreeOutput:
    """Run the model on a tree's nodes: their keys and values go to the cache's slots after `cache_seqlens`.

    tokens:  [B, T] int64, a valid token at every node, padding nodes included
    tree:    T nodes, one tree or one a request, on the model's device
    cache:   `cache_seqlens` is not changed: `cache.compact` commits what was accepted

    Nothing is read back to the host, so that the call can be captured in a CUDA graph.
    """
    head_input: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: head_input.append(args[0]))
    try:
        logits = _run(model, tokens, tree, cache).logits
    finally:
        hook.remove()
    return TreeOutput(logits, head_input[-1])


def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: TreeCache) -> None:
    """Put all but the last token of every prompt into an empty cache: the last is the root of the first tree.

    Prompts go in as chains of at most 512 nodes, ragged batches with `num_nodes`; no logits are computed.
    """
    device = model.device
    lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32)
    cache.cache_seqlens.zero_()
    for start in range(0, int(lengths.max()), PREFILL_CHUNK):
        size = _chunk_size(int(lengths.max()) - start, cache.max_cache_len, device)
        num_nodes = (lengths - start).clamp(0, size)
        tokens = torch.zeros(len(prompts), size, dtype=torch.int64)
        for row, prompt, nodes in zip(tokens, prompts, num_nodes.tolist()):
            row[:nodes] = torch.tensor(prompt[start : start + nodes], dtype=torch.int64)
        num_nodes = num_nodes.to(device)
        _run(model.base_model, tokens.to(device), _chain(size, device).with_num_nodes(num_nodes), cache)
        cache.cache_seqlens += num_nodes


def _chunk_size(remaining: int, max_cache_len: int, device: torch.device) -> int:
    size = min(remaining, PREFILL_CHUNK)
    if device.type == "cuda":  # few sizes, so few kernel variants to compile
        size = min(max(16, 1 << (size - 1).bit_length()), max_cache_len)
    return size


@lru_cache(maxsize=16)
def _chain(size: int, device: torch.device) -> TokenTree:
    return TokenTree.chain(size - 1, device)


def _run(module: Any, tokens: Tensor, tree: TokenTree, cache: TreeCache) -> Any:
    cache.tree = tree
    positions = cache.cache_seqlens.unsqueeze(1) + tree.depths
    with _attention(module.config):
        return module(input_ids=tokens, position_ids=positions.long(), use_cache=False, tree_cache=cache)


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    # Only during the pass, so that the model's own `generate` keeps working between two steps.
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention_forward(
    module: Any,
    query: Tensor,  # [B, H, T, D], rotary embedding applied
    key: Tensor,  # [B, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree_cache: TreeCache | None = None,
    **_: Any,
) -> tuple[Any, None]:
    if tree_cache is None or tree_cache.tree is None:
        raise ValueError(f"tree_cache: {ATTENTION_NAME} attention needs a TreeCache; call tree_forward")
    k_cache, v_cache = tree_cache.layers[module.layer_idx]
    out = tree_attention(
        query.transpose(1, 2), k_cache, v_cache, tree_cache.tree, tree_cache.cache_seqlens,
        k=key.transpose(1, 2), v=value.transpose(1, 2), softmax_scale=scaling, window=sliding_window,
        softcap=softcap or 0.0, sinks=s_aux,
    )  # fmt: skip
    return out, None


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
