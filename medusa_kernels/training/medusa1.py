"""Medusa-1: heads on a frozen model. Source: Medusa section 2.2.1 (arXiv 2401.10774)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..decoding import load_model
from ..decoding.heads import MedusaHeads
from .config import Medusa1Config
from .data import Answers
from .trainer import Trainer, make_accelerator, make_heads, ramp_and_cosine

CHUNK = 4096  # positions whose logits are in memory at once: a vocabulary of 128k in float32 takes 2 GiB


def last_hidden(model: PreTrainedModel, ids: Tensor, at: Tensor) -> Tensor:
    """[N, D]: what the LM head reads at positions `at`, counted through `ids` [B, L], which is padded on the right:
    nothing before a padding token sees it, so that no mask is needed."""
    hidden: Any = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[at]


def _cross_entropy(x: Tensor, projection: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, projection).float(), labels, ignore_index=-100, reduction="sum")


def heads_loss(heads: MedusaHeads, hidden: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over heads of decay ** k times head k's mean cross-entropy, and each head's.

    hidden [N, D];  labels [heads + 1, N], -100 where there is none: row k is what head k predicts, and row k - 1 the
    last token that it sees, if it is sequential
    """
    features = heads.features(hidden, labels[:-1].clamp(min=0) if heads.sequential else None)
    total, each = hidden.new_zeros((), dtype=torch.float32), {}
    for head in range(heads.num_heads):
        targets, projection = labels[head + 1], heads.projection(head)
        # Logits are computed again on the way back instead of being kept.
        parts = [
            checkpoint(_cross_entropy, x, projection, y, use_reentrant=False, preserve_rng_state=False)
            for x, y in zip(features[head].split(CHUNK), targets.split(CHUNK))
        ]
        loss = torch.stack(parts).sum() / (targets >= 0).sum().clamp(min=1)
        total = total + decay ** (head + 1) * loss
        each[f"head{head + 1}"] = loss.detach()
    return total, each


class Medusa1(nn.Module):
    def __init__(self, model: PreTrainedModel, heads: MedusaHeads, decay: float):
        super().__init__()
        self.model, self.heads, self.decay = model.requires_grad_(False).eval(), heads, decay

    def forward(self, ids: Tensor, at: Tensor, labels: Tensor, done: float) -> dict[str, Tensor]:
        with torch.no_grad():
            hidden = last_hidden(self.model, ids, at)
        loss, each = heads_loss(self.heads, hidden, labels, self.decay)
        return {"loss": loss, **each}


def train_medusa1(config: Medusa1Config) -> bool:
    """Train heads and save them in `config.output`. False: out of time, with a checkpoint to go on from."""
    accelerator = make_accelerator(config)
    model, _ = load_model(config.model, dtype=config.torch_dtype)
    answers = Answers.read(config.data, config.max_length, model.config.get_text_config(decoder=True).vocab_size)
    train, _ = answers.split(config.holdout, config.split_seed)
    model.requires_grad_(False)
    heads = make_heads(config, model)
    groups = [(list(heads.parameters()), ramp_and_cosine(config.learning_rate, 0.0, config.warmup))]
    trainer = Trainer(config, accelerator, Medusa1(model, heads, config.decay), groups, answers, train)
    if not trainer.run():
        return False
    if accelerator.is_main_process:
        heads.save_pretrained(config.output, config.model)
    return True
