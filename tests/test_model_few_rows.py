"""Dense products of few rows while generating: as accurate, by the engine where nothing wants a gradient, nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from model_cases import random_model
from tolerance import assert_as_accurate

from posttrain.kernels.cpu import dense_linear
from posttrain.model import few_rows, generate
from posttrain.model.few_rows import dense_few_rows


def stop(*_):
    raise RuntimeError("stop")


def untouched(model):
    return not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "llama_biases"])  # a tied head, biases, and neither
def test_dense_layers_take_few_rows(name, monkeypatch):
    """As accurate as F.linear, by the engine where nothing wants a gradient, and put back afterwards."""
    model, calls = random_model(name, torch.bfloat16), []
    ids, engine = torch.randint(0, 97, (2, 5)), few_rows.dense_linear
    monkeypatch.setattr(few_rows, "dense_linear", lambda *given: calls.append(given) or engine(*given))
    plain = model(ids).detach()  # with gradients
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(ids)
        with dense_few_rows(model):
            found = model(ids)
    layers = sum(type(module) is torch.nn.Linear for module in model.modules()) + model.config.tie_word_embeddings
    assert len(calls) == layers and untouched(model)
    assert_as_accurate(found, plain, exact)
    with dense_few_rows(model):
        model(ids).float().sum().backward()
    assert len(calls) == layers and all(p.grad is not None for p in model.parameters())
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, [[1]], 4, on_token=stop)
    assert untouched(model)


def test_dense_layers_that_somebody_else_has_changed_are_left_alone():
    model, seen = random_model("smollm2", torch.bfloat16), []
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = mine = lambda x: seen.append(1) or F.linear(x, layer.weight)
    generate(model, [[1, 2]], 3)
    assert len(seen) == 3 and layer.forward is mine


def test_a_tied_head_is_the_engines_product():
    """Whose rows do not depend on the batch where there is AMX: tests/test_cpu_multi_lora.py."""
    model, hidden = random_model("smollm2", torch.bfloat16, vocab_size=96), torch.randn(2, 10, 64).bfloat16()
    weight = model.model.embed_tokens.weight
    with torch.inference_mode():
        expected = dense_linear(hidden.view(20, 64), weight, None).view(2, 10, 96)
        assert torch.equal(model.head(hidden), expected)
