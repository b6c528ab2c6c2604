"""P-tuning: PEFT's encoder by names, shapes and values, its files both ways, and that it learns."""

from __future__ import annotations

import copy
import math
import types

import pytest
import torch
from model_cases import random_model
from test_adapters_prompt import llama_3b
from tolerance import assert_as_accurate
from virtual_peers import assert_learns, check_peft_loads_ours, check_we_load_pefts

from posttrain import adapters
from posttrain.adapters import PromptEncoderConfig, attach, p_tuning
from posttrain.adapters.p_tuning import PromptEncoder
from posttrain.adapters.recipes import RECIPES

ENCODERS = [
    {"encoder_reparameterization_type": "MLP"},
    {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 24},
    {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 24},
    {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_num_layers": 3, "encoder_dropout": 0.5},
    {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_dropout": 0.5},
]
every_encoder = pytest.mark.parametrize("fields", ENCODERS)


@every_encoder
def test_shapes(fields):
    model, config = random_model(), PromptEncoderConfig(4, **fields)
    attach(model, config)
    actual = {key: tuple(p.shape) for key, p in adapters.adapter_parameters(model).items()}
    assert actual == p_tuning.optional_shapes(model, config)


@pytest.mark.parametrize(
    ("fields", "published"),
    [({"num_virtual_tokens": 20}, 28_382_208)],
)
def test_published_count(fields, published):
    """method_comparison/MetaMathQA of PEFT, Llama-3.2-3B."""
    shapes = p_tuning.optional_shapes(types.SimpleNamespace(config=llama_3b()), PromptEncoderConfig(**fields))
    assert sum(math.prod(shape) for shape in shapes.values()) == published


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_reparameterization_type": "mlp"}, "encoder_reparameterization_type is 'mlp'; expected 'MLP' or 'LSTM'"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size is -1"),
        ({"encoder_num_layers": 0}, "encoder_num_layers is 0"),
        ({"encoder_dropout": 1.0}, "encoder_dropout is 1.0"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        PromptEncoderConfig(**fields)


@torch.no_grad()
def test_dropout_is_the_encoders_and_not_what_is_saved():
    model = random_model()
    fields = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_dropout": 0.5}
    attach(model, PromptEncoderConfig(4, **fields))
    virtual = model.prompt_encoder["default"]
    still = virtual.embeddings()
    model.train()
    assert not torch.equal(virtual.embeddings(), virtual.embeddings())
    assert torch.equal(adapters.saved_tensors(model)["prompt_embeddings"], still) and virtual.training


def one_step(encoder, parameters, rate):
    """How far AdamW's first step moves the virtual tokens, on a gradient of random directions (eps: of no account)."""
    optimizer, before = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, eps=1e-30), encoder().detach()
    (encoder() * torch.randn_like(before)).sum().backward()
    optimizer.step()
    return (encoder().detach() - before).abs()


@pytest.mark.parametrize("hidden", [64, 576])
def test_the_last_layer_multiplies_the_rate(hidden):
    """docs/math/virtual_tokens.md: |dE| = eta (|h|_1 + 1) in every dimension."""
    torch.manual_seed(0)
    encoder, rate = PromptEncoder(1, 576, PromptEncoderConfig(1, encoder_hidden_size=hidden)), 1e-3
    wide = copy.deepcopy(encoder).double()
    predicted = rate * (wide.mlp_head[:-1](wide.embedding.weight).sum() + 1).expand(1, 576)
    steps = [one_step(each, each.mlp_head[-1].parameters(), rate) for each in (encoder, wide)]
    assert_as_accurate(predicted, *steps)


def test_recipe_moves_the_tokens_about_as_far_as_prompt_tunings():
    """At SmolLM2's width; three times as far is where P-tuning was seen not to learn."""
    torch.manual_seed(0)
    encoder = PromptEncoder(20, 576, RECIPES["p-tuning"].adapter())
    moved = one_step(encoder, encoder.parameters(), RECIPES["p-tuning"].learning_rate).square().mean().sqrt()
    assert 0.5 < moved / RECIPES["prompt"].learning_rate < 2


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_learns(tmp_path, kind):
    assert_learns(tmp_path, PromptEncoderConfig(8, encoder_reparameterization_type=kind, encoder_hidden_size=64), 0.01)


@pytest.mark.peers
@every_encoder
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_encoder_is_pefts(fields):
    peft = pytest.importorskip("peft")
    theirs = peft.PromptEncoder(
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=6, token_dim=32, num_transformer_submodules=1,
            **{"encoder_hidden_size": 32, **fields},
        )
    ).eval()  # fmt: skip
    ours = PromptEncoder(6, 32, PromptEncoderConfig(6, **fields)).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        plain, exact = theirs(torch.arange(6)[None])[0], copy.deepcopy(ours).double()()
        assert_as_accurate(ours(), plain, exact)
        assert_as_accurate(plain, ours(), exact)


@pytest.mark.peers
@pytest.mark.parametrize("fields", [ENCODERS[1], ENCODERS[2]])
def test_peft_loads_ours(tmp_path, fields):
    check_peft_loads_ours(tmp_path, "smollm2", PromptEncoderConfig(5, **fields))


@pytest.mark.peers
@pytest.mark.parametrize("fields", [ENCODERS[1], ENCODERS[2]])
def test_we_load_pefts(tmp_path, fields):
    make = lambda peft: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **fields)  # noqa: E731
    check_we_load_pefts(tmp_path, "qwen2", make)
