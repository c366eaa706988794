"""Kernels for tree-based speculative decoding: tree attention, candidate acceptance, KV-cache compaction."""

from .attention import tree_attention
from .tree import TokenTree

__all__ = ["TokenTree", "tree_attention"]
