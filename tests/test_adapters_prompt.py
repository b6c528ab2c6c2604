"""Prompt tuning: where it starts, what it refuses, PEFT's files both ways, and that it learns."""

from __future__ import annotations

import types

import pytest
import torch
from model_cases import random_model
from test_adapters_virtual_tokens import WORDS, after_words, models
from tolerance import assert_as_accurate
from virtual_peers import assert_learns, check_peft_loads_ours, check_we_load_pefts

from posttrain import adapters, offline
from posttrain.adapters import PromptTuningConfig, attach, prompt, virtual_tokens
from posttrain.model import KVCache, ModelConfig, generate, load
from posttrain.model.tokenizer import Tokenizer

TEXT = "Is this review positive?"
TOKENIZER = str(offline.path())


def started(model, **fields):
    attach(model, PromptTuningConfig(**fields))
    return adapters.adapter_parameters(model)["prompt_embeddings"].detach()


def from_text(count, text=TEXT, tokenizer=TOKENIZER):
    return {
        "num_virtual_tokens": count,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": tokenizer,
    }


@pytest.mark.parametrize("count", [6, 60])
def test_text_is_cut_or_repeated(count):
    model = load(offline.path())
    ids = torch.tensor((Tokenizer.load(TOKENIZER).encode(TEXT) * 3)[:count])
    start = started(model, **from_text(count))
    assert torch.equal(start, model.model.embed_tokens.weight[ids].float()) and start.dtype == torch.float32


def test_sampled_vocabulary_is_of_the_first_ids_each_at_most_once(monkeypatch):
    monkeypatch.setattr(virtual_tokens, "MOST_COMMON", 40)
    model = random_model()
    for count in (40, 45):
        start = started(model, num_virtual_tokens=count, prompt_tuning_init="SAMPLE_VOCAB")
        rows = (start[:, None] == model.model.embed_tokens.weight).all(-1).nonzero()[:, 1].tolist()
        assert set(rows[:40]) == set(range(40)) and len(rows) == count
        adapters.delete_adapter(model, "default")


def test_random_vectors_are_as_large_as_the_vocabularys():
    model, count = random_model(), 60
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 32:].mul_(100).add_(7)
    weight = model.model.embed_tokens.weight.detach()
    noise = (started(model, num_virtual_tokens=count) - weight.mean(0)) / weight.std(0)
    # Of n draws from N(0, 1): mean and deviation within five standard errors.
    for part in (noise[:, :32], noise[:, 32:]):
        n = part.numel()
        assert abs(part.mean()) < 5 * n**-0.5 and abs(part.std() - 1) < 5 * (2 * n) ** -0.5


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt_tuning_init": "text"}, ValueError, "prompt_tuning_init is 'text'; expected one of RANDOM, SAMPLE_VOCAB, TEXT"),
        (from_text(4, text=None), ValueError, "prompt_tuning_init='TEXT' needs prompt_tuning_init_text"),
        (from_text(4, tokenizer=None), ValueError, "prompt_tuning_init='TEXT' needs tokenizer_name_or_path"),
        (from_text(4, text=""), ValueError, "the text '' gives no tokens"),
        (from_text(4, tokenizer="absent"), FileNotFoundError, "absent/tokenizer.json does not exist"),
        (from_text(4), ValueError, "gives the id .*, and the model's vocabulary has 97"),
    ],
)
def test_wrong_starts_change_nothing(fields, error, message):
    model = random_model()
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        attach(model, PromptTuningConfig(**fields))
    assert list(model.state_dict()) == keys and not adapters.adapter_names(model)


def test_published_count():
    """method_comparison/MetaMathQA of PEFT: 200 virtual tokens on Llama-3.2-3B."""
    (shape,) = prompt.shapes(types.SimpleNamespace(config=llama_3b()), PromptTuningConfig(200)).values()
    assert shape[0] * shape[1] == 614_400


def llama_3b():
    return ModelConfig("LlamaForCausalLM", 128256, 3072, 8192, 28, 24, 8, 128, 131072)


def test_learns(tmp_path):
    assert_learns(tmp_path, PromptTuningConfig(**from_text(8)), 0.03)


@torch.no_grad()
def test_dynamic_scaling_stretches_a_prompt_with_its_row():
    """Past the 16 trained positions every row's frequencies go by its own length, its virtual tokens' included."""
    base, model, wide = models("prompt", "llama_dynamic")
    rows = [torch.randint(0, 97, (1, n)) for n in (20, 13, 4)]
    plain, exact = ([after_words(m, row)[0] for row in rows] for m in (base, wide))
    ids, mask = torch.zeros(3, 20, dtype=torch.int64), torch.zeros(3, 20, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, 20 - row.shape[1] :], mask[i, 20 - row.shape[1] :] = row, True
    cache = KVCache(model.config, 3, 20, torch.float32)
    model(ids[:, -2:], cache=cache)
    cache.length = 0  # what is read next is longer
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"position_ids": positions}, {"cache": cache}):
        assert_as_accurate(model(ids, attention_mask=mask, **given)[mask], torch.cat(plain), torch.cat(exact))
    for row, one, two in zip(rows, plain, exact, strict=True):
        assert_as_accurate(model(row)[0], one, two)
    prompts = [row[0].tolist() for row in rows]
    assert generate(model, prompts, 4) == generate(base, [WORDS + prompt for prompt in prompts], 4)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["smollm2", "qwen2", "llama_dynamic"])
def test_peft_loads_ours(tmp_path, name):
    check_peft_loads_ours(tmp_path, name, PromptTuningConfig(5))


@pytest.mark.peers
@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_we_load_pefts(tmp_path, init):
    check_we_load_pefts(
        tmp_path,
        "llama3",
        lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init=init),
    )


@pytest.mark.peers
def test_text_starts_where_pefts_does(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(offline.path(), dtype=torch.float32)
    peer = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", **from_text(30)))
    start = started(load(offline.path(), dtype="fp32"), **from_text(30))
    assert torch.equal(start, peer.prompt_encoder["default"].embedding.weight)
    peer.save_pretrained(tmp_path)
    model = load(offline.path(), dtype="fp32")
    adapters.load_adapter(model, tmp_path)
    assert adapters.adapter_configs(model)["default"].prompt_tuning_init_text == TEXT
