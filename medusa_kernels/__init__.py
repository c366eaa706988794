"""Kernels for tree-based speculative decoding: tree attention, candidate acceptance, KV-cache compaction."""

from ._ops import build_info
from .acceptance import Acceptance, AcceptMode, accept_candidates
from .attention import tree_attention
from .kv_cache import compact_kv_cache
from .tree import TokenTree
from .verify import VerifiedStep, verify_step

__all__ = [
    "AcceptMode",
    "Acceptance",
    "TokenTree",
    "VerifiedStep",
    "accept_candidates",
    "build_info",
    "compact_kv_cache",
    "tree_attention",
    "verify_step",
]
