"""Medusa-2: heads and model together, by self-distillation: the model, with a LoRA adapter, is held to its own original
distribution, that is, to what it says with the adapter switched off.

Two stages: the heads alone, so that their large first gradients leave the model be; then both, the adapter's learning
rate from 0. Source: Medusa sections 2.2.2 and 2.3.2 (arXiv 2401.10774).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoding import load_model
from ..decoding.heads import MedusaHeads, lm_head_of
from .config import Medusa2Config
from .data import Answers
from .medusa1 import heads_loss, last_hidden, log_partition
from .trainer import Trainer, make_accelerator, make_heads, ramp_and_cosine

MEASURED = 256  # held-out sequences whose perplexity is measured


class Medusa2(nn.Module):
    """loss = KL(original model || model), averaged over answer tokens, + heads_weight * the heads' loss.

    peft_model:  the model with a LoRA adapter; its LM head is not adapted
    stage1:      share of the steps in which the heads alone are trained
    """

    def __init__(
        self, peft_model: Any, heads: MedusaHeads, decay: float, heads_weight: float, stage1: float, soft: float
    ):
        super().__init__()
        self.peft_model, self.heads = peft_model, heads
        self.decay, self.heads_weight, self.stage1, self.soft = decay, heads_weight, stage1, soft

    def forward(self, ids: Tensor, at: Tensor, labels: Tensor, done: float) -> dict[str, Tensor]:
        model = self.peft_model.get_base_model()
        projection, tokens = lm_head_of(model), labels[0].clamp(min=0)
        with torch.no_grad(), self.peft_model.disable_adapter():
            original = last_hidden(model, ids, at)
            log_p, teacher = log_partition(original, projection, tokens)
        if done < self.stage1:
            # The adapter is still zero, so that the model says what the original says.
            loss, each = heads_loss(self.heads, original, labels, self.decay, teacher, self.soft)
            return {"loss": self.heads_weight * loss, "kl": torch.zeros_like(loss), **each}
        hidden = last_hidden(model, ids, at)
        log_q, _ = log_partition(hidden, projection, tokens)
        # sum p (log p - log q): of the logits only the expected row under p is left.
        kl = (log_q - log_p + (teacher.float() * (original.float() - hidden.float())).sum(-1)).mean()
        loss, each = heads_loss(self.heads, hidden, labels, self.decay, teacher, self.soft)
        return {"loss": kl + self.heads_weight * loss, "kl": kl.detach(), **each}


def perplexity(model: Any, sequences: list[list[int]]) -> float:
    """Of token sequences, one at a time: what Medusa-2 must not raise."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for tokens in sequences:
            ids = torch.tensor([tokens], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(tokens) - 1
    return float(torch.tensor(total / max(count, 1)).exp())


def train_medusa2(config: Medusa2Config) -> bool:
    """Train, and save the heads in `config.output`, the merged model in its folder `model`, and in `metrics.json` the
    perplexities of both models on the held-out sequences. False: out of time, with a checkpoint to go on from."""
    from peft import LoraConfig, get_peft_model

    accelerator = make_accelerator(config)
    model, tokenizer = load_model(config.model, dtype=config.torch_dtype)
    answers = Answers.read(config.data, config.max_length, model.config.get_text_config(decoder=True).vocab_size)
    train, held = answers.split(config.holdout, config.split_seed)
    model.requires_grad_(False)
    heads = make_heads(config, model)
    torch.manual_seed(config.seed)  # the adapter's first values
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    peft_model: Any = get_peft_model(model, lora)
    peft_model.train()
    adapter = [p for p in peft_model.parameters() if p.requires_grad]
    heads_rate = config.learning_rate * config.heads_lr_multiple
    groups = [
        (list(heads.parameters()), ramp_and_cosine(heads_rate, 0.0, config.warmup)),
        (adapter, ramp_and_cosine(config.learning_rate, config.stage1, config.warmup)),
    ]
    objective = Medusa2(peft_model, heads, config.decay, config.heads_weight, config.stage1, config.soft)
    trainer = Trainer(config, accelerator, objective, groups, answers, train)
    if not trainer.run():
        return False
    if accelerator.is_main_process:
        folder = Path(config.output) / "model"
        peft_model.eval()
        sequences = [answers.sequence(i) for i in held[:MEASURED]]
        with peft_model.disable_adapter():
            before = perplexity(peft_model.get_base_model(), sequences)
        merged = peft_model.merge_and_unload()
        metrics = {"perplexity": {"original": before, "trained": perplexity(merged, sequences)}}
        (Path(config.output) / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        heads.save_pretrained(config.output, str(folder))
    return True
