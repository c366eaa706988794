"""Prompts and answers in files, and batches of them in an order that depends on seed and epoch alone."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, which may be gzipped; ValueError, naming file and line, for one that is no object."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not readable as JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
                yield row
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable: {error}") from None


def read_turns(paths: Iterable[str | Path], limit: int | None = None) -> list[dict[str, Any]]:
    """Rows with `turns`, a list of messages; a row's `prompt` counts as one turn."""
    rows = []
    for path in paths:
        for number, row in enumerate(read_jsonl(path), start=1):
            turns = row.get("turns", [row["prompt"]] if "prompt" in row else None)
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
                raise ValueError(f"{path}, line {number}: expected `prompt`, a string, or `turns`, a list of strings")
            rows.append({**row, "turns": turns})
            if limit is not None and len(rows) == limit:
                return rows
    if not rows:
        raise ValueError(f"prompts: no rows in {[str(path) for path in paths]}")
    return rows


def _token_ids(value: Any, vocab_size: int) -> np.ndarray | None:
    """A list of token ids as an array, None for anything else."""
    try:
        ids = np.asarray(value if value != [] else np.empty(0, dtype=np.int64))
    except (ValueError, OverflowError):
        return None
    if ids.ndim != 1 or ids.dtype.kind != "i" or (len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size):
        return None
    return ids


class Batch(NamedTuple):
    """ids:  [B, L] int64, padded on the right
    at:      [N] int64, positions, counted through `ids`, whose next token is part of an answer: where a decoder
             would draft
    labels:  [heads + 1, N] int64: row k is the token that head k predicts there, k + 1 places on, and -100 where that
             is past the answer. Row 0 is the LM head's
    """

    ids: Tensor
    at: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in self))


class Answers:
    """Prompts and the model's answers, as token ids.

    tokens:   [all tokens] int32
    starts:   [sequences + 1], where each sequence begins
    answers:  [sequences], where in its sequence the answer begins
    """

    def __init__(self, sequences: Iterable[tuple[Any, Any]], max_length: int):
        parts, lengths, answers = [], [], []
        for prompt, answer in sequences:
            tokens = np.concatenate([prompt, answer])[:max_length].astype(np.int32)
            if len(tokens) - len(prompt) >= 2:  # a head predicts the second token of an answer at the earliest
                parts.append(tokens)
                lengths.append(len(tokens))
                answers.append(len(prompt))
        if not parts:
            raise ValueError(f"data: no answer of two tokens or more within max_length = {max_length}")
        self.tokens = np.concatenate(parts)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.answers = np.asarray(answers)

    @classmethod
    def read(cls, folders: Iterable[str | Path], max_length: int, vocab_size: int) -> "Answers":
        """All shards that `distill` wrote; ValueError, naming the file and line, for a row that is not of its make."""

        def rows() -> Iterator[tuple[Any, Any]]:
            for folder in folders:
                shards = sorted(p for p in Path(folder).glob("shard-*") if p.name.endswith((".jsonl", ".jsonl.gz")))
                if not shards:
                    raise ValueError(f"data: no shard-*.jsonl or .jsonl.gz in {folder}")
                for shard in shards:
                    for number, row in enumerate(read_jsonl(shard), start=1):
                        prompt, answer = (_token_ids(row.get(key), vocab_size) for key in ("prompt", "answer"))
                        for key, ids in (("prompt", prompt), ("answer", answer)):
                            if ids is None or (key == "prompt" and not len(ids)):
                                raise ValueError(
                                    f"{shard}, line {number}: {key}: expected token ids 0..{vocab_size - 1}"
                                )
                        yield prompt, answer

        return cls(rows(), max_length)

    def __len__(self) -> int:
        return len(self.answers)

    def sequence(self, index: int) -> list[int]:
        return self.tokens[self.starts[index] : self.starts[index + 1]].tolist()

    @property
    def fingerprint(self) -> str:
        """Of all tokens: a run goes on only with the data that it began with."""
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(self.starts.tobytes())
        digest.update(self.answers.tobytes())
        return digest.hexdigest()

    def split(self, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices to train on and held-out ones. Sequences of one prompt stay on one side."""
        if not 0 <= holdout < len(self):
            raise ValueError(f"holdout: expected 0..{len(self) - 1}, as there are {len(self)} sequences, got {holdout}")
        # By the prompt's digest: another answer to a prompt is no unseen text.
        keys = np.array([self._prompt_digest(i, seed) for i in range(len(self))], dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        held = np.zeros(len(self), dtype=bool)
        if holdout:
            held = keys <= keys[order[holdout - 1]]
        if held.all():
            raise ValueError(f"holdout: {holdout} leaves nothing to train on: the prompts are too much alike")
        return np.flatnonzero(~held), np.flatnonzero(held)

    def _prompt_digest(self, index: int, seed: int) -> int:
        start = self.starts[index]
        prompt = self.tokens[start : start + self.answers[index]].tobytes()
        return int.from_bytes(hashlib.blake2b(prompt, digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "big")

    def batches(self, indices: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """An epoch's batches: shuffled, but with sequences of similar length together, so that little is padding."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(indices)
        lengths = np.diff(self.starts)
        window = 64 * batch_size
        order = np.concatenate(
            [w[np.argsort(lengths[w], kind="stable")] for w in np.split(order, range(window, len(order), window))]
        )
        batches = np.split(order, range(batch_size, len(order), batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, indices: np.ndarray, num_heads: int) -> Batch:
        lengths = np.diff(self.starts)[indices]
        longest = int(lengths.max())
        ids = np.zeros((len(indices), longest), dtype=np.int64)
        at, labels = [], []
        for row, (index, length) in enumerate(zip(indices, lengths)):
            tokens = self.tokens[self.starts[index] : self.starts[index + 1]]
            ids[row, :length] = tokens
            first = int(self.answers[index])
            at.append(row * longest + np.arange(first - 1, length - 1))
            padded = np.concatenate([tokens[first:], np.full(num_heads, -100)])
            labels.append(np.lib.stride_tricks.sliding_window_view(padded, length - first))
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(np.concatenate(at)),
            torch.from_numpy(np.concatenate(labels, axis=1).astype(np.int64)),
        )
