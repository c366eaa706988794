"""A decoder that verifies a tree of draft tokens a step, on `transformers` models."""

from .cpu import pack_linears
from .decoder import DecodeStats, Generation, TreeDecoder
from .drafters import Drafter, DraftState, NgramDrafter, NoDrafter
from .gpu import fuse_elementwise
from .heads import MedusaHeads, SequentialHeads
from .medusa import (
    DynamicMedusaDrafter,
    DynamicSequentialDrafter,
    MedusaDrafter,
    SequentialDrafter,
    load_drafter,
    shipped_heads,
)
from .models import load_model

__all__ = [
    "DecodeStats",
    "DraftState",
    "Drafter",
    "DynamicMedusaDrafter",
    "DynamicSequentialDrafter",
    "Generation",
    "MedusaDrafter",
    "MedusaHeads",
    "NgramDrafter",
    "NoDrafter",
    "SequentialDrafter",
    "SequentialHeads",
    "TreeDecoder",
    "fuse_elementwise",
    "load_drafter",
    "load_model",
    "pack_linears",
    "shipped_heads",
]
