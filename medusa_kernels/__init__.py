"""Kernels for tree-based speculative decoding: tree attention, candidate acceptance, KV-cache compaction."""

from .tree import TokenTree

__all__ = ["TokenTree"]
