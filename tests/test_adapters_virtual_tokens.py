"""Virtual tokens in the decoder, against the base reading real tokens there; and as adapters: switched, saved, resumed.

A prompt made of tokens' embeddings, and a prefix made of their keys and values, do what the tokens themselves do before
each sequence. So the base that reads them says what is right, in every layout: padded, packed, cached, windowed.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from model_cases import random_model
from safetensors.torch import load_file, save_file
from small_run import examples, settings
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, attach
from posttrain.adapters.virtual_tokens import pack
from posttrain.checkpoint import trainable
from posttrain.errors import PosttrainError
from posttrain.evaluate import ChoiceItem, choice_logprobs, perplexity
from posttrain.model import KVCache, generate
from posttrain.quantized import quantize_model
from posttrain.sft import sft

WORDS = [11, 3, 60, 42, 7]  # the tokens that virtual ones stand for
P = len(WORDS)
IDS = torch.arange(24).view(2, 12)
KINDS = {
    "prompt": PromptTuningConfig(P),
    "prefix": PrefixTuningConfig(P),
    "projected": PrefixTuningConfig(P, prefix_projection=True, encoder_hidden_size=8),
    "mlp": PromptEncoderConfig(P, encoder_hidden_size=8),
    "lstm": PromptEncoderConfig(P, encoder_reparameterization_type="LSTM", encoder_hidden_size=8),
}
ENCODED = ("projected", "mlp", "lstm")
every_kind = pytest.mark.parametrize("kind", KINDS)
both_kinds = pytest.mark.parametrize("kind", ["prompt", "prefix"])


@torch.no_grad()
def reader(kind, base):
    """A copy of the model whose virtual tokens are WORDS."""
    model = copy.deepcopy(base)
    attach(model, KINDS[kind])
    (parameter,) = adapters.adapter_parameters(model).values()
    words = model.model.embed_tokens.weight[torch.tensor(WORDS)]
    parameter.copy_(words if kind == "prompt" else pack(model.prefix(words)))
    return model


@torch.no_grad()
def after_words(model, ids):
    """Logits (1, T, V) of the base that reads WORDS first."""
    return model(torch.cat((torch.tensor([WORDS]), ids), 1))[:, P:]


def models(kind, name):
    """The base, the model with virtual tokens, and the base in float64."""
    base = random_model(name)
    return base, reader(kind, base), copy.deepcopy(base).double()


@both_kinds
@pytest.mark.parametrize("name", ["smollm2", "llama3", "llama_biases", "mistral_sliding", "qwen2_sliding", "qwen3"])
def test_virtual_tokens_are_read_as_tokens_are(kind, name):
    base, model, wide = models(kind, name)
    ids = torch.randint(0, 97, (3, 14))
    with torch.no_grad():
        ours = model(ids)
    plain, exact = (torch.cat([after_words(m, row[None]) for row in ids]) for m in (base, wide))
    assert_as_accurate(ours, plain, exact)


@both_kinds
def test_half_precision_is_as_accurate(kind):
    base = random_model(dtype=torch.bfloat16)
    with torch.no_grad():
        ours = reader(kind, base)(IDS[:1])
    assert_as_accurate(ours, after_words(base, IDS[:1]), after_words(copy.deepcopy(base).double(), IDS[:1]))


@both_kinds
@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding"])
def test_padding_and_packing_change_nothing(kind, name):
    """Windows of 7 end within the virtual tokens, and padding or other segments lie between them and a row's tokens."""
    base, model, wide = models(kind, name)
    rows = [torch.randint(0, 97, (1, n)) for n in (9, 4, 1)]
    plain, exact = ([after_words(m, row)[0] for row in rows] for m in (base, wide))
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, 9 - row.shape[1] :], mask[i, 9 - row.shape[1] :] = row, True
    segments = torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)] + [torch.tensor([[-1, -1]])], 1)
    positions = torch.cat([torch.arange(row.shape[1])[None] for row in rows] + [torch.tensor([[0, 0]])], 1)
    packed_ids = torch.nn.functional.pad(torch.cat(rows, 1), (0, 2))
    with torch.no_grad():
        padded = model(ids, attention_mask=mask)
        packed = model(packed_ids, positions, segments)
    assert torch.isfinite(padded).all() and torch.isfinite(packed).all()
    assert_as_accurate(padded[mask], torch.cat(plain), torch.cat(exact))
    assert_as_accurate(packed[0, :-2], torch.cat(plain), torch.cat(exact))


@both_kinds
@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding"])
def test_cached_steps_with_and_without_padding(kind, name):
    """A prompt, one token, several at once, and again after going back; the cache's length counts no virtual token."""
    base, model, wide = models(kind, name)
    ids = torch.randint(0, 97, (2, 16))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :5] = False
    for padded in (False, True):
        rows = [ids[0], ids[1, 5:] if padded else ids[1]]
        plain, exact = (torch.cat([after_words(m, row[None])[0, -8:] for row in rows]) for m in (base, wide))
        cache = KVCache(model.config, 2, 3, torch.float32)
        with torch.no_grad():
            model(ids[:, :8], attention_mask=mask if padded else None, cache=cache)
            assert cache.length == 8 and cache.virtual_tokens == P
            steps = [model(ids[:, a:b], cache=cache) for a, b in ((8, 9), (9, 13), (13, 16))]
            assert_as_accurate(torch.cat(steps, 1).flatten(0, 1), plain, exact)
            cache.length = 8
            assert_as_accurate(model(ids[:, 8:], cache=cache).flatten(0, 1), plain, exact)
            cache.length = 0  # the virtual tokens stay
            cache.valid = None
            assert_as_accurate(model(ids[:1].expand(2, 16), cache=cache)[0, -8:], plain[:8], exact[:8])


@both_kinds
@pytest.mark.parametrize("quantized", [False, True])
def test_generation_equals_reading_the_words(kind, quantized):
    base = random_model("smollm2" if quantized else "mistral_sliding")
    if quantized:
        quantize_model(base)
    model = reader(kind, base)
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7]]
    expected = generate(base, [WORDS + prompt for prompt in prompts], 12)
    assert generate(model, prompts, 12) == expected
    assert [generate(model, [prompt], 12)[0] for prompt in prompts] == expected


@both_kinds
def test_evaluation_equals_reading_the_words(kind):
    """Prompts that share a prefix, choices of several tokens: what evaluate.py does with caches."""
    base, model, wide = models(kind, "smollm2")
    items = [ChoiceItem([*range(10), 20 + i, *range(i)], [[1], [2, 3], [4, 5, 6]], 0) for i in range(4)]
    longer = [ChoiceItem([*WORDS, *item.prompt], item.choices, 0) for item in items]
    plain, exact = (torch.tensor(choice_logprobs(m, longer), dtype=torch.float64) for m in (base, wide))
    assert_as_accurate(torch.tensor(choice_logprobs(model, items), dtype=torch.float64), plain, exact)
    with pytest.raises(ValueError, match="window must lie between 2 and the model's context of 59"):
        perplexity(model, list(range(90)), window=60)


@both_kinds
def test_the_context_holds_the_virtual_tokens_too(kind):
    model = reader(kind, random_model())  # 64 positions
    assert model.context_length == 64 - P
    assert len(generate(model, [[1] * 55], 4)[0]) == 4
    with pytest.raises(ValueError, match=r"prompt 0 has 56 tokens.*context of 59 \(beside 5 virtual tokens\)"):
        generate(model, [[1] * 56], 4)


def loss(model, ids):
    return model(ids)[..., :97].log_softmax(-1)[..., 5].sum()


def test_gradient_of_a_prompt():
    """The words' rows of the embedding have the same gradient where every row reads them and nothing else does."""
    base, model, wide = models("prompt", "llama3")
    ids = torch.randint(70, 97, (3, 9))
    loss(model, ids).backward()
    gradients = []
    for any_model in (base, wide):
        logits = any_model(torch.cat((torch.tensor([WORDS]).expand(3, P), ids), 1))[:, P:]
        logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append(any_model.model.embed_tokens.weight.grad[torch.tensor(WORDS)])
    assert_as_accurate(adapters.adapter_parameters(model)["prompt_embeddings"].grad, *gradients)


@every_kind
def test_activation_checkpointing_changes_no_gradient(kind):
    model = random_model("qwen3").train()
    attach(model, KINDS[kind])
    gradients = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        loss(model, IDS).backward()
        gradients.append({name: p.grad.clone() for name, p in adapters.adapter_parameters(model).items()})
    assert all(g.any() for g in gradients[0].values())
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


def logits(model):
    with torch.no_grad():
        return model(IDS)


@every_kind
@pytest.mark.parametrize("quantized", [False, True])
def test_switching_and_taking_off(kind, quantized):
    model = random_model("qwen2")
    if quantized:
        quantize_model(model)
    keys, base = list(model.state_dict()), logits(model)
    attach(model, KINDS[kind], "first")
    first = logits(model)
    attach(model, KINDS[kind], "second")
    second = logits(model)
    assert len({tuple(t.flatten().tolist()) for t in (base, first, second)}) == 3
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in adapters.adapter_parameters(model, "second").values()
    }
    adapters.set_adapter(model, "first")
    assert torch.equal(logits(model), first)
    with adapters.disabled(model):
        assert torch.equal(logits(model), base) and model.context_length == 64
    for refused in (adapters.merge, adapters.merge_and_unload):
        with pytest.raises(ValueError, match="is no change of weights and cannot be merged"):
            refused(model)
    with pytest.raises(ValueError, match="the model's adapters are of .*, and this one is of LoraConfig"):
        attach(model, LoraConfig())
    copied = copy.deepcopy(model)
    adapters.set_adapter(copied, "second")
    assert torch.equal(logits(copied), second) and torch.equal(logits(model), first)
    adapters.delete_adapter(model, "first")
    assert torch.equal(logits(model), base)
    adapters.delete_adapter(model, "second")
    assert torch.equal(logits(model), base) and list(model.state_dict()) == keys and model.virtual is None


@torch.no_grad()
def test_a_cache_begun_otherwise_is_refused():
    model = random_model()
    cache = KVCache(model.config, 2, 20, torch.float32)
    before = model(IDS, cache=cache)
    attach(model, KINDS["prompt"], "one")
    with pytest.raises(ValueError, match="the cache holds 12 tokens that saw 0 virtual tokens"):
        model(IDS, cache=cache)
    cache.length = 0
    assert torch.equal(model(IDS, cache=cache), model(IDS, cache=KVCache(model.config, 2, 20, torch.float32)))
    capacity = cache.capacity
    attach(model, PromptTuningConfig(2), "two")
    with pytest.raises(ValueError, match="the cache holds 12 tokens that saw 5 virtual tokens"):
        model(IDS, cache=cache)
    cache.length = 0
    adapters.disable(model)
    assert torch.equal(model(IDS, cache=cache), before)
    assert capacity == 20 + P and cache.capacity == 20


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, kind, dtype):
    first = random_model(dtype=dtype)
    base = copy.deepcopy(first)
    attach(first, KINDS[kind])
    adapters.save_adapter(first, tmp_path)
    second = copy.deepcopy(base)
    assert adapters.load_adapter(second, tmp_path, "again")
    assert torch.equal(logits(second), logits(first))
    one, two = (adapters.adapter_parameters(model) for model in (first, second))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert adapters.adapter_configs(second)["again"] == adapters.adapter_configs(first)["default"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert ("prompt_encoder.embedding.weight" in stored) == (kind in ENCODED)
    assert trainable(first).keys() == one.keys() <= stored.keys()


@pytest.mark.parametrize("kind", ENCODED)
def test_an_encoder_can_be_dropped_and_pefts_files_lack_it(tmp_path, kind):
    model = random_model()
    base = copy.deepcopy(model)
    attach(model, KINDS[kind])
    before = logits(model)
    adapters.save_adapter(model, tmp_path / "whole")
    adapters.drop_encoder(model, "default")
    adapters.drop_encoder(model, "default")
    assert torch.equal(logits(model), before)
    assert [(k, p.requires_grad) for k, p in adapters.adapter_parameters(model).items()] == [("prompt_embeddings", True)]
    adapters.save_adapter(model, tmp_path / "small")
    small, whole = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("small", "whole"))
    assert small.keys() == {"prompt_embeddings"} < whole.keys()
    assert torch.equal(small["prompt_embeddings"], whole["prompt_embeddings"])
    adapters.load_adapter(base, tmp_path / "small")
    assert torch.equal(logits(base), before)


def edit(path, tensors=None, **content):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    if tensors:
        file = path / "adapter_model.safetensors"
        stored = load_file(file)
        tensors(stored)
        save_file(stored, file)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("prompt", {"tensors": lambda t: t.update(other=t.pop("prompt_embeddings"))}, "prompt_embeddings is missing"),
        ("prompt", {"token_dim": 48}, r"token_dim is 48, and this model has 64 \(hidden_size\); is it an adapter of another"),
        ("prefix", {"token_dim": 64}, r"token_dim is 64, and this model has 32 \(2 key-value heads of 16\)"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads is 4, and this model has 2"),
        ("mlp", {"num_layers": 4}, "num_layers is 4, and this model has 3"),
        ("mlp", {"tensors": lambda t: t.pop("prompt_encoder.mlp_head.2.bias")}, "prompt_encoder.mlp_head.2.bias is missing"),
        ("mlp", {"encoder_hidden_size": 9}, r"prompt_encoder.mlp_head.0.bias is \(8,\) and the layer takes \(9,\)"),
        ("mlp", {"encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type is 'GRU'"),
        ("prompt", {"num_virtual_tokens": 6}, r"prompt_embeddings is \(5, 64\) and the layer takes \(6, 64\)"),
        ("prompt", {"num_virtual_tokens": 64}, "num_virtual_tokens is 64, and the model's context of 64"),
        ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens is null; expected int"),
        ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules is 2; a decoder has 1"),
        ("prompt", {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    ],
)  # fmt: skip
def test_a_wrong_file_changes_nothing(tmp_path, kind, damage, message):
    model = random_model()
    base = copy.deepcopy(model)
    attach(model, KINDS[kind])
    adapters.save_adapter(model, tmp_path)
    edit(tmp_path, **damage)
    keys = list(base.state_dict())
    with pytest.raises(PosttrainError, match=message):
        adapters.load_adapter(base, tmp_path)
    assert list(base.state_dict()) == keys and base.virtual is None and not adapters.adapter_names(base)


def test_wrong_settings_change_nothing():
    model = random_model()
    keys = list(model.state_dict())
    for kind in KINDS.values():
        for count in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match="num_virtual_tokens is .*; expected (a whole number of at least 1|int)"):
                type(kind)(count)
        with pytest.raises(ValueError, match="num_virtual_tokens is 64, and the model's context of 64 must hold tokens"):
            attach(model, type(kind)(64))
        with pytest.raises(ValueError, match="num_layers is 5, and this model has 3"):
            attach(model, type(kind)(num_layers=5))
        with pytest.raises(ValueError, match="not of a Sequential"):
            attach(torch.nn.Sequential(torch.nn.Linear(3, 3)), kind)
    assert list(model.state_dict()) == keys and model.virtual is None and not adapters.adapter_names(model)


class Killed(Exception):
    pass


def kill_after(step):
    def on_step(entry):
        if entry["step"] == step:
            raise Killed

    return on_step


def run(folder, config, **changes):
    torch.manual_seed(0)
    model = random_model(dtype=torch.bfloat16, num_hidden_layers=2)
    sft(model, examples(), settings(folder, max_steps=5), config, quiet=True, **changes)
    return {key: p.detach() for key, p in adapters.adapter_parameters(model).items()}


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8, encoder_dropout=0.2),
        KINDS["projected"],
    ],
)
def test_killed_and_resumed_ends_in_the_same_bits(tmp_path, config):
    straight = run(tmp_path / "straight", config)
    with pytest.raises(Killed):
        run(tmp_path / "killed", config, on_step=kill_after(3))
    resumed = run(tmp_path / "killed", config, resume=True)
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[key], resumed[key]) for key in straight)
    for file in ("adapter_model.safetensors", "checkpoint-5/adapter_model.safetensors"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_examples_must_fit_beside_the_virtual_tokens(tmp_path):
    model = random_model(max_position_embeddings=20)
    longest = max(len(example.input_ids) for example in examples())
    config = PromptTuningConfig(20 - longest + 1)
    with pytest.raises(PosttrainError, match=f"longest example has {longest} tokens; .* the model's context holds {longest - 1}"):
        sft(model, examples(), settings(tmp_path), config, quiet=True)
    assert not adapters.adapter_names(model)
    attach(model, config)
    with pytest.raises(PosttrainError, match=f"the model's context holds {longest - 1}"):
        sft(model, examples(), settings(tmp_path), quiet=True)
