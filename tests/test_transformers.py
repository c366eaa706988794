"""Tree attention in transformers' models: each node's logits must be those of its path as a plain text."""

import pytest
import torch
from transformers import BloomConfig, Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from medusa_kernels import TokenTree
from medusa_kernels.integrations.transformers import TreeCache, _chunk_size, prefill, tree_forward

VOCAB = 50
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
    "initializer_range": 0.3, "attn_implementation": "eager",
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=6),
    "qwen2-window": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2-softcap": lambda: Gemma2Config(
        **SIZES, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=5, query_pre_attn_scalar=16
    ),
    "gpt-oss-sinks": lambda: GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=5),
}
PROMPTS = [[7, 3, 7], [11], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
PARENTS = torch.tensor([-1, 0, 0, 1, 1, 2, 3, 6])


def make_model(name: str, device="cpu"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(device)


def path_logits(model, prompt: list[int], tokens: list[int], parents: list[int], node: int) -> torch.Tensor:
    path = []
    while node >= 0:
        path.insert(0, tokens[node])
        node = parents[node]
    return model(torch.tensor([prompt[:-1] + path], device=model.device)).logits[0, -1]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_nodes_see_their_path_alone(name):
    check_nodes(make_model(name))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.gpu
@torch.no_grad()
def test_nodes_see_their_path_alone_on_gpu(name, device):
    check_nodes(make_model(name, device))


def check_nodes(model):
    cache = TreeCache(model, len(PROMPTS), 32)
    cache.kv.fill_(float("nan"))
    prefill(model, PROMPTS, cache)
    assert cache.cache_seqlens.tolist() == [2, 0, 9]
    tokens = torch.randint(0, VOCAB, (3, len(PARENTS)), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = torch.tensor([prompt[-1] for prompt in PROMPTS])
    num_nodes = [8, 5, 7]
    tree = TokenTree.from_parents(PARENTS).to(model.device)
    tree = tree.with_num_nodes(torch.tensor(num_nodes, dtype=torch.int32, device=model.device))
    logits, hidden = tree_forward(model, tokens.to(model.device), tree, cache)
    assert logits.shape == (3, 8, VOCAB) and hidden.shape == (3, 8, SIZES["hidden_size"])
    assert cache.cache_seqlens.tolist() == [2, 0, 9]
    for b, prompt in enumerate(PROMPTS):
        for node in range(num_nodes[b]):
            want = path_logits(model, prompt, tokens[b].tolist(), PARENTS.tolist(), node)
            torch.testing.assert_close(logits[b, node], want, rtol=1e-4, atol=1e-4)

    # Accept the path 0, 1, 3, 6 (two nodes of it in the second request): the next root must see just that.
    path = torch.tensor([[0, 1, 3, 6], [0, 1, -1, -1], [-1] * 4], dtype=torch.int32, device=model.device)
    cache.compact(path, torch.tensor([3, 1, -1], dtype=torch.int32, device=model.device))
    assert cache.cache_seqlens.tolist() == [6, 2, 9]
    root = torch.tensor([[4], [5], [6]])
    logits = tree_forward(model, root.to(model.device), TokenTree.chain(0, model.device), cache).logits
    for b, kept in ((0, [0, 1, 3, 6]), (1, [0, 1]), (2, [])):
        text = PROMPTS[b][:-1] + tokens[b, kept].tolist() + root[b].tolist()
        want = model(torch.tensor([text], device=model.device)).logits[0, -1]
        torch.testing.assert_close(logits[b, 0], want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hidden_is_what_the_head_reads():
    model = make_model("llama")
    cache = TreeCache(model, 1, 8)
    logits, hidden = tree_forward(model, torch.tensor([[3, 4]]), TokenTree.chain(1), cache)
    torch.testing.assert_close(model.lm_head(hidden), logits)
    torch.testing.assert_close(model.model(torch.tensor([[3, 4]])).last_hidden_state, hidden)
    assert not model.lm_head._forward_pre_hooks


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model = make_model("llama")
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    with pytest.raises(ValueError, match="k_cache"):
        tree_forward(model, ids, TokenTree.chain(2), TreeCache(model, 1, 2))  # no room
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_without_a_cache():
    model = make_model("llama")
    model.set_attn_implementation("medusa_tree")
    with pytest.raises(ValueError, match="tree_cache"):
        model(torch.tensor([[1, 2]]))


def test_models_that_do_not_fit():
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=9, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="AttentionInterface"):
        TreeCache(bloom, 1, 8)
    chunked = make_model("llama")
    chunked.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        TreeCache(chunked, 1, 8)
    with pytest.raises(ValueError, match="head"):
        TreeCache(make_model("llama").model, 1, 8)


@pytest.mark.parametrize(
    "remaining, max_cache_len, device, size",
    [(3, 100, "cpu", 3), (600, 700, "cpu", 512), (3, 100, "cuda", 16), (3, 5, "cuda", 5), (300, 482, "cuda", 482),
     (300, 900, "cuda", 512), (600, 700, "cuda", 512)],
)  # fmt: skip
def test_prefill_chunks_fit_the_cache(remaining, max_cache_len, device, size):
    assert _chunk_size(remaining, max_cache_len, torch.device(device)) == size
