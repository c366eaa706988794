"""Packed linear layers on a CPU: the same numbers and texts, and PyTorch's own layers where they would not be."""

import pytest
import torch
import torch.nn.functional as F
from test_decoding import PROMPTS, greedy, make_model
from torch import nn

from medusa_kernels import TokenTree
from medusa_kernels.decoding import MedusaDrafter, MedusaHeads, NgramDrafter, TreeDecoder, cpu, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = nn.Linear(48, 80)
    assert pack_linears(layer) == 1
    return layer


def uses_packed(layer, monkeypatch) -> bool:
    """Whether a call reaches oneDNN's own operator: PyTorch's is taken away."""
    monkeypatch.setattr(cpu.F, "linear", lambda *_: None)
    out = layer(torch.ones(2, 48))
    monkeypatch.undo()
    return out is not None


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (64, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_pytorchs(shape, bias, monkeypatch):
    torch.manual_seed(1)
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert pack_linears(layer) == 1
    with torch.inference_mode():
        assert uses_packed(layer, monkeypatch)
        torch.testing.assert_close(layer(x).double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_changed_weight_is_not_ignored(layer, monkeypatch):
    with torch.no_grad():
        assert uses_packed(layer, monkeypatch)
        layer.weight.zero_()
        assert not uses_packed(layer, monkeypatch)
        assert torch.equal(layer(torch.ones(2, 48)), layer.bias.expand(2, 80))
        assert pack_linears(layer) == 1 and uses_packed(layer, monkeypatch)


def test_gradients_flow(layer, monkeypatch):
    assert not uses_packed(layer, monkeypatch)
    layer(torch.ones(2, 48)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((80, 48), 2.0))


def test_other_dtypes_stay(monkeypatch):
    assert pack_linears(nn.Sequential(nn.Linear(8, 8).double(), nn.Linear(8, 8).bfloat16(), nn.Embedding(8, 8))) == 0


def test_texts_stay():
    model = make_model("llama")
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    heads, tree = MedusaHeads.from_model(model, 3), TokenTree.full([3, 2, 1])
    assert pack_linears(model) == 2 * 7 + 1
    for drafter in (NgramDrafter(num_nodes=9), MedusaDrafter(heads, tree)):
        decoder = TreeDecoder(model, drafter)
        assert decoder.generate(PROMPTS, 20, eos_token_id=()).tokens == expected
