"""The decoder on tiny random models: greedy tree decoding must give what transformers' own greedy generate gives."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from medusa_kernels import TokenTree
from medusa_kernels.decoding import NgramDrafter, NoDrafter, TreeDecoder

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.4,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-window": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES),
}
PROMPTS = [[5, 9, 5, 9, 5], [17], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]]


def make_model(name: str, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(device, dtype)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def greedy(model, prompt: list[int], max_new_tokens: int, eos_token_id=None) -> list[int]:
    """transformers' own."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


class JunkDrafter:
    """Random tokens on a random tree, a new one each step."""

    on_device = False

    def __init__(self, num_nodes=9, max_depth=4, seed=0):
        self.num_nodes, self.max_depth = num_nodes, max_depth
        self.generator = torch.Generator().manual_seed(seed)

    def draft(self, state):
        batch = len(state.texts)
        tokens = torch.randint(0, VOCAB, (batch, self.num_nodes), generator=self.generator)
        tokens[:, 0] = torch.tensor([text[-1] for text in state.texts])
        parents = torch.full((batch, self.num_nodes), -1, dtype=torch.int32)
        for row in parents:
            depth = [0]
            for node in range(1, self.num_nodes):
                above = [n for n in range(node) if depth[n] < self.max_depth]
                row[node] = above[int(torch.randint(len(above), (), generator=self.generator))]
                depth.append(depth[row[node]] + 1)
        num_nodes = torch.randint(1, self.num_nodes + 1, (batch,), generator=self.generator, dtype=torch.int32)
        return tokens, TokenTree.from_parents(parents, num_nodes, self.max_depth)


class OracleDrafter:
    """Knows the answers: the right chain, and at each depth a wrong sibling before it."""

    on_device = False

    def __init__(self, texts: list[list[int]], depth=4):
        self.texts, self.max_depth, self.num_nodes = texts, depth, 1 + 2 * depth
        parents, right = [-1], 0
        for level in range(depth):
            parents += [right, right]
            right = 2 * level + 2
        self.tree = TokenTree.from_parents(torch.tensor(parents))

    def draft(self, state):
        tokens = torch.zeros(len(self.texts), self.num_nodes, dtype=torch.int64)
        for row, text, answer in zip(tokens, state.texts, self.texts):
            row[0] = text[-1]
            for level, token in enumerate(answer[len(text) : len(text) + self.max_depth]):
                row[2 * level + 1], row[2 * level + 2] = (token + 1) % VOCAB, token
        return tokens, self.tree


class MarkovDrafter:
    """On the device: a static tree filled from a table by the root alone, as heads fill one from the hidden state."""

    on_device = True

    def __init__(self, device="cpu"):
        self.tree = TokenTree.full([3, 2], device)
        self.num_nodes, self.max_depth = self.tree.size, self.tree.max_depth
        table = torch.randint(0, VOCAB, (VOCAB, 2, 3), generator=torch.Generator().manual_seed(3))
        self.table = table.to(device)

    def draft(self, state):
        assert state.hidden.shape == (len(state.root), SIZES["hidden_size"])
        return self.tree.candidates(state.root, self.table[state.root]), self.tree


def oracle(model, max_new_tokens=24):
    return OracleDrafter([prompt + greedy(model, prompt, max_new_tokens) for prompt in PROMPTS])


DRAFTERS = {
    "none": lambda model: NoDrafter(),
    "ngram": lambda model: NgramDrafter(num_nodes=12, max_depth=5),
    "junk": lambda model: JunkDrafter(),
    "oracle": oracle,
    "on-device": lambda model: MarkovDrafter(model.device),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_equals_transformers(model, drafter):
    decoder = TreeDecoder(model, DRAFTERS[drafter](model))
    want = [greedy(model, prompt, 24) for prompt in PROMPTS]
    assert len({token for text in want for token in text}) > 10, "a model that says one thing tests nothing"
    got = decoder.generate(PROMPTS, 24)
    assert got.tokens == want
    assert got.stats.tokens == 3 * 24
    if drafter == "none":
        assert got.stats.steps == 23 and got.stats.tokens_per_step == 1.0
    if drafter != "oracle":  # whose batch is fixed
        for prompt, text in zip(PROMPTS, want):
            assert decoder.generate([prompt], 24).tokens == [text]


def test_oracle_takes_fewer_steps(llama):
    got = TreeDecoder(llama, oracle(llama)).generate(PROMPTS, 24).stats
    assert got.steps == 5  # 23 tokens after the first, five a step
    assert got.gains == [[5, 5, 5, 5, 3]] * 3
    assert got.tokens_per_step == 23 / 5


@pytest.mark.parametrize("drafter", ["none", "junk", "oracle", "on-device"])
def test_eos(llama, drafter):
    full = [greedy(llama, prompt, 24) for prompt in PROMPTS]
    stops = [full[0][7], full[2][0]]  # mid-answer, and a first token
    for eos in (stops[0], stops):
        want = [greedy(llama, prompt, 24, eos) for prompt in PROMPTS]
        assert min(map(len, want)) < 24
        assert TreeDecoder(llama, DRAFTERS[drafter](llama)).generate(PROMPTS, 24, eos_token_id=eos).tokens == want


def test_eos_defaults_to_the_models(llama):
    eos = greedy(llama, PROMPTS[0], 24)[7]
    decoder = TreeDecoder(llama, NoDrafter())
    llama.generation_config.eos_token_id = eos
    try:
        stopped = decoder.generate(PROMPTS[:1], 24).tokens[0]
        assert decoder.generate(PROMPTS[:1], 24, eos_token_id=()).tokens[0][: len(stopped)] == stopped
        assert stopped == greedy(llama, PROMPTS[0], 24, eos) and stopped[-1] == eos
    finally:
        llama.generation_config.eos_token_id = None


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_max_new_tokens_is_exact(llama, max_new_tokens):
    want = [greedy(llama, prompt, max_new_tokens) for prompt in PROMPTS]
    got = TreeDecoder(llama, oracle(llama)).generate(PROMPTS, max_new_tokens)
    assert got.tokens == want


def test_stream_yields_in_order(llama):
    decoder = TreeDecoder(llama, oracle(llama))
    want = decoder.generate(PROMPTS, 24)
    parts = list(decoder.stream(PROMPTS, 24))
    assert [len(new) for new in parts[0]] == [1, 1, 1]
    assert [[len(new[b]) for new in parts[1:]] for b in range(3)] == want.stats.gains
    assert [[token for new in parts for token in new[b]] for b in range(3)] == want.tokens
    assert len(parts) == decoder.stats.steps + 1


def test_a_stream_left_early_leaves_the_decoder_and_the_model_usable(llama):
    want = greedy(llama, PROMPTS[2], 24)
    decoder = TreeDecoder(llama, NgramDrafter())
    stream = decoder.stream([PROMPTS[2]], 24)
    next(stream), next(stream)
    assert greedy(llama, PROMPTS[2], 24) == want  # between two steps the model is its own
    stream.close()
    assert decoder.generate([PROMPTS[2]], 24).tokens == [want]


def test_prompts_longer_than_a_prefill_chunk():
    torch.manual_seed(1)
    config = LlamaConfig(**{**SIZES, "max_position_embeddings": 2048})
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in (1100, 513, 40)]
    want = [greedy(model, prompt, 6) for prompt in prompts]
    assert TreeDecoder(model, NgramDrafter()).generate(prompts, 6).tokens == want


def test_tensor_prompts(llama):
    ids = torch.tensor([[5, 9, 5, 9], [1, 2, 3, 4]])
    want = [greedy(llama, prompt, 8) for prompt in ids.tolist()]
    assert TreeDecoder(llama, NgramDrafter()).generate(ids, 8).tokens == want


def test_batches_of_other_sizes_reuse_a_decoder(llama):
    decoder = TreeDecoder(llama, NgramDrafter())
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:], PROMPTS):
        assert decoder.generate(prompts, 8).tokens == [greedy(llama, prompt, 8) for prompt in prompts]
    assert decoder.generate([], 8).tokens == []


def test_cache_room(llama):
    drafter = OracleDrafter([PROMPTS[2] + greedy(llama, PROMPTS[2], 24)])
    needed = len(PROMPTS[2]) + 24 + drafter.num_nodes
    fits = TreeDecoder(llama, drafter, max_cache_len=needed)
    assert fits.generate(PROMPTS[2:], 24).tokens == [greedy(llama, PROMPTS[2], 24)]
    with pytest.raises(ValueError, match=f"max_cache_len: .* need {needed} slots, got {needed - 1}"):
        TreeDecoder(llama, drafter, max_cache_len=needed - 1).generate(PROMPTS[2:], 24)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_typical(llama, temperature):
    options = {"mode": "typical", "temperature": temperature}
    decoder = TreeDecoder(llama, oracle(llama))
    got = decoder.generate(PROMPTS, 16, **options)
    assert [len(text) for text in got.tokens] == [16] * 3
    assert decoder.generate(PROMPTS, 16, **options).tokens == got.tokens
    # The likeliest token always passes the test here, so a chain of them is accepted whole.
    assert got.tokens == [greedy(llama, prompt, 16) for prompt in PROMPTS]


def test_typical_temperature_zero_is_greedy(llama):
    got = TreeDecoder(llama, JunkDrafter()).generate(PROMPTS, 12, mode="typical", temperature=0.0)
    assert got.tokens == [greedy(llama, prompt, 12) for prompt in PROMPTS]


def test_sampling(llama):
    decoder = TreeDecoder(llama, NgramDrafter())
    texts = [decoder.generate(PROMPTS, 16, mode="sampling", seed=seed).tokens for seed in (1, 2)]
    assert all(len(text) == 16 and 0 <= min(text) <= max(text) < VOCAB for tokens in texts for text in tokens)
    assert texts[0] != texts[1]
    assert decoder.generate(PROMPTS, 16, mode="sampling", seed=1).tokens == texts[0]
    assert len({tuple(texts[0][b]) for b in range(3)}) == 3
    one = decoder.generate(PROMPTS, 16, mode="sampling", top_k=1, seed=5)
    assert one.tokens == [greedy(llama, prompt, 16) for prompt in PROMPTS]


def test_bad_input(llama):
    decoder = TreeDecoder(llama, NoDrafter())
    for prompts, message in (
        ([[1], []], "prompts: .*empty one at 1"),
        ([[1, VOCAB]], f"prompts: expected tokens 0..{VOCAB - 1}"),
        ([[-1]], "prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.generate(prompts, 4)
    with pytest.raises(ValueError, match="max_new_tokens"):
        decoder.generate([[1]], 0)
    with pytest.raises(ValueError, match="mode"):
        decoder.generate([[1]], 4, mode="beam")
    wrong = JunkDrafter()
    wrong.draft = lambda state: (torch.zeros(1, 4, dtype=torch.int64), TokenTree.chain(4))
    with pytest.raises(ValueError, match="drafter: expected a tree of as many nodes"):
        TreeDecoder(llama, wrong).generate([[1]], 4)
    with pytest.raises(TypeError, match="model"):
        TreeDecoder(torch.nn.Linear(2, 2), NoDrafter())
    with pytest.raises(ValueError, match="max_cache_len"):
        TreeDecoder(llama, NoDrafter(), max_cache_len=0)


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.gpu
def test_greedy_equals_transformers_on_gpu(device, name, drafter, cuda_graph):
    model = make_model(name, device)
    decoder = TreeDecoder(model, DRAFTERS[drafter](model), cuda_graph=cuda_graph)
    want = [greedy(model, prompt, 24) for prompt in PROMPTS]
    assert decoder.generate(PROMPTS, 24).tokens == want
    assert decoder.generate(PROMPTS, 24).tokens == want  # the graph at hand, another cache content
    profiled = decoder.generate(PROMPTS, 24, profile=True)
    assert profiled.tokens == want
    assert all(profiled.stats.seconds[phase] > 0 for phase in ("prefill", "draft", "forward", "accept", "compact"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.gpu
def test_low_precision_on_gpu(device, dtype):
    model = make_model("llama", device, dtype)
    plain = TreeDecoder(model, NoDrafter()).generate(PROMPTS, 24)
    assert [len(text) for text in plain.tokens] == [24] * 3
    graph, eager = (TreeDecoder(model, NgramDrafter(), cuda_graph=on).generate(PROMPTS, 24) for on in (True, False))
    assert [len(text) for text in graph.tokens] == [24] * 3 and [len(text) for text in eager.tokens] == [24] * 3


@pytest.mark.gpu
def test_graph_follows_eos_and_options(device):
    model = make_model("llama", device)
    decoder = TreeDecoder(model, NgramDrafter())
    for max_new_tokens, eos in ((24, None), (7, None), (24, greedy(model, PROMPTS[0], 24)[7])):
        want = [greedy(model, prompt, max_new_tokens, eos) for prompt in PROMPTS]
        assert decoder.generate(PROMPTS, max_new_tokens, eos_token_id=eos if eos is not None else ()).tokens == want
    typical = decoder.generate(PROMPTS, 12, mode="typical", temperature=0.0, eos_token_id=())
    assert typical.tokens == [greedy(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("drafter", ["none", "junk"])
@pytest.mark.gpu
def test_graph_draws_what_eager_draws(device, drafter):
    model = make_model("llama", device)
    texts = []
    for cuda_graph in (True, False):
        decoder = TreeDecoder(model, DRAFTERS[drafter](model), cuda_graph=cuda_graph)
        texts.append(decoder.generate(PROMPTS, 24, mode="sampling", seed=7).tokens)
    assert texts[0] == texts[1]
    if drafter == "none":  # whose trees are the same each time
        assert decoder.generate(PROMPTS, 24, mode="sampling", seed=7).tokens == texts[0]
