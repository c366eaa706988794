"""Medusa heads: small residual networks on the model's last hidden state that predict the tokens after the next."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .cpu import linear
from .gpu import topk

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "medusa_heads.safetensors"
PUBLISHED_NAME = "medusa_lm_head.pt"


class MedusaHeads(nn.Module):
    """`num_heads` heads, each of `num_layers` residual blocks `x + SiLU(W x + b)` and a vocabulary projection.

    With `x` the last hidden state at position `t`, whose LM head predicts token `t + 1`, head `k` = 1, 2, ... predicts
    token `t + k + 1`. Blocks are zero at the start, so that an untrained head is the projection alone.

    lm_head:    [V, D]: one projection for all heads, the model's own. It is referred to, not copied, not trained with
                the heads and not saved; or [heads, V, D]: one for each head, a parameter
    embedding:  None: heads as in the paper. [V, D], the model's input embedding, referred to likewise: the heads see
                the root too, token `t + 1`, which is known before they draft and hard to read from `x`. Each head's
                first block is then `x + SiLU(W x + U e + b)`, with `e` the root's normed embedding, `U` zero at first

    Source: Medusa section 2.1 (arXiv 2401.10774); the root as an input is not in the paper.
    """

    sequential = False  # whether a head sees all tokens before the one that it predicts

    def __init__(self, num_heads: int, num_layers: int, lm_head: Tensor, embedding: Tensor | None = None):
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if lm_head.dim() not in (2, 3) or (lm_head.dim() == 3 and lm_head.shape[0] != num_heads):
            raise ValueError(f"lm_head: expected [V, D] or [{num_heads}, V, D], got {tuple(lm_head.shape)}")
        self.num_heads, self.num_layers = num_heads, num_layers
        self.vocab_size, self.hidden_size = lm_head.shape[-2:]
        # All heads' blocks of a layer lie together: one batched matmul a layer.
        self.weight = nn.Parameter(lm_head.new_zeros(num_layers, num_heads, self.hidden_size, self.hidden_size))
        self.bias = nn.Parameter(lm_head.new_zeros(num_layers, num_heads, self.hidden_size))
        self._shared: tuple[Tensor, ...] = ()  # in a tuple, so that it is no parameter of this module
        if lm_head.dim() == 2:
            self._shared = (lm_head,)
        else:
            self.lm_head = nn.Parameter(lm_head.detach())
        self._embedding: tuple[Tensor, ...] = ()
        if embedding is not None:
            if tuple(embedding.shape) != (self.vocab_size, self.hidden_size):
                want, got = (self.vocab_size, self.hidden_size), tuple(embedding.shape)
                raise ValueError(f"embedding: expected {want}, as the LM head, got {got}")
            self.token_weight = nn.Parameter(torch.zeros_like(self.weight[0]))
            self._embedding = (embedding,)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        num_heads: int = 4,
        num_layers: int = 1,
        *,
        shared_lm_head: bool = True,
        sees_root: bool = False,
    ) -> "MedusaHeads":
        """Untrained heads for `model`, with its LM head, or a copy of it for each head."""
        lm_head = lm_head_of(model)
        if not shared_lm_head:
            lm_head = lm_head.detach().repeat(num_heads, 1, 1)
        return cls(num_heads, num_layers, lm_head, _embedding_of(model) if sees_root or cls.sequential else None)

    @property
    def shared_lm_head(self) -> bool:
        return bool(self._shared)

    @property
    def sees_root(self) -> bool:
        return bool(self._embedding)

    def projection(self, head: int) -> Tensor:
        """[V, D]: the vocabulary projection of a head, counted from 0."""
        return self._shared[0] if self._shared else self.lm_head[head]

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] -> [..., D]: the tokens' embeddings, normed, as they come in sizes of their own."""
        return F.rms_norm(F.embedding(tokens, self._embedding[0]), (self.hidden_size,)).to(dtype)

    def features(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[N, D] -> [heads, N, D]: what the projections read. `tokens` as for `forward`, but [heads, N]."""
        x = hidden.expand(self.num_heads, *hidden.shape)
        for layer, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            z = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
            if layer == 0 and self.sees_root:
                if tokens is None or tokens.shape[1:] != hidden.shape[:1]:
                    want, got = (1, hidden.shape[0]), None if tokens is None else tuple(tokens.shape)
                    raise ValueError(f"tokens: these heads need the root's, of shape {want}, got {got}")
                root = self.embed(tokens[0], hidden.dtype)
                z = z + torch.matmul(root, self.token_weight.transpose(1, 2))
            x = x + F.silu(z)
        return x

    def forward(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[..., D], the last hidden state as the LM head reads it -> logits [heads, ..., V].

        tokens:  [heads, ...] int64, for sequential heads: row k - 1 is the last token that head k sees, `t + k`. Row 0
                 is the root, which is all that others need, if they see it
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden: expected a last dimension of {self.hidden_size}, got {tuple(hidden.shape)}")
        x = self.features(hidden.reshape(-1, self.hidden_size), None if tokens is None else tokens.flatten(1))
        logits = linear(x, self._shared[0]) if self._shared else torch.bmm(x, self.lm_head.transpose(1, 2))
        return logits.view(self.num_heads, *hidden.shape[:-1], self.vocab_size)

    def topk(self, hidden: Tensor, k: int, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[..., D] -> each head's `k` likeliest tokens, best first, and their probabilities: [..., heads, k] each,
        int64 and fp32. `tokens` as for `forward`."""
        logits = self(hidden, tokens).movedim(0, -2)
        best, tokens = topk(logits, k)
        return tokens, (best.float() - logits.float().logsumexp(-1, keepdim=True)).exp()

    # ---- files ----

    def save_pretrained(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write `medusa_heads.safetensors` and `config.json`; a shared LM head stays with the model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "medusa_num_heads": self.num_heads, "medusa_num_layers": self.num_layers, "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size, "shared_lm_head": self.shared_lm_head,
            "sequential": self.sequential, "sees_root": self.sees_root, "base_model_name_or_path": base_model,
        }  # fmt: skip
        part = folder / f"{WEIGHTS_NAME}.part"  # a run cut short leaves no half of a file under the name
        part.write_bytes(save({name: p.detach().contiguous().cpu() for name, p in self.named_parameters()}))
        os.replace(part, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, model: PreTrainedModel | None = None) -> "MedusaHeads":
        """Heads for inference from a folder, or a repository on the Hugging Face hub.

        Reads what `save_pretrained` writes, and what FasterDecoding/Medusa publishes: `medusa_lm_head.pt` (keys
        `{head}.{layer}.linear.weight`, `.bias` and `{head}.{num_layers}.weight`) beside a `config.json`. Published
        configurations may name fewer heads than the file holds; all of the file's are read.

        model:  needed for heads that share its LM head; the heads get its dtype and device
        Raises ValueError, naming the file and the key, for what cannot be read or does not fit.
        """
        folder = _folder(name_or_path)
        config_path = folder / CONFIG_NAME
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{config_path}: no such file, so no Medusa heads there") from None
        except ValueError as error:  # JSON and UTF-8 alike
            raise ValueError(f"{config_path}: not readable as JSON: {error}") from None
        for key in ("medusa_num_heads", "medusa_num_layers"):
            if not isinstance(config, dict) or type(config.get(key)) is not int or config[key] < 1:
                got = config.get(key) if isinstance(config, dict) else type(config).__name__
                raise ValueError(f"{config_path}: {key}: expected an integer of at least 1, got {got!r}")
        if (folder / WEIGHTS_NAME).is_file():
            kind = SequentialHeads if config.get("sequential") else MedusaHeads
            heads = kind._from_saved(folder / WEIGHTS_NAME, config, model)
        elif (folder / PUBLISHED_NAME).is_file():
            heads = MedusaHeads._from_published(folder / PUBLISHED_NAME, config)
        else:
            raise ValueError(f"{folder}: expected {WEIGHTS_NAME} or {PUBLISHED_NAME}, found neither")
        if model is not None:
            lm_head = lm_head_of(model)
            ours, theirs = (heads.vocab_size, heads.hidden_size), tuple(lm_head.shape)
            if ours != theirs:
                raise ValueError(f"{folder}: heads for vocabulary and hidden size {ours}, the model has {theirs}")
            heads = heads.to(lm_head.device, lm_head.dtype)
        return heads.requires_grad_(False).eval()

    @classmethod
    def _from_saved(cls, path: Path, config: dict[str, Any], model: PreTrainedModel | None) -> "MedusaHeads":
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not readable as safetensors: {error}") from None
        num_heads, num_layers = config["medusa_num_heads"], config["medusa_num_layers"]
        for key in ("hidden_size", "vocab_size"):
            if type(config.get(key)) is not int:
                raise ValueError(f"{path.parent / CONFIG_NAME}: {key}: expected an integer, got {config.get(key)!r}")
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        shapes = {"weight": (num_layers, num_heads, hidden, hidden), "bias": (num_layers, num_heads, hidden)}
        sees_root = bool(cls.sequential or config.get("sees_root"))
        if sees_root:
            shapes["token_weight"] = (num_heads, hidden, hidden)
        if not config.get("shared_lm_head"):
            shapes["lm_head"] = (num_heads, vocab, hidden)
        _check_state(path, state, shapes)
        if model is None and (sees_root or "lm_head" not in shapes):
            shared = "embedding" if sees_root else "LM head"
            raise ValueError(f"model: the heads in {path.parent} share the model's {shared}, so it must be given")
        if model is None or "lm_head" in shapes:
            lm_head = state["lm_head"]
        else:
            lm_head = lm_head_of(model)
            if tuple(lm_head.shape) != (vocab, hidden):
                got = tuple(lm_head.shape)
                raise ValueError(
                    f"{path.parent}: heads for vocabulary and hidden size {(vocab, hidden)}, the model has {got}"
                )
        heads = cls(num_heads, num_layers, lm_head, _embedding_of(model) if sees_root and model is not None else None)
        heads.load_state_dict(state)
        return heads

    @classmethod
    def _from_published(cls, path: Path, config: dict[str, Any]) -> "MedusaHeads":
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken file can raise almost anything in the unpickler
            raise ValueError(f"{path}: not readable as a file of tensors: {error!r:.300}") from None
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"{path}: expected tensors by name, got {type(state).__name__}")
        num_layers = config["medusa_num_layers"]
        num_heads = len({key.split(".")[0] for key in state})
        if num_heads < config["medusa_num_heads"]:
            raise ValueError(f"{path}: medusa_num_heads: {config['medusa_num_heads']}, the file has {num_heads}")
        first = state.get(f"0.{num_layers}.weight")
        if not isinstance(first, Tensor) or first.dim() != 2:
            raise ValueError(
                f"{path}: 0.{num_layers}.weight: expected a matrix with medusa_num_layers = {num_layers}; "
                f"the keys are {sorted(state)[:6]} ..."
            )
        vocab, hidden = first.shape
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(num_heads):
            for j in range(num_layers):
                shapes[f"{i}.{j}.linear.weight"] = (hidden, hidden)
                shapes[f"{i}.{j}.linear.bias"] = (hidden,)
            shapes[f"{i}.{num_layers}.weight"] = (vocab, hidden)
        _check_state(path, state, shapes)
        heads = cls(num_heads, num_layers, torch.stack([state[f"{i}.{num_layers}.weight"] for i in range(num_heads)]))
        with torch.no_grad():
            for i in range(num_heads):
                for j in range(num_layers):
                    heads.weight[j, i] = state[f"{i}.{j}.linear.weight"]
                    heads.bias[j, i] = state[f"{i}.{j}.linear.bias"]
        return heads


class SequentialHeads(MedusaHeads):
    """Heads that see the path so far: head `k` goes on from head `k - 1`'s state with the token that came after it.

    `s_0` is the last hidden state at position `t`. `s_k` is `s_{k-1}` through the head's residual blocks, the first of
    which also reads token `t + k`: `x + SiLU(W x + U e + b)`, with `e` the token's normed input embedding; the
    projection of `s_k` predicts token `t + k + 1`. So the first head sees the root, unlike Medusa's, and a node's
    children depend on the node.

    Source: the idea of heads that depend on the draft so far is Hydra's (arXiv 2402.05109).
    """

    sequential = True

    def __init__(self, num_heads: int, num_layers: int, lm_head: Tensor, embedding: Tensor):
        super().__init__(num_heads, num_layers, lm_head, embedding)

    def step(self, head: int, state: Tensor, tokens: Tensor) -> Tensor:
        """State [..., D] before head `head`, counted from 0, and the token [...] after it -> state [..., D]."""
        embedded = self.embed(tokens, state.dtype)
        for layer in range(self.num_layers):
            x = F.linear(state, self.weight[layer, head], self.bias[layer, head])
            if layer == 0:
                x = x + F.linear(embedded, self.token_weight[head])
            state = state + F.silu(x)
        return state

    def features(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        if tokens is None or tokens.shape != (self.num_heads, hidden.shape[0]):
            want, got = (self.num_heads, hidden.shape[0]), None if tokens is None else tuple(tokens.shape)
            raise ValueError(f"tokens: sequential heads need them, of shape {want}, got {got}")
        states = []
        for head in range(self.num_heads):
            hidden = self.step(head, hidden, tokens[head])
            states.append(hidden)
        return torch.stack(states)


def lm_head_of(model: PreTrainedModel) -> Tensor:
    layer: Any = model.get_output_embeddings()
    if layer is None or getattr(layer, "bias", None) is not None:
        raise ValueError(f"model: expected an LM head without bias, got {type(model).__name__} with {layer}")
    return layer.weight


def _embedding_of(model: PreTrainedModel) -> Tensor:
    layer: Any = model.get_input_embeddings()
    return layer.weight


def _folder(name_or_path: str | Path) -> Path:
    if Path(name_or_path).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, PUBLISHED_NAME]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name_or_path}: neither a folder nor to be had from the hub: {reason}") from None


def _check_state(path: Path, state: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"{path}: {missing[0]} is missing (of {len(missing)} keys that are)")
    if extra := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"{path}: {extra[0]} is not expected (of {len(extra)} such keys)")
    for key, shape in shapes.items():
        got = state[key]
        if not isinstance(got, Tensor) or not got.is_floating_point() or tuple(got.shape) != shape:
            what = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(f"{path}: {key}: expected a floating-point tensor of shape {shape}, got {what}")
        if not bool(got.isfinite().all()):
            raise ValueError(f"{path}: {key}: has values that are not finite")
