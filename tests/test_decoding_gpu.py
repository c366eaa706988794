"""What shortens a decoder's step on a GPU: top-k in two rounds, and Liger's fused layers."""

import types

import pytest
import torch
from test_heads import make_model, random_heads

from medusa_kernels import TokenTree
from medusa_kernels.decoding import MedusaDrafter, NoDrafter, TreeDecoder, fuse_elementwise, gpu


def check_topk(logits, k, got):
    values, indices = got
    want = logits.topk(k).values
    assert torch.equal(values, want) and torch.equal(logits.gather(-1, indices), want)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()  # no index twice, where logits are equal


@pytest.mark.parametrize(
    ("shape", "k", "piece"), [((2, 3, 96), 5, 8), ((7, 60), 12, 12), ((60,), 1, 2), ((1, 64), 8, 32)]
)
def test_topk_of_pieces(shape, k, piece):
    generator = torch.Generator().manual_seed(0)
    for logits in (torch.randn(shape, generator=generator), torch.randint(3, shape, generator=generator).float()):
        check_topk(logits, k, gpu._topk_of_pieces(logits, k, piece))


@pytest.mark.parametrize("vocab_size", [32000, 49152, 128256, 151936])
@pytest.mark.parametrize("k", [1, 10, 24])
def test_pieces_of_real_vocabularies(vocab_size, k):
    piece = gpu._piece(vocab_size, k)
    assert vocab_size % piece == 0 and k <= piece < vocab_size / 8 and vocab_size // piece * k < vocab_size / 8


def test_vocabularies_without_pieces():
    assert gpu._piece(49157, 10) == 49157  # a prime
    assert gpu._piece(4, 4) == 4


def test_fused_layers_are_for_a_gpu():
    with pytest.raises(ValueError, match="model: expected one on a GPU, got one on cpu"):
        fuse_elementwise(make_model())


def test_what_liger_replaces_for_all_models_is_taken_back():
    """Its classes, and on a CPU its functions."""
    modeling = types.ModuleType("modeling")
    modeling.Norm, modeling.rotary, modeling.other = int, lambda x, y: x + y, 3
    one, minus = torch.ones(()), lambda x, y: x - y
    calls = []
    for _ in range(2):  # a second model's layers are replaced: the function asks for the device once, as before
        before = dict(vars(modeling))
        modeling.Norm, modeling.rotary = float, minus
        gpu._confine(modeling, before)
        assert modeling.Norm is int and modeling.other == 3 and modeling.rotary(one, y=1) == 2
        calls.append(modeling.rotary)
    assert calls[0] is calls[1]
    on_gpu = types.SimpleNamespace(is_cuda=True)
    assert gpu._by_device(lambda x: "cpu", lambda x: "gpu")(on_gpu) == "gpu"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 1, 49152), (4, 8, 32000), (1, 20, 151936)])
def test_topk_on_gpu(shape):
    logits = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    check_topk(logits, 16, gpu.topk(logits, 16))


@pytest.mark.gpu
def test_fused_layers_on_gpu():
    pytest.importorskip("liger_kernel")
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    want = make_model().double().cuda()(ids).logits
    model = make_model().to("cuda", torch.bfloat16)
    eager = model(ids).logits
    fuse_elementwise(model)
    fused = model(ids).logits
    assert 0 < (fused - want).abs().max() <= 2 * (eager - want).abs().max()
    assert make_model()(ids.cpu()).logits.isfinite().all()  # a model on the CPU is as it was
    model = make_model().to("cuda")
    fuse_elementwise(model)
    heads = random_heads(model)
    tree = TokenTree.from_choices([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    plain, trees = (
        TreeDecoder(model, each).generate(prompts, 24) for each in (NoDrafter(), MedusaDrafter(heads, tree))
    )
    assert plain.tokens == trees.tokens
