"""What the heads buy on given prompts: tokens a step and tokens a second, beside plain decoding in the same decoder."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..decoding import Drafter, NoDrafter, TreeDecoder, fuse_elementwise, load_model
from ..decoding.heads import MedusaHeads, SequentialHeads
from ..decoding.medusa import DynamicMedusaDrafter, DynamicSequentialDrafter, load_drafter
from ..decoding.models import chat_prompt
from .config import EvaluateConfig
from .data import read_turns


@dataclass
class Tally:
    """Of one decoder on one category. Seconds and tokens count from each answer's second token, so without prefill."""

    gains: list[int] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0

    def report(self) -> dict[str, float]:
        return {
            "tokens_per_step": sum(self.gains) / max(len(self.gains), 1),
            "tokens": sum(self.gains),
            "request_steps": len(self.gains),
            "tokens_per_s": self.tokens / self.seconds if self.seconds else 0.0,
            "ms_per_step": 1e3 * self.seconds / max(self.steps, 1),
            "prefill_s": self.prefill_seconds,
        }


def repeated_four_grams(answers: list[list[int]]) -> float:
    """Share of 4-grams that had occurred before in the same answer: loops flatter speculative decoding."""
    total = repeated = 0
    for answer in answers:
        fours = list(zip(*(answer[i:] for i in range(4))))
        total += len(fours)
        repeated += len(fours) - len(set(fours))
    return repeated / max(total, 1)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Write, and return, the report by category and of all. Later turns follow plain decoding's answers."""
    model, tokenizer = load_model(config.model, dtype=config.torch_dtype, device=config.device)
    if config.fused:
        fuse_elementwise(model)
    drafter: Drafter
    if config.tree == "saved":
        drafter = load_drafter(config.heads, model)
    else:
        heads = MedusaHeads.from_pretrained(config.heads, model)
        if isinstance(heads, SequentialHeads):
            drafter = DynamicSequentialDrafter(heads, config.num_nodes)
        else:
            drafter = DynamicMedusaDrafter(heads, config.num_nodes)
    rows = read_turns(config.prompts, config.limit)
    decoders = {
        name: TreeDecoder(model, each, max_cache_len=config.max_cache_len)
        for name, each in (("plain", NoDrafter()), ("medusa", drafter))
    }
    room = config.max_cache_len - config.max_new_tokens - drafter.num_nodes
    options = {"mode": config.mode, "temperature": config.temperature}
    if config.mode == "sampling":
        options["seed"] = config.seed
    tallies: dict[str, dict[str, Tally]] = {}
    answers: dict[str, list[list[int]]] = {}
    same: dict[str, list[bool]] = {}
    left_out = 0
    first_prompts: list[list[int]] = []
    warm = False
    by_turns = sorted(rows, key=lambda row: (len(row["turns"]), str(row.get("category"))))
    groups: list[list[dict[str, Any]]] = []
    for row in by_turns:  # a batch is of one category and asks as many turns
        alike = groups and [groups[-1][0].get("category"), len(groups[-1][0]["turns"])] == [
            row.get("category"), len(row["turns"])
        ]  # fmt: skip
        if not alike or len(groups[-1]) == config.batch_size:
            groups.append([])
        groups[-1].append(row)
    for group in tqdm(groups, unit="batch"):
        category = str(group[0].get("category", "all"))
        messages: list[list[str]] = [[] for _ in group]
        for turn in range(len(group[0]["turns"])):
            for said, row in zip(messages, group):
                said.append(row["turns"][turn])
            prompts = [chat_prompt(tokenizer, *said) for said in messages]
            if max(map(len, prompts)) > room:
                left_out += len(group)
                break
            first_prompts = first_prompts or prompts
            if not warm:  # kernels compile and graphs are captured outside of the time measured
                for decoder in decoders.values():
                    decoder.generate(prompts, 4, **options)
            warm = len(group) == config.batch_size  # another batch size has graphs of its own
            texts = {}
            for name, decoder in decoders.items():
                tally = tallies.setdefault(category, {}).setdefault(name, Tally())
                began = time.perf_counter()
                texts[name] = decoder.generate(prompts, config.max_new_tokens, **options).tokens
                seconds, stats = time.perf_counter() - began, decoder.stats
                tally.prefill_seconds += stats.seconds["prefill"]
                tally.seconds += seconds - stats.seconds["prefill"]
                tally.tokens += stats.tokens - len(group)
                tally.steps += stats.steps
                tally.gains += [gain for gains in stats.gains for gain in gains]
            answers.setdefault(category, []).extend(texts["medusa"])
            same.setdefault(category, []).extend(a == b for a, b in zip(texts["plain"], texts["medusa"]))
            for said, answer in zip(messages, texts["plain"]):
                said.append(str(tokenizer.decode(answer, skip_special_tokens=True)))
    if not tallies:
        raise ValueError(f"max_cache_len: no prompt fits: {room} tokens are left for one")

    def report(categories: list[str]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name in decoders:
            all_of = [tallies[category][name] for category in categories]
            total = Tally(
                [gain for tally in all_of for gain in tally.gains], sum(t.steps for t in all_of),
                sum(t.tokens for t in all_of), sum(t.seconds for t in all_of), sum(t.prefill_seconds for t in all_of),
            )  # fmt: skip
            out[name] = total.report()
        out["speedup"] = out["medusa"]["tokens_per_s"] / max(out["plain"]["tokens_per_s"], 1e-9)
        out["repeated_4gram_share"] = repeated_four_grams([a for c in categories for a in answers[c]])
        out["four_grams"] = sum(max(len(a) - 3, 0) for c in categories for a in answers[c])
        out["answers"] = sum(len(same[c]) for c in categories)
        out["identical"] = sum(sum(same[c]) for c in categories)
        return out

    phases = {}  # of each decoder's step, on the first batch that fitted, in µs
    for name, decoder in decoders.items():
        stats = decoder.generate(first_prompts, min(config.max_new_tokens, 64), profile=True, **options).stats
        phases[name] = {p: 1e6 * s / max(stats.steps, 1) for p, s in stats.seconds.items() if p != "prefill"}
    result = {
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "config": {key: getattr(config, key) for key in config.__dataclass_fields__},
        "left_out": left_out,
        "phases_us": phases,
        "all": report(list(tallies)),
        "categories": {category: report([category]) for category in tallies},
    }
    if config.transformers:
        result["transformers_tokens_per_s"] = _transformers(model, tokenizer, rows[: config.transformers], config)
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _transformers(model: PreTrainedModel, tokenizer: Any, rows: list[dict[str, Any]], config: EvaluateConfig) -> float:
    """Tokens a second of `transformers`' own greedy generate on the first turns, one prompt at a time, prefill
    included."""
    tokens, seconds = 0, 0.0
    for i, row in enumerate([rows[0], *rows]):  # the first one twice: to warm up
        ids = torch.tensor([chat_prompt(tokenizer, row["turns"][0])], device=model.device)
        began = time.perf_counter()
        generate: Any = model.generate
        out = generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=config.max_new_tokens
        ).tolist()
        if i:
            seconds += time.perf_counter() - began
            tokens += len(out[0]) - ids.shape[1]
    return tokens / seconds
