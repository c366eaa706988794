"""Medusa heads and their drafters against the published layout, written out here module by module."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_kernels import TokenTree
from medusa_kernels.decoding import DraftState, NoDrafter, TreeDecoder, medusa
from medusa_kernels.decoding.heads import MedusaHeads, SequentialHeads
from medusa_kernels.decoding.medusa import (
    DynamicMedusaDrafter,
    DynamicSequentialDrafter,
    MedusaDrafter,
    SequentialDrafter,
    load_drafter,
    load_tree,
    shipped_heads,
)
from medusa_kernels.decoding.models import SMOLLM2

VOCAB, HIDDEN = 61, 32


def make_model(hidden=HIDDEN, vocab=VOCAB, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device, dtype)


def random_heads(model, num_heads=3, num_layers=2, shared_lm_head=True, scale=0.1, kind=MedusaHeads, **options):
    heads = kind.from_model(model, num_heads, num_layers, shared_lm_head=shared_lm_head, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return heads.requires_grad_(False)


class ResBlock(nn.Module):
    """As FasterDecoding/Medusa's file names them: one linear layer, SiLU, added to the input."""

    def __init__(self, hidden):
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, x):
        return x + torch.nn.functional.silu(self.linear(x))


def published(num_heads, num_layers, hidden=HIDDEN, vocab=VOCAB):
    torch.manual_seed(2)
    blocks = [[ResBlock(hidden) for _ in range(num_layers)] for _ in range(num_heads)]
    return nn.ModuleList(nn.Sequential(*row, nn.Linear(hidden, vocab, bias=False)) for row in blocks)


def write_published(folder, module, num_heads, num_layers):
    torch.save(module.state_dict(), folder / "medusa_lm_head.pt")
    config = {"medusa_num_heads": num_heads, "medusa_num_layers": num_layers, "base_model_name_or_path": "x/y"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("shared_lm_head", [True, False])
def test_untrained_heads_are_the_lm_head(shared_lm_head):
    model = make_model()
    heads = MedusaHeads.from_model(model, 3, 2, shared_lm_head=shared_lm_head)
    hidden = torch.randn(2, 5, HIDDEN)
    want = model.lm_head(hidden)
    assert heads(hidden).shape == (3, 2, 5, VOCAB)
    for logits in heads(hidden):
        torch.testing.assert_close(logits, want)
    names = {name for name, _ in heads.named_parameters()}
    assert names == {"weight", "bias"} | (set() if shared_lm_head else {"lm_head"})
    assert heads.shared_lm_head is shared_lm_head and (heads.projection(0) is model.lm_head.weight) is shared_lm_head


def test_heads_that_see_the_root_by_their_definition(tmp_path):
    model = make_model()
    heads = random_heads(model, sees_root=True)
    hidden, root = torch.randn(2, 5, HIDDEN), torch.randint(0, VOCAB, (1, 2, 5))
    got = heads(hidden, root)
    e = model.model.embed_tokens(root[0])
    e = e / (e.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    for head in range(3):
        z = hidden @ heads.weight[0, head].T + e @ heads.token_weight[head].T + heads.bias[0, head]
        x = hidden + z * z.sigmoid()
        z = x @ heads.weight[1, head].T + heads.bias[1, head]
        torch.testing.assert_close(got[head], model.lm_head(x + z * z.sigmoid()), rtol=1e-4, atol=1e-4)
    for wrong in (None, root[:, :1]):
        with pytest.raises(ValueError, match="tokens: these heads need the root"):
            heads(hidden, wrong)
    heads.save_pretrained(tmp_path)
    again = MedusaHeads.from_pretrained(tmp_path, model)
    assert type(again) is MedusaHeads and torch.equal(again(hidden, root), got)
    with pytest.raises(ValueError, match=r"share the model's embedding, so it must be given"):
        MedusaHeads.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sees_root": False}))
    with pytest.raises(ValueError, match="token_weight is not expected"):
        MedusaHeads.from_pretrained(tmp_path, model)


def test_layers_and_heads_are_distinct():
    heads = MedusaHeads.from_model(make_model(), 3, 2)
    heads(torch.randn(4, HIDDEN)).pow(2).mean(dim=(1, 2))[1].backward()
    changed = heads.weight.grad.abs().sum(dim=(2, 3)) > 0
    assert changed.tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("shared_lm_head", [True, False])
def test_topk(shared_lm_head):
    heads = random_heads(make_model(), shared_lm_head=shared_lm_head)
    hidden = torch.randn(2, 5, HIDDEN)
    tokens, probs = heads.topk(hidden, 4)
    assert tokens.shape == probs.shape == (2, 5, 3, 4)
    want = heads(hidden).softmax(-1)
    for head in range(3):
        best = want[head].sort(dim=-1, descending=True)
        assert torch.equal(tokens[:, :, head], best.indices[..., :4])
        torch.testing.assert_close(probs[:, :, head], best.values[..., :4])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_published_layout(tmp_path, num_layers):
    module = published(5, num_layers)
    write_published(tmp_path, module, 2, num_layers)  # a published configuration names 2 of the file's 5 heads
    heads = MedusaHeads.from_pretrained(tmp_path)
    assert (heads.num_heads, heads.num_layers, heads.shared_lm_head) == (5, num_layers, False)
    hidden = torch.randn(3, HIDDEN)
    want = torch.stack([head(hidden) for head in module])
    torch.testing.assert_close(heads(hidden), want)
    heads.save_pretrained(tmp_path / "ours")
    again = MedusaHeads.from_pretrained(tmp_path / "ours", make_model())
    assert torch.equal(again(hidden), heads(hidden)) and again.state_dict().keys() == heads.state_dict().keys()


@pytest.mark.parametrize("shared_lm_head", [True, False])
def test_save_and_load(tmp_path, shared_lm_head):
    model = make_model()
    heads = random_heads(model, shared_lm_head=shared_lm_head)
    heads.save_pretrained(tmp_path, "some/model")
    again = MedusaHeads.from_pretrained(str(tmp_path), model)
    hidden = torch.randn(3, HIDDEN)
    assert torch.equal(again(hidden), heads(hidden))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    assert json.loads((tmp_path / "config.json").read_text())["base_model_name_or_path"] == "some/model"
    half = MedusaHeads.from_pretrained(tmp_path, make_model(dtype=torch.bfloat16))
    assert half(hidden.bfloat16()).dtype == torch.bfloat16


def test_broken_files(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        MedusaHeads.from_pretrained(tmp_path, model)
    random_heads(model).save_pretrained(tmp_path)
    weights, config = tmp_path / "medusa_heads.safetensors", tmp_path / "config.json"
    good, good_config = weights.read_bytes(), config.read_text()
    for broken in (b"", good[:40], good[: len(good) // 2], b"\xff" * len(good)):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"medusa_heads\.safetensors: not readable"):
            MedusaHeads.from_pretrained(tmp_path, model)
    weights.write_bytes(good)
    for change, message in (
        ("{", r"config\.json: not readable as JSON"),
        ("[]", "medusa_num_heads"),
        ({"medusa_num_heads": "3"}, "medusa_num_heads: expected an integer"),
        ({"medusa_num_layers": 0}, "medusa_num_layers: expected an integer of at least 1, got 0"),
        ({"medusa_num_heads": 4}, "weight: expected .*4, 32, 32.*, got .*3, 32, 32"),
        ({"hidden_size": None}, "hidden_size: expected an integer"),
        ({"shared_lm_head": False}, "lm_head is missing"),
    ):
        text = change if isinstance(change, str) else json.dumps({**json.loads(good_config), **change})
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            MedusaHeads.from_pretrained(tmp_path, model)
    config.write_text(good_config)
    with pytest.raises(ValueError, match=r"model: the heads in .* share the model's LM head"):
        MedusaHeads.from_pretrained(tmp_path)
    for other in (make_model(hidden=64), make_model(vocab=50)):
        with pytest.raises(ValueError, match=r"heads for vocabulary and hidden size \(61, 32\), the model has"):
            MedusaHeads.from_pretrained(tmp_path, other)
    heads = random_heads(model)
    heads.weight[0, 0, 0, 0] = torch.nan
    heads.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weight: has values that are not finite"):
        MedusaHeads.from_pretrained(tmp_path, model)
    weights.unlink()
    with pytest.raises(ValueError, match="found neither"):
        MedusaHeads.from_pretrained(tmp_path, model)


def test_broken_published_files(tmp_path):
    module = published(2, 1)
    path = tmp_path / "medusa_lm_head.pt"

    def load(state=None, raw=None, num_heads=2, num_layers=1):
        write_published(tmp_path, module, num_heads, num_layers)
        if state is not None:
            torch.save(state, path)
        if raw is not None:
            path.write_bytes(raw)
        return MedusaHeads.from_pretrained(tmp_path, make_model())

    assert load().num_heads == 2
    state = module.state_dict()
    good = path.read_bytes()
    for raw in (b"", good[: len(good) // 2], b"not a checkpoint"):
        with pytest.raises(ValueError, match=r"medusa_lm_head\.pt: not readable"):
            load(raw=raw)
    for state_now, message in (
        ([1], "expected tensors by name, got list"),
        ({k: v for k, v in state.items() if k != "1.0.linear.bias"}, r"1\.0\.linear\.bias is missing"),
        ({**state, "1.7.weight": state["0.1.weight"]}, r"1\.7\.weight is not expected"),
        ({**state, "1.1.weight": torch.zeros(VOCAB, 8)}, r"1\.1\.weight: expected .*\(61, 32\), got .*\(61, 8\)"),
        ({**state, "1.1.weight": "x"}, r"1\.1\.weight: expected .*, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            load(state_now)
    with pytest.raises(ValueError, match="medusa_num_heads: 5, the file has 2"):
        load(num_heads=5)
    with pytest.raises(ValueError, match=r"0\.2\.weight: expected a matrix with medusa_num_layers = 2"):
        load(num_layers=2)
    module = published(2, 1, hidden=16)
    with pytest.raises(ValueError, match=r"\(61, 16\), the model has \(61, 32\)"):
        load()


class Poison:
    """Runs when it is unpickled without care."""

    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was run",))


def test_published_files_run_no_code(tmp_path):
    write_published(tmp_path, published(1, 1), 1, 1)
    torch.save({"0.1.weight": Poison()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="not readable"):
        MedusaHeads.from_pretrained(tmp_path)


def state_of(hidden):
    root = torch.arange(len(hidden))
    return DraftState(root, hidden, root.int(), [], [])


def test_drafter_fills_the_tree_by_rank():
    heads = random_heads(make_model())
    drafter = MedusaDrafter(heads, TokenTree.from_choices([[0], [0, 3], [1], [0, 3, 1]]))
    assert (drafter.num_nodes, drafter.max_depth, drafter.top_k, drafter.on_device) == (5, 3, 4, True)
    hidden = torch.randn(2, HIDDEN)
    tokens, tree = drafter.draft(state_of(hidden))
    for b in range(2):
        order = [heads(hidden[b])[head].argsort(descending=True).tolist() for head in range(3)]
        assert tokens[b].tolist() == [b, order[0][0], order[0][1], order[1][3], order[2][1]]
    assert tree.parents.tolist() == [-1, 0, 0, 1, 3]


def test_dynamic_drafter_takes_the_likeliest_paths():
    heads = random_heads(make_model())
    drafter = DynamicMedusaDrafter(heads, num_nodes=12, top_k=5)
    hidden = torch.randn(2, HIDDEN)
    tokens, tree = drafter.draft(state_of(hidden))
    probs = heads(hidden).softmax(-1).detach()
    for b in range(2):
        paths, score = [()], [1.0]
        for node in range(1, 12):
            parent = int(tree.parents[b, node])
            paths.append((*paths[parent], int(tokens[b, node])))
            score.append(score[parent] * float(probs[len(paths[parent]), b, tokens[b, node]]))
        assert len(set(paths)) == 12
        every = [float(probs[0, b, i]) for i in range(VOCAB)]
        every += [a * float(q) for a in every for q in probs[1, b]]
        every += [a * float(q) for a in every[VOCAB:] for q in probs[2, b]]
        torch.testing.assert_close(sorted(score[1:], reverse=True), sorted(every, reverse=True)[:11])


def test_sequential_heads_by_their_definition():
    model = make_model()
    heads = random_heads(model, kind=SequentialHeads)
    hidden, tokens = torch.randn(2, 5, HIDDEN), torch.randint(0, VOCAB, (3, 2, 5))
    got = heads(hidden, tokens)
    state = hidden
    for head in range(3):
        e = model.model.embed_tokens(tokens[head])
        e = e / (e.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        z = state @ heads.weight[0, head].T + e @ heads.token_weight[head].T + heads.bias[0, head]
        state = state + z * z.sigmoid()
        z = state @ heads.weight[1, head].T + heads.bias[1, head]
        state = state + z * z.sigmoid()
        torch.testing.assert_close(got[head], model.lm_head(state), rtol=1e-4, atol=1e-4)
    for wrong in (None, tokens[:2]):
        with pytest.raises(ValueError, match="tokens: sequential heads need them"):
            heads(hidden, wrong)


@pytest.mark.parametrize("shared_lm_head", [True, False])
def test_sequential_heads_are_saved(tmp_path, shared_lm_head):
    model = make_model()
    heads = random_heads(model, kind=SequentialHeads, shared_lm_head=shared_lm_head)
    heads.save_pretrained(tmp_path)
    again = MedusaHeads.from_pretrained(tmp_path, model)
    assert isinstance(again, SequentialHeads)
    hidden, tokens = torch.randn(4, HIDDEN), torch.randint(0, VOCAB, (3, 4))
    assert torch.equal(again(hidden, tokens), heads(hidden, tokens))
    with pytest.raises(ValueError, match="so it must be given"):
        MedusaHeads.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sequential": False, "sees_root": False}))
    with pytest.raises(ValueError, match="token_weight is not expected"):
        MedusaHeads.from_pretrained(tmp_path, model)


@pytest.mark.parametrize(
    "tree",
    [
        TokenTree.from_choices([[0], [0, 3], [1], [0, 3, 1], [1, 0], [2]]),
        TokenTree.search(torch.tensor([[0.6, 0.3, 0.05], [0.9, 0.05, 0.01], [0.8, 0.1, 0.1]]), 12),  # not by level
        TokenTree.chain(3),
        TokenTree.chain(0),
    ],
    ids=["choices", "search", "chain", "root"],
)
def test_sequential_drafter_follows_each_path(tree):
    heads = random_heads(make_model(), kind=SequentialHeads, scale=0.3)
    drafter = SequentialDrafter(heads, tree)
    hidden = torch.randn(2, HIDDEN)
    tokens, _ = drafter.draft(state_of(hidden))
    assert tokens.shape == (2, tree.size) and tokens[:, 0].tolist() == [0, 1]
    for b in range(2):
        paths = [[b]]
        for node in range(1, tree.size):
            above = paths[int(tree.parents[node])]
            padded = torch.tensor(above + [0] * (3 - len(above)))  # what a head sees does not depend on what follows
            order = heads(hidden[b : b + 1], padded.unsqueeze(1))[len(above) - 1, 0].argsort(descending=True)
            paths.append([*above, int(order[tree.ranks[node]])])
            assert int(tokens[b, node]) == paths[-1][-1]


def test_dynamic_sequential_drafter_takes_the_likeliest_paths():
    """All nodes expanded: the best of all paths. A few expanded: the best of what they reach."""
    heads = random_heads(make_model(), kind=SequentialHeads, num_heads=2, scale=0.3)
    hidden = torch.randn(2, HIDDEN)
    tokens, tree = DynamicSequentialDrafter(heads, 20, top_k=VOCAB, width=VOCAB).draft(state_of(hidden))
    narrow, narrow_tree = DynamicSequentialDrafter(heads, 8, top_k=3, width=2).draft(state_of(hidden))
    assert narrow[:, 0].tolist() == tokens[:, 0].tolist() == [0, 1]
    for b in range(2):
        roots, below = torch.full((VOCAB,), b), torch.arange(VOCAB)
        probs = heads(hidden[b].expand(VOCAB, -1), torch.stack([roots, below])).softmax(-1).detach()
        first = probs[0, 0]
        score = {(i,): float(first[i]) for i in range(VOCAB)}
        score |= {(i, j): float(first[i] * probs[1, i, j]) for i in range(VOCAB) for j in range(VOCAB)}

        def paths(tokens, tree, b=b):
            out = [()]
            for node in range(1, tree.size):
                out.append((*out[int(tree.parents[b, node])], int(tokens[b, node])))
            return out[1:]

        best = sorted(score, key=lambda path: -score[path])
        assert sorted(paths(tokens, tree)) == sorted(best[:19])
        top = first.topk(3).indices.tolist()
        reached = {(i,) for i in top} | {(i, int(j)) for i in top[:2] for j in probs[1, i].topk(3).indices}
        assert len(reached) == 9
        assert sorted(paths(narrow, narrow_tree)) == sorted([path for path in best if path in reached][:7])


def drafters(model):
    heads, sequential = random_heads(model), random_heads(model, kind=SequentialHeads, scale=0.3)
    seeing = random_heads(model, sees_root=True)
    return {
        "static_root": MedusaDrafter(seeing, TokenTree.full([3, 2, 2])),
        "dynamic_root": DynamicMedusaDrafter(seeing, num_nodes=10, top_k=4),
        "static": MedusaDrafter(heads, TokenTree.full([3, 2, 2])),
        "dynamic": DynamicMedusaDrafter(heads, num_nodes=10, top_k=4),
        "sequential": SequentialDrafter(sequential, TokenTree.full([3, 2, 2])),
        "dynamic_sequential": DynamicSequentialDrafter(sequential, num_nodes=14, top_k=4, width=3),
        "root": MedusaDrafter(heads, TokenTree.chain(0)),
    }


PROMPTS = [[5, 9, 5, 9, 5], [17], [3, 1, 4, 1, 5, 9, 2, 6, 5]]


@pytest.mark.parametrize(
    "kind", ["static", "dynamic", "static_root", "dynamic_root", "sequential", "dynamic_sequential", "root"]
)
def test_greedy_text_is_that_of_plain_decoding(kind):
    model = make_model()
    drafter = drafters(model)[kind]
    want = TreeDecoder(model, NoDrafter()).generate(PROMPTS, 20).tokens
    assert TreeDecoder(model, drafter).generate(PROMPTS, 20).tokens == want
    assert TreeDecoder(model, drafter).generate(PROMPTS[1:2], 20).tokens == want[1:2]
    sampled = TreeDecoder(model, drafter).generate(PROMPTS, 20, mode="sampling", seed=3).tokens
    typical = TreeDecoder(model, drafter).generate(PROMPTS, 20, mode="typical", temperature=0.7).tokens
    assert [len(text) for text in sampled + typical] == [20] * 6


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "kind", ["static", "dynamic", "static_root", "dynamic_root", "sequential", "dynamic_sequential", "root"]
)
def test_greedy_text_is_that_of_plain_decoding_on_gpu(device, kind, cuda_graph):
    model = make_model(device=device)
    decoder = TreeDecoder(model, drafters(model)[kind], cuda_graph=cuda_graph)
    want = TreeDecoder(model, NoDrafter()).generate(PROMPTS, 20).tokens
    assert decoder.generate(PROMPTS, 20).tokens == want
    assert decoder.generate(PROMPTS, 20).tokens == want
    low = make_model(device=device, dtype=torch.bfloat16)
    texts = TreeDecoder(low, drafters(low)[kind], cuda_graph=cuda_graph).generate(PROMPTS, 20, mode="typical").tokens
    assert [len(text) for text in texts] == [20] * 3


def test_bad_input():
    model = make_model()
    heads = random_heads(model)
    for arguments, message in (((0, 1), "num_heads"), ((1, 0), "num_layers")):
        with pytest.raises(ValueError, match=message):
            MedusaHeads.from_model(model, *arguments)
    with pytest.raises(ValueError, match="lm_head"):
        MedusaHeads(2, 1, torch.zeros(3, VOCAB, HIDDEN))
    with pytest.raises(ValueError, match="hidden: expected a last dimension of 32"):
        heads(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="tree: expected a depth of at most 3"):
        MedusaDrafter(heads, TokenTree.chain(4))
    with pytest.raises(ValueError, match="tree: expected one tree"):
        MedusaDrafter(heads, TokenTree.best_first(torch.rand(2, 3, 4), 5))
    with pytest.raises(ValueError, match="tree: expected ranks below 61"):
        MedusaDrafter(heads, TokenTree.full([62]))
    sequential = random_heads(model, kind=SequentialHeads)
    for drafter, other in ((MedusaDrafter, sequential), (SequentialDrafter, heads)):
        with pytest.raises(TypeError, match="heads: "):
            drafter(other, TokenTree.chain(2))
    with pytest.raises(TypeError, match="heads: "):
        DynamicMedusaDrafter(sequential)
    with pytest.raises(TypeError, match="heads: "):
        DynamicSequentialDrafter(heads)
    for options, message in (
        ({"top_k": 62}, r"top_k: expected 1\.\.61"),
        ({"width": 0}, "width: expected at least 1"),
        ({"num_nodes": 1}, r"num_nodes: expected 2\.\."),
        ({"num_nodes": 24, "top_k": 2, "width": 4}, r"num_nodes: expected 2\.\.15"),  # 1 + 2 + 4 + 8
    ):
        with pytest.raises(ValueError, match=message):
            DynamicSequentialDrafter(sequential, **options)
    with pytest.raises(ValueError, match="embedding: expected"):
        SequentialHeads(1, 1, torch.zeros(VOCAB, HIDDEN), torch.zeros(VOCAB, 8))
    with pytest.raises(ValueError, match="top_k"):
        DynamicMedusaDrafter(heads, top_k=62)
    with pytest.raises(ValueError, match="num_nodes"):
        DynamicMedusaDrafter(heads, num_nodes=9, top_k=1)
    with pytest.raises(ValueError, match=r"state\.hidden"):
        MedusaDrafter(heads, TokenTree.chain(2)).draft(state_of(torch.zeros(1, HIDDEN, dtype=torch.float64)))


def test_broken_tree_files(tmp_path):
    with pytest.raises(ValueError, match=r"tree\.json: no such file"):
        load_tree(tmp_path)
    for text in ("{", "[]", "{}", '{"choices": [[0, 0]]}', '{"choices": 3}', '{"choices": [["a"]]}'):
        (tmp_path / "tree.json").write_text(text)
        with pytest.raises(ValueError, match=r"tree\.json: expected an object"):
            load_tree(tmp_path)
    (tmp_path / "tree.json").write_text('{"choices": [[0], [0, 1]]}')
    assert load_tree(tmp_path).parents.tolist() == [-1, 0, 1]


def test_a_smaller_tree_is_cut_from_a_saved_one(tmp_path):
    choices = [[0], [0, 0], [1], [0, 0, 0], [2], [0, 1]]  # best first
    (tmp_path / "tree.json").write_text(json.dumps({"choices": choices}))
    for num_nodes in range(2, 9):
        want = TokenTree.from_choices(choices[: num_nodes - 1])
        tree = load_tree(tmp_path, num_nodes)
        assert tree.parents.tolist() == want.parents.tolist() and tree.ranks.tolist() == want.ranks.tolist()
    assert load_tree(tmp_path, 1).size == 1 and load_tree(tmp_path).size == 7
    with pytest.raises(ValueError, match="num_nodes: expected at least 1, got 0"):
        load_tree(tmp_path, 0)
    (tmp_path / "tree.json").write_text(json.dumps({"choices": [[0, 0], [0]]}))
    with pytest.raises(ValueError, match=r"num_nodes: the first 1 paths of .* are no tree"):
        load_tree(tmp_path, 2)
    model = make_model()
    (tmp_path / "tree.json").write_text(json.dumps({"choices": choices}))
    random_heads(model, sees_root=True).save_pretrained(tmp_path)
    assert load_drafter(tmp_path, model, 4).num_nodes == 4 and load_drafter(tmp_path, model).num_nodes == 7


def test_shipped_heads():
    """For the demo's model alone. Where the weights are in the folder, they are small, whole and have their tree."""
    assert shipped_heads("some/other-model") is None
    folder = Path(medusa.__file__).parent / "smollm2_medusa"
    weights = folder / "medusa_heads.safetensors"
    assert shipped_heads(SMOLLM2) == (folder if weights.is_file() else None)
    assert "Apache" in (folder / "README.md").read_text()
    if weights.is_file():
        with torch.device("meta"):
            config = LlamaConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=1, num_attention_heads=9)
            model = LlamaForCausalLM(config)
        assert weights.stat().st_size < 16 * 2**20
        heads = MedusaHeads.from_pretrained(folder, model)
        assert heads.shared_lm_head and load_tree(folder).max_depth <= heads.num_heads
        assert load_tree(folder, 8).size == 8 and load_tree(folder).size >= 32
