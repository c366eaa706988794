"""Medusa-1: heads on a frozen model. Source: Medusa section 2.2.1 (arXiv 2401.10774)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..decoding import load_model
from ..decoding.heads import MedusaHeads, lm_head_of
from .config import Medusa1Config
from .data import Answers
from .trainer import Trainer, make_accelerator, make_heads, ramp_and_cosine

CHUNK = 4096  # positions whose logits are in memory at once: a vocabulary of 128k in float32 takes 2 GiB


def last_hidden(model: PreTrainedModel, ids: Tensor, at: Tensor) -> Tensor:
    """[N, D]: what the LM head reads at positions `at`, counted through `ids` [B, L], which is padded on the right:
    nothing before a padding token sees it, so that no mask is needed."""
    hidden: Any = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[at]


class _Partition(torch.autograd.Function):
    """log-sum-exp of the logits x @ projection.T, [N] float32, and the expected projection row under their softmax,
    [N, D], which is its gradient: made on the way forward, so that no logits are kept, nor computed twice.

    `index` [N]: tokens to read the log-sum-exp at, likely ones for precision's sake.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # Without autocast, which would make the softmax's output float32, twice the bytes to write and read.
        with torch.autocast(device, enabled=False):
            projection = projection.to(dtype)
            logits = F.linear(x.to(dtype), projection)
            probs = logits.softmax(-1)  # summed in float32 inside
            expected = probs @ projection
        at = index.unsqueeze(1)
        log_p = probs.gather(1, at).float().clamp(min=1e-37).log()
        ctx.save_for_backward(expected)
        ctx.mark_non_differentiable(expected)
        return (logits.gather(1, at).float() - log_p).squeeze(1), expected

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (expected,) = ctx.saved_tensors
        return grads[0].unsqueeze(1).to(expected.dtype) * expected, None, None


def log_partition(x: Tensor, projection: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """`_Partition` in chunks. A distribution enters a cross-entropy or a KL divergence by these two alone, as logits
    are linear in the rows."""
    parts = [_Partition.apply(a, projection, b) for a, b in zip(x.split(CHUNK), index.split(CHUNK))]
    log_z, expected = (torch.cat(each) for each in zip(*parts))
    return log_z, expected


@torch.no_grad()
def teachers_rows(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
    """[N, D]: the LM head's row that the model expects at each position, which is all that a cross-entropy against its
    distribution needs to know of it. hidden [N, D];  labels [N]: tokens that came there."""
    return log_partition(hidden, lm_head, labels.clamp(min=0))[1]


def _cross_entropy(x: Tensor, projection: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, projection).float(), labels, ignore_index=-100, reduction="sum")


def heads_loss(
    heads: MedusaHeads, hidden: Tensor, labels: Tensor, decay: float, teacher: Tensor | None = None, soft: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over heads of decay ** k times head k's mean cross-entropy, and each head's against the labels alone.

    hidden [N, D];  labels [heads + 1, N], -100 where there is none: row k is what head k predicts, and row k - 1 the
    last token that it sees, if it is sequential;  teacher [N, D]: see `teachers_rows`
    soft:  share of the target that is the model's own distribution at the place, the rest being its label; takes heads
           that share the LM head
    """
    features = heads.features(hidden, labels[:-1].clamp(min=0))
    total, each = hidden.new_zeros((), dtype=torch.float32), {}
    for head in range(heads.num_heads):
        targets, projection = labels[head + 1], heads.projection(head)
        there = targets >= 0
        count = there.sum().clamp(min=1)
        if projection.requires_grad:
            # Logits are computed again on the way back instead of being kept.
            parts = [
                checkpoint(_cross_entropy, x, projection, y, use_reentrant=False, preserve_rng_state=False)
                for x, y in zip(features[head].split(CHUNK), targets.split(CHUNK))
            ]
            loss = hard = torch.stack(parts).sum() / count
        else:
            x, y = features[head], targets.clamp(min=0)
            right = F.embedding(y, projection).float()
            log_z, _ = log_partition(x, projection, y)
            hard = ((log_z - (x.float() * right).sum(-1)) * there).sum() / count
            loss = hard
            if teacher is not None and soft > 0:
                # What head k predicts, the model predicts k positions later.
                shifted = F.pad(teacher[head + 1 :], (0, 0, 0, head + 1)).float()
                loss = hard + soft * ((x.float() * (right - shifted)).sum(-1) * there).sum() / count
        total = total + decay ** (head + 1) * loss
        each[f"head{head + 1}"] = hard.detach()
    return total, each


class Medusa1(nn.Module):
    def __init__(self, model: PreTrainedModel, heads: MedusaHeads, decay: float, soft: float):
        super().__init__()
        self.model, self.heads = model.requires_grad_(False).eval(), heads
        self.decay, self.soft = decay, soft

    def forward(self, ids: Tensor, at: Tensor, labels: Tensor, done: float) -> dict[str, Tensor]:
        with torch.no_grad():
            hidden = last_hidden(self.model, ids, at)
            teacher = teachers_rows(hidden, lm_head_of(self.model), labels[0]) if self.soft > 0 else None
        loss, each = heads_loss(self.heads, hidden, labels, self.decay, teacher, self.soft)
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
    trainer = Trainer(config, accelerator, Medusa1(model, heads, config.decay, config.soft), groups, answers, train)
    if not trainer.run():
        return False
    if accelerator.is_main_process:
        heads.save_pretrained(config.output, config.model)
    return True
