"""What each command takes: a dataclass each, filled from a YAML file and `key=value` arguments."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..decoding.models import SMOLLM2

T = TypeVar("T")


@dataclass(kw_only=True)
class ModelConfig:
    """model:  as `medusa_kernels.decoding.load_model` takes it
    device:    "auto": a GPU if there is one
    dtype:     of the model's weights; "auto": bfloat16 on a GPU, float32 on the CPU
    seed:      of all that is drawn
    """

    model: str = SMOLLM2
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.device.startswith("cuda") else "float32"
        self.check("dtype", self.dtype in ("float32", "bfloat16", "float16"), "float32, bfloat16, float16 or auto")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _AT_LEAST and value is not None:
                self.check(field.name, value >= _AT_LEAST[field.name], f"at least {_AT_LEAST[field.name]}")

    def check(self, key: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"{key}: expected {expected}, got {getattr(self, key)!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(kw_only=True)
class PromptsConfig(ModelConfig):
    """Prompts from the model itself, as it continues its chat template where a user's message begins (Magpie,
    arXiv 2406.08464).

    output:           JSONL file to write, a `prompt` a row
    count:            how many to draw; fewer are kept
    max_new_tokens:   one that does not end within so many is dropped
    """

    output: str
    count: int = 1024
    batch_size: int = 256
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.9


@dataclass(kw_only=True)
class DistillConfig(ModelConfig):
    """The model's own answers to prompts, to train heads on.

    prompts:            JSONL files (.gz too) with `prompt` or `turns`, of which the first is taken
    output:             folder for the shards; what is there already is not made again
    samples:            answers to each prompt
    max_prompt_tokens:  longer prompts are left out
    temperature:        0: greedy
    shard_size:         answers a file
    limit:              take the first so many prompts
    max_seconds:        stop between two batches once so much time has gone; start again to go on
    """

    prompts: list[str]
    output: str
    samples: int = 1
    batch_size: int = 256
    max_prompt_tokens: int = 512
    max_new_tokens: int = 256
    temperature: float = 0.3
    top_p: float | None = None
    shard_size: int = 1024
    limit: int | None = None
    max_seconds: float | None = None


@dataclass(kw_only=True)
class DataConfig(ModelConfig):
    """data:      folders that `distill` wrote
    max_length:   tokens of a sequence; longer ones are cut
    holdout:      sequences, drawn by `split_seed`, that are never trained on: `search` measures on them
    batch_size:   sequences of one process
    """

    data: list[str]
    max_length: int = 1024
    holdout: int = 256
    split_seed: int = 0
    batch_size: int = 32


@dataclass(kw_only=True)
class TrainConfig(DataConfig):
    """output:         folder for the result, `log.jsonl` and the checkpoint, from which a run cut short goes on
    heads:             folder of heads to start from; None: new ones
    num_heads, num_layers, shared_lm_head: see `MedusaHeads`
    sees_root:         the heads see the token after the hidden state too, which is known when they draft
    sequential:        `SequentialHeads`: each sees all tokens before the one that it predicts
    soft:              share of the heads' target that is the model's own distribution; the rest is the token that came
    seconds:           the most that training takes: the learning rates then follow the clock instead of the steps, so
                       that they have fallen to 0 at its end, and no two runs are equal to the bit
    decay:             lambda: head k's loss has the weight lambda ** k
    warmup:            share of the steps in which the learning rate rises; it falls to 0 along a cosine
    mixed_precision:   "no" or "bf16", of what is trained; "auto": bf16 on a GPU
    max_seconds:       stop with a checkpoint once so much time has gone; start again to go on
    """

    output: str
    heads: str | None = None
    num_heads: int = 4
    num_layers: int = 1
    shared_lm_head: bool = True
    sees_root: bool = True
    sequential: bool = False
    soft: float = 0.5
    epochs: int = 2
    seconds: float | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.8
    clip_norm: float = 1.0
    mixed_precision: str = "auto"
    save_every: int = 500
    log_every: int = 20
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixed_precision == "auto":
            self.mixed_precision = "bf16" if self.device.startswith("cuda") else "no"
        self.check("mixed_precision", self.mixed_precision in ("no", "bf16"), "no, bf16 or auto")
        self.check(
            "mixed_precision", self.mixed_precision == "bf16" or self.dtype == "float32", f"bf16 with {self.dtype}"
        )
        self.check("soft", 0 <= self.soft <= 1, "0..1")
        self.check("soft", self.shared_lm_head or self.soft == 0, "0 with shared_lm_head = false")
        self.check("sees_root", self.sees_root or not self.sequential, "true with sequential = true")
        self.check("clip_norm", self.clip_norm > 0, "more than 0")
        self.check("warmup", 0 <= self.warmup < 1, "0..1")
        self.check("decay", 0 < self.decay <= 1, "more than 0, at most 1")


@dataclass(kw_only=True)
class Medusa1Config(TrainConfig):
    """Heads on a frozen model (Medusa-1)."""


@dataclass(kw_only=True)
class Medusa2Config(TrainConfig):
    """Heads and model together (Medusa-2), the model by a LoRA adapter that is merged at the end.

    learning_rate:       of the adapter
    heads_lr_multiple:   the heads' learning rate is so many times that
    heads_weight:        lambda0: weight of the heads' loss against the KL divergence from the original model
    stage1:              share of the steps in which the heads alone are trained; the adapter's warm-up comes after it
    """

    learning_rate: float = 2.5e-4
    heads_lr_multiple: float = 4.0
    heads_weight: float = 0.05
    stage1: float = 0.3
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("stage1", 0 <= self.stage1 < 1, "0..1")
        self.check("lora_dropout", 0 <= self.lora_dropout < 1, "0..1")


@dataclass(kw_only=True)
class SearchConfig(DataConfig):
    """How often each head's rank-k token is right on the held-out sequences, and the best tree for that.

    heads:      folder of the heads, where `tree.json` goes
    num_nodes:  of the tree, root included
    top_k:      ranks of each head that are measured
    method:     "joint": paths by how often all of their tokens were right at once; "independent": by the product of
                the heads' accuracies, as Medusa does
    """

    heads: str
    num_nodes: int = 64
    top_k: int = 10
    method: str = "joint"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("method", self.method in ("joint", "independent"), "joint or independent")


@dataclass(kw_only=True)
class EvaluateConfig(ModelConfig):
    """Tokens a step and tokens a second against plain decoding in the same decoder, by category.

    heads:      folder of the heads and their tree
    prompts:    JSONL files with `turns` (all of them are asked in turn) or `prompt`, and `category`
    output:     JSON file to write
    tree:       "saved": the one in `tree.json`; "dynamic": the likeliest paths of each step
    num_nodes:  of dynamic trees
    mode, temperature: see `TreeDecoder.stream`
    limit:      take the first so many prompts
    max_cache_len: slots of each request's cache; conversations with no room in it are left out
    transformers: so many prompts through `transformers`' own greedy generate too
    fused:      run the model with `fuse_elementwise`, plain decoding too
    """

    heads: str
    prompts: list[str]
    output: str
    tree: str = "saved"
    num_nodes: int = 64
    batch_size: int = 1
    max_new_tokens: int = 256
    mode: str = "greedy"
    temperature: float = 1.0
    limit: int | None = None
    max_cache_len: int = 4096
    transformers: int = 0
    fused: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("tree", self.tree in ("saved", "dynamic"), "saved or dynamic")
        self.check("fused", not self.fused or self.device.startswith("cuda"), f"false on {self.device}")
        self.check("mode", self.mode in ("greedy", "typical", "sampling"), "greedy, typical or sampling")


_AT_LEAST = {
    **dict.fromkeys(("batch_size", "max_new_tokens", "samples", "max_prompt_tokens", "shard_size", "epochs"), 1),
    **dict.fromkeys(("num_heads", "num_layers", "save_every", "log_every", "lora_rank", "lora_alpha"), 1),
    **dict.fromkeys(("count", "limit", "top_k"), 1),
    **dict.fromkeys(("temperature", "learning_rate", "heads_lr_multiple", "heads_weight", "max_seconds", "seconds"), 0),
    **dict.fromkeys(("holdout", "seed", "split_seed", "transformers"), 0),
    "max_length": 3, "num_nodes": 2,
}  # fmt: skip


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """A `cls` from a YAML file and `key=value` strings, which win.

    ValueError, naming the key, for one that is unknown, missing or of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        loaded = _yaml(Path(path).read_text(encoding="utf-8"), str(path))
        if loaded is not None and not isinstance(loaded, dict):
            raise ValueError(f"{path}: expected keys and values, got {type(loaded).__name__}")
        values.update(loaded or {})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {override!r}")
        values[key] = _yaml(value, key)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(fields))}"
            raise ValueError(f"{key}: unknown key; {hint}")
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{key}: missing, and has no default")
    return cls(**{key: _convert(key, value, hints[key]) for key, value in values.items()})


def _yaml(text: str, name: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not readable as YAML: {error}") from None


def _convert(key: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if kind == list[str]:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return value
    elif kind is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
            try:
                return float(value)
            except ValueError:
                pass
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif type(value) is kind:
        return value
    name = "a list of strings, not empty" if kind == list[str] else f"a value of type {kind.__name__}"
    raise ValueError(f"{key}: expected {name}, got {value!r}")
