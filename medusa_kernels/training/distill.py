"""The model's own prompts and answers, by batched plain decoding, in shards that a run cut short is resumed from."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding import NoDrafter, TreeDecoder, load_model
from ..decoding.models import chat_prompt
from .config import DistillConfig, PromptsConfig
from .data import read_turns

SETTINGS_NAME = "distill.json"


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """JSONL, gzipped if the name ends in .gz, and under its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()
    part.write_bytes(gzip.compress(text, 4, mtime=0) if path.suffix == ".gz" else text)
    os.replace(part, path)


def distill(config: DistillConfig) -> int:
    """Write `shard-*.jsonl.gz` with `prompt` and `answer`, token ids, until done or out of time. Returns how many are
    missing.

    Each process (`accelerate launch`) makes every so many-th shard.
    """
    from accelerate import PartialState
    from tqdm import tqdm

    began = time.monotonic()
    state = PartialState(cpu=config.device == "cpu")
    model, tokenizer = load_model(config.model, dtype=config.torch_dtype, device=state.device)
    prompts = [chat_prompt(tokenizer, row["turns"][0]) for row in read_turns(config.prompts, config.limit)]
    longest = min(config.max_prompt_tokens, model.config.max_position_embeddings - config.max_new_tokens)
    prompts = [prompt for prompt in prompts if len(prompt) <= longest]
    if not prompts:
        raise ValueError(f"max_prompt_tokens: no prompt of at most {longest} tokens, which this model leaves room for")
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    output = Path(config.output)
    with state.main_process_first():
        _same_settings(output, config, digest)

    # Prompts of like length together, so that little of the prefill is padding; second answers after all first ones.
    prompts = sorted(prompts, key=len) * config.samples
    shards = [prompts[i : i + config.shard_size] for i in range(0, len(prompts), config.shard_size)]
    paths = [output / f"shard-{i:05d}.jsonl.gz" for i in range(len(shards))]
    mine = [i for i in range(state.process_index, len(shards), state.num_processes) if not paths[i].is_file()]
    random.Random(config.seed).shuffle(mine)  # what a run cut short has made is not of short prompts alone
    decoder = TreeDecoder(model, NoDrafter(), max_cache_len=longest + config.max_new_tokens + 1)
    tokens = 0
    with tqdm(total=sum(len(shards[i]) for i in mine), unit="answer", disable=not state.is_main_process) as progress:
        for i in mine:
            rows: list[dict[str, list[int]]] = []
            for first in range(0, len(shards[i]), config.batch_size):
                if config.max_seconds is not None and time.monotonic() - began > config.max_seconds:
                    break
                asked = shards[i][first : first + config.batch_size]
                batch = asked + asked[:1] * (config.batch_size - len(asked))  # one batch size, so one CUDA graph
                options: dict[str, Any] = {"mode": "greedy"}
                if config.temperature > 0:
                    options = {
                        "mode": "sampling", "temperature": config.temperature, "top_p": config.top_p,
                        "seed": _batch_seed(config.seed, i, first),
                    }  # fmt: skip
                answers = decoder.generate(batch, config.max_new_tokens, **options).tokens
                rows += [{"prompt": prompt, "answer": answer} for prompt, answer in zip(asked, answers)]
                tokens += sum(map(len, answers[: len(asked)]))
                progress.update(len(asked))
                progress.set_postfix(tokens_per_s=round(tokens / (time.monotonic() - began)))
            else:
                write_lines(paths[i], rows)
                continue
            break
    state.wait_for_everyone()
    return sum(not path.is_file() for path in paths)


def _same_settings(output: Path, config: DistillConfig, digest: str) -> None:
    """Shards of other settings than those that are there must not come beside them."""
    settings = {**dataclasses.asdict(config), "prompts": digest}
    for key in ("output", "device", "max_seconds", "limit"):  # limit shows in the prompts
        del settings[key]
    path = output / SETTINGS_NAME
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not readable as JSON: {error}") from None
        for key, value in settings.items():
            if before.get(key) != value:
                raise ValueError(f"{key}: {output} was begun with {before.get(key)!r}, now it is {value!r}")
    else:
        write_lines(path, [settings])


def _batch_seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def make_prompts(config: PromptsConfig) -> int:
    """Write what the model says in the user's place, what looks like a whole message alone. Returns how many."""
    from tqdm import tqdm

    model, tokenizer = load_model(config.model, dtype=config.torch_dtype, device=config.device)
    prefix = _user_prefix(tokenizer)
    decoder = TreeDecoder(model, NoDrafter())
    kept: dict[str, None] = {}
    for first in tqdm(range(0, config.count, config.batch_size), unit="batch"):
        drawn = decoder.generate(
            [prefix] * config.batch_size, config.max_new_tokens, mode="sampling", temperature=config.temperature,
            top_p=config.top_p, seed=_batch_seed(config.seed, first),
        ).tokens  # fmt: skip
        for tokens in drawn[: config.count - first]:
            if (message := whole_message(model, tokenizer, tokens)) is not None:
                kept[message] = None
    write_lines(Path(config.output), ({"prompt": message, "source": "the model itself"} for message in kept))
    return len(kept)


def _user_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The chat template up to where a user's message begins."""
    mark = "\x02message\x03"
    text: Any = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    if mark not in text:
        raise ValueError("model: its chat template changes the user's message")
    return tokenizer(text.split(mark)[0], add_special_tokens=False)["input_ids"]


def whole_message(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str | None:
    """The message, or None for one that does not end, is too short, repeats itself or begins mid-talk."""
    eos = model.generation_config.eos_token_id
    if tokens[-1] not in (eos if isinstance(eos, list) else [eos]):
        return None
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    fours = list(zip(*(tokens[i:] for i in range(4))))
    if len(text.split()) < 3 or len(set(fours)) < len(fours) or not (text[0].isupper() or text[0].isdigit()):
        return None
    return text
