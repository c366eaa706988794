"""What makes a model's step shorter on a GPU, where at small batches its many small operators take most of the time."""

import math
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def fuse_elementwise(model: PreTrainedModel) -> None:
    """Replace a model's RMSNorms, rotary embedding and gated MLPs by Liger's fused kernels, in place, for inference.

    They are 26 of the some 40 launches of a Llama layer, and 7 then. The rotary embedding is replaced for all models of
    this architecture that run on a GPU in this process, as a model has none of its own.

    Raises ImportError without `liger-kernel` (extra `fused`), ValueError for a model that is not on a GPU or whose
    architecture Liger does not know.
    """
    if model.device.type != "cuda":
        raise ValueError(f"model: expected one on a GPU, got one on {model.device}")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' Trainer calls, too
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        raise ImportError(
            f"fuse_elementwise needs liger-kernel ({error}): pip install 'medusa_kernels[fused]'"
        ) from None
    if (architecture := model.config.model_type) not in known:
        raise ValueError(f"model: Liger knows {', '.join(sorted(known))}, got {architecture}")
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    _confine(modeling, before)


def _confine(modeling: ModuleType, before: dict[str, Any]) -> None:
    """Take back what Liger has put in the architecture's module for models to come: its classes all, its functions on a
    CPU, where they do not run."""
    for name, old in before.items():
        new = getattr(modeling, name)
        if new is not old:
            stays = isinstance(old, type) or getattr(old, "on_gpu", None) is new
            setattr(modeling, name, old if stays else _by_device(old, new))


def _by_device(on_cpu: Callable, on_gpu: Callable) -> Callable:
    @wraps(on_cpu)
    def call(x: Tensor, *args, **kwargs):
        return (on_gpu if x.is_cuda else on_cpu)(x, *args, **kwargs)

    call.on_gpu = on_gpu  # type: ignore[attr-defined]
    return call


def topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)`, values and indices, best first; of equal logits any.

    On a GPU in two rounds, as PyTorch takes some 15 launches for few long rows, and 6 for both rounds.
    """
    vocab_size = logits.shape[-1]
    piece = _piece(vocab_size, k) if logits.is_cuda else vocab_size
    return _topk_of_pieces(logits, k, piece) if piece < vocab_size else logits.topk(k)


def _topk_of_pieces(logits: Tensor, k: int, piece: int) -> tuple[Tensor, Tensor]:
    """By the top k of every `piece` logits of a row, k <= piece."""
    values, places = logits.unflatten(-1, (-1, piece)).topk(k, sorted=False)
    best, at = values.flatten(-2).topk(k)
    return best, torch.add(places.flatten(-2).gather(-1, at), at // k, alpha=piece)


@lru_cache
def _piece(vocab_size: int, k: int) -> int:
    """The divisor of the vocabulary that makes both rounds about as long; the vocabulary itself if none comes near."""
    length = math.sqrt(vocab_size * k)
    near = [n for n in range(k, vocab_size) if vocab_size % n == 0 and length / 4 <= n <= 4 * length]
    return min(near, key=lambda n: abs(math.log(n / length)), default=vocab_size)
