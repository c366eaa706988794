"""A decoder that verifies a tree of draft tokens a step, on `transformers` models."""

from .decoder import DecodeStats, Generation, TreeDecoder
from .drafters import Drafter, DraftState, NgramDrafter, NoDrafter
from .models import load_model

__all__ = [
    "DecodeStats",
    "DraftState",
    "Drafter",
    "Generation",
    "NgramDrafter",
    "NoDrafter",
    "TreeDecoder",
    "load_model",
]
