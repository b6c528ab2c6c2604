"""Prefix tuning: where it starts, what it refuses, PEFT's files and gradients, and that it learns."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from model_cases import random_model
from test_adapters_prompt import TEXT, TOKENIZER, llama_3b
from tolerance import assert_as_accurate
from virtual_peers import IDS, T, assert_learns, check_peft_loads_ours, check_we_load_pefts

from posttrain import adapters, offline
from posttrain.adapters import PrefixTuningConfig, attach, prefix, virtual_tokens
from posttrain.adapters.virtual_tokens import pack, unpack
from posttrain.model import load
from posttrain.model.tokenizer import Tokenizer

FROM_TEXT = {"init_text": TEXT, "tokenizer_name_or_path": TOKENIZER}


def started(model, **fields):
    attach(model, PrefixTuningConfig(**fields))
    return adapters.saved_tensors(model)["prompt_embeddings"]


def test_layout_of_a_prefix():
    """Vector 2 l of a virtual token is its key in layer l, 2 l + 1 its value, head after head."""
    stored = torch.arange(2 * 3 * 2 * 2 * 4.0).view(2, -1)  # 2 virtual tokens, 3 layers, 2 heads of 4
    prefix = unpack(stored, 2, 4)
    key, value = prefix.layers[1]
    assert key.shape == (1, 2, 2, 4)
    assert key[0, 1, 0].tolist() == [20, 21, 22, 23] and value[0, 0, 1].tolist() == [72, 73, 74, 75]
    assert torch.equal(pack(prefix), stored)


@pytest.mark.parametrize("projection", [False, True])
def test_text_starts_as_if_it_had_been_read(projection):
    """The logits after it are those of the model that read it, with the MLP as without."""
    base = load(offline.path(), dtype="fp32")
    ids = torch.randint(3, 259, (1, 20))
    words = torch.tensor((Tokenizer.load(TOKENIZER).encode(TEXT) * 2)[:30])[None]
    model, wide = copy.deepcopy(base), copy.deepcopy(base).double()
    started(model, num_virtual_tokens=30, prefix_projection=projection, **FROM_TEXT)
    with torch.no_grad():
        plain, exact = (m(torch.cat((words, ids.to(words)), 1))[:, 30:] for m in (base, wide))
        if not projection:
            assert_as_accurate(model(ids), plain, exact)
            return
        target = pack(wide.prefix(wide.model.embed_tokens.weight[words[0]]))
    # What the MLP gives is fp32 sums of encoder_hidden_size products: off by at most that many roundings of the largest.
    encoder = model.prompt_encoder["default"].encoder
    inner = encoder.transform[:-1](encoder.embedding.weight)
    largest = encoder.transform[-1].weight.abs().double() @ inner.abs().double().T
    error = (adapters.saved_tensors(model)["prompt_embeddings"].double() - target).abs().max()
    assert error <= inner.shape[1] * torch.finfo(torch.float32).eps * largest.max()


def test_sampled_words_start_as_if_they_had_been_read(monkeypatch):
    """Each is one of the vocabulary's first, none twice."""
    monkeypatch.setattr(virtual_tokens, "MOST_COMMON", 40)
    model = random_model()
    torch.manual_seed(3)
    words = torch.randperm(40)[:9]
    with torch.no_grad():
        expected = pack(model.prefix(model.model.embed_tokens.weight[words]))
    torch.manual_seed(3)
    assert torch.equal(started(model, num_virtual_tokens=9, init_weights="sample_vocab"), expected)


@pytest.mark.parametrize("projection", [False, True])
def test_zero(projection):
    model = random_model()
    assert not started(model, num_virtual_tokens=4, prefix_projection=projection, init_weights="zero").any()
    model(IDS).logsumexp(-1).sum().backward()
    gradients = [p.grad for p in adapters.adapter_parameters(model).values()]
    assert any(g.any() for g in gradients)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_weights": "ones"}, "init_weights is 'ones'; expected None, 'zero' or 'sample_vocab'"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size is 0"),
        ({"init_text": "x"}, "init_text needs tokenizer_name_or_path"),
        ({**FROM_TEXT, "init_weights": "zero"}, "excludes init_weights"),
        ({**FROM_TEXT, "init_text": ""}, "the text '' gives no tokens"),
        (FROM_TEXT, "gives the id .*, and the model's vocabulary has 97"),
        (
            {**FROM_TEXT, "num_virtual_tokens": 9, "prefix_projection": True, "encoder_hidden_size": 8},
            "encoder_hidden_size is 8: an MLP so narrow cannot start 9 virtual tokens",
        ),
    ],
)
def test_wrong_starts_change_nothing(fields, message):
    model = random_model()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach(model, PrefixTuningConfig(**fields))
    assert list(model.state_dict()) == keys and not adapters.adapter_names(model)


def test_fields_that_peft_lacks_are_not_written():
    content = PrefixTuningConfig(3, **FROM_TEXT).to_peft(random_model())
    assert not content.keys() & FROM_TEXT.keys() and content["num_transformer_submodules"] == 1


@pytest.mark.parametrize(("count", "published"), [(200, 11_468_800), (50, 2_867_200)])
def test_published_counts(count, published):
    """method_comparison/MetaMathQA of PEFT, Llama-3.2-3B."""
    ((rows, width),) = prefix.shapes(types.SimpleNamespace(config=llama_3b()), PrefixTuningConfig(count)).values()
    assert rows * width == published


@pytest.mark.parametrize("hidden", [None, 12])
def test_shapes_of_the_mlp(hidden):
    model = random_model()
    config = PrefixTuningConfig(4, prefix_projection=True, encoder_hidden_size=hidden)
    attach(model, config)
    actual = {key: tuple(p.shape) for key, p in adapters.adapter_parameters(model).items()}
    assert actual == prefix.optional_shapes(model, config)
    assert not prefix.optional_shapes(model, PrefixTuningConfig(4))


@pytest.mark.parametrize(("fields", "rate"), [(FROM_TEXT, 0.03), ({"prefix_projection": True}, 0.01)])
def test_learns(tmp_path, fields, rate):
    assert_learns(tmp_path, PrefixTuningConfig(8, **fields), rate)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
@pytest.mark.parametrize("projection", [False, True])
def test_peft_loads_ours(tmp_path, name, projection):
    check_peft_loads_ours(tmp_path, name, PrefixTuningConfig(5, prefix_projection=projection))


@pytest.mark.peers
@pytest.mark.parametrize("projection", [False, True])
def test_we_load_pefts(tmp_path, projection):
    check_we_load_pefts(
        tmp_path,
        "qwen2",
        lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection),
    )


@pytest.mark.peers
def test_gradients_are_as_accurate_as_pefts(tmp_path):
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    model, peer = check_we_load_pefts(tmp_path, "smollm2", lambda peft: peft.PrefixTuningConfig(**settings))
    wide = copy.deepcopy(model).double()
    for output in (model(IDS), wide(IDS), peer(IDS).logits):
        output[:, -T:].log_softmax(-1)[..., 5].sum().backward()
    ours, exact = (adapters.adapter_parameters(m)["prompt_embeddings"].grad for m in (model, wide))
    assert_as_accurate(ours, peer.prompt_encoder["default"].embedding.weight.grad, exact)


@pytest.mark.peers
def test_text_starts_where_pefts_does():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

    peer = transformers.AutoModelForCausalLM.from_pretrained(offline.path(), dtype=torch.float32)
    peer = peft.get_peft_model(peer, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12))
    tokenizer = transformers.AutoTokenizer.from_pretrained(offline.path())
    theirs = initialize_kv_prefix_from_text(peer, tokenizer, text=TEXT, use_chat_template=False)
    ours, exact = (started(load(offline.path(), dtype="fp32").to(d), num_virtual_tokens=12, **FROM_TEXT) for d in DTYPES)
    assert_as_accurate(ours, theirs, exact)


DTYPES = torch.float32, torch.float64
