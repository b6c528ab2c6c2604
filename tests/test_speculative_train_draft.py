"""Training drafts: the same bits however it is interrupted, what is saved is what was trained, another base is refused."""

from __future__ import annotations

import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from draft_cases import examples, small_target
from tolerance import assert_as_accurate

from posttrain.data import IGNORE_INDEX, Example
from posttrain.errors import PosttrainError
from posttrain.fingerprint import fingerprint
from posttrain.model.loading import load
from posttrain.model.safetensors_file import SafetensorsReader
from posttrain.speculative.continuations import (
    ContinuationConfig,
    continue_prompts,
    own_prompts,
    read_continuations,
    recipe,
    review_prompts,
    write_continuations,
)
from posttrain.speculative.draft_data import WIDTH, DraftBatch, collate, compute_items, shifted, split
from posttrain.speculative.eagle_head import load_eagle
from posttrain.speculative.heads import draft_vocabulary, places
from posttrain.speculative.medusa_heads import load_medusa
from posttrain.speculative.soft_targets import linear_kl
from posttrain.speculative.train_draft import DraftConfig, train_draft
from posttrain.speculative.truncated import agreement, spread_layers, truncate
from posttrain.trainer import TrainConfig

KINDS = {
    "medusa": DraftConfig("medusa", num_heads=2, vocab_size=8),
    "eagle": DraftConfig("eagle", unroll=2, noise=0.1, vocab_size=8, depths=2),
    "eagle3": DraftConfig("eagle", version=3, unroll=2, vocab_size=None, depths=2),
    "draft": DraftConfig("draft", layers=(0, 2)),
}


def target(seed=0):
    torch.manual_seed(seed)
    return small_target(torch.bfloat16, vocab_size=12, num_hidden_layers=3, initializer_range=0.4 + seed / 10)


def settings(folder, **changes):
    return TrainConfig(folder, **{"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, **changes})


def saved(path):
    with SafetensorsReader(path / "model.safetensors") as file:
        return {name: file.read(name) for name in file.entries}


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_in_the_same_bits(kind, tmp_path):
    data = examples(12)
    path, measured, result = train_draft(target(), data, KINDS[kind], settings(tmp_path / "whole"), quiet=True)

    def stop(entry):
        if entry["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train_draft(target(), data, KINDS[kind], settings(tmp_path / "cut"), quiet=True, on_step=stop)
    again, measured_again, _ = train_draft(target(), data, KINDS[kind], settings(tmp_path / "cut"), resume=True, quiet=True)
    whole, resumed = saved(path), saved(again)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert measured == measured_again and result.steps == 4
    with pytest.raises(PosttrainError, match="belongs to another run"):
        train_draft(target(), examples(12, seed=2), KINDS[kind], settings(tmp_path / "cut"), resume=True, quiet=True)
    with pytest.raises(PosttrainError, match=r"another run: held\.dtype was 'bfloat16' and is 'float32'"):
        train_draft(target().float(), data, KINDS[kind], settings(tmp_path / "cut"), resume=True, quiet=True)


@pytest.mark.parametrize(("kind", "loader"), [("medusa", load_medusa), ("eagle", load_eagle), ("eagle3", load_eagle)])
def test_heads_are_loaded_as_saved_and_on_their_base_alone(kind, loader, tmp_path):
    model, other = target(), target(1)
    path, measured, _ = train_draft(model, examples(8), KINDS[kind], settings(tmp_path, max_steps=1), quiet=True)
    heads, config = loader(path, model)
    tensors = saved(path)
    assert {name: tuple(t.shape) for name, t in heads.named_parameters()} == {
        name: tuple(t.shape) for name, t in tensors.items() if name != "draft_ids"
    }
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in heads.named_parameters())
    assert config["accuracy"] == measured["accuracy"] and config["base_fingerprint"] == fingerprint(model)
    with pytest.raises(PosttrainError, match="was trained on the base") as error:
        loader(path, other)
    assert fingerprint(model) in str(error.value) and fingerprint(other) in str(error.value)
    loader(path, other, any_base=True)
    with pytest.raises(PosttrainError, match="expected .* heads"):
        (load_eagle if loader is load_medusa else load_medusa)(path, model)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"base_fingerprint": "sha256:0"}))
    with pytest.raises(PosttrainError, match="not of one run"):
        loader(path, model)


def test_a_truncated_draft_is_a_model_of_its_own(tmp_path):
    model = target()
    draft = truncate(model, (0, 2))
    assert torch.equal(draft.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    batch = [collate(compute_items(model, examples(12)), 1)]
    before = agreement(draft, batch)
    config = settings(tmp_path, max_steps=8)
    path, measured, result = train_draft(model, examples(12), KINDS["draft"], config, quiet=True)
    again = load(path, dtype="auto")
    assert again.config.num_hidden_layers == 2 and torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert agreement(again, batch)["alpha"] > before["alpha"]
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]
    assert 0 <= measured["greedy_agreement"] <= 1
    same = agreement(model, batch)
    assert same["greedy_agreement"] == 1.0 and same["alpha"] > 1 - torch.finfo(torch.bfloat16).eps
    assert spread_layers(30, 4) == [0, 10, 19, 29] and spread_layers(30, 1) == [0]
    for layers in ((), (0, 3), (1, 1)):
        with pytest.raises(ValueError, match="expected different ones from 0 to 2"):
            truncate(model, layers)
    with pytest.raises(ValueError, match="expected 1 to 29"):
        spread_layers(30, 30)


def test_kl_and_its_gradient():
    torch.manual_seed(0)
    hidden, weight, teacher, teacher_weight = (torch.randn(*shape) for shape in ((9, 8), (13, 8), (9, 6), (13, 6)))

    def plain(dtype):
        h = hidden.to(dtype, copy=True).requires_grad_()
        log_p, log_q = (
            (teacher.to(dtype) @ teacher_weight.to(dtype).t()).log_softmax(-1),
            (h @ weight.to(dtype).t()).log_softmax(-1),
        )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        (kl * torch.arange(9)).sum().backward()
        return kl.detach(), h.grad

    mine = hidden.clone().requires_grad_()
    kl = linear_kl(mine, weight, teacher, teacher_weight)
    (kl * torch.arange(9)).sum().backward()
    (plain_kl, plain_grad), (exact_kl, exact_grad) = plain(torch.float32), plain(torch.float64)
    assert_as_accurate(kl, plain_kl, exact_kl)
    assert_as_accurate(mine.grad, plain_grad, exact_grad)
    assert torch.equal(linear_kl(hidden, weight, hidden, weight), torch.zeros(9))
    weights = weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="detach them"):
        linear_kl(hidden, weights, teacher, teacher_weight)
    with pytest.raises(ValueError, match="expected"):
        linear_kl(hidden, weight, teacher[:3], teacher_weight)


def test_the_draft_vocabulary():
    data = [Example([9, 4, 4, 7], [-100, 4, 4, 7]), Example([4, 7, 2], [4, 7, 2])]  # 4 three times, 7 twice, 2 once
    assert draft_vocabulary(data, 10, 2).tolist() == [4, 7]
    assert draft_vocabulary(data, 10, 5).tolist() == [0, 1, 2, 4, 7]  # then the lowest
    assert draft_vocabulary(data, 10, None).tolist() == draft_vocabulary(data, 10, 10).tolist() == list(range(10))
    assert places(torch.tensor([4, 7]), 9).tolist() == [-100] * 4 + [0, -100, -100, 1, -100]
    with pytest.raises(ValueError, match="has 0 tokens"):
        draft_vocabulary(data, 10, 0)


def test_batches_by_hand():
    assert shifted(torch.tensor([[1, 2, 3]]), 1).tolist() == [[2, 3, 0]] and shifted(torch.tensor([[1, 2]]), 5, -1).tolist() == [
        [-1, -1]
    ]
    model = small_target()
    items = compute_items(model, [Example([1, 2, 3], [-100, 2, 3]), Example([4, 5], [-100, 5])], layers=(1, 0))
    batch = collate(items, 1)
    assert isinstance(batch, DraftBatch) and batch.labels[:, :3].tolist() == [[IGNORE_INDEX, 2, 3], [IGNORE_INDEX, 5, IGNORE_INDEX]]
    assert batch.labels.shape == batch.input_ids.shape == (2, WIDTH) and (batch.labels[:, 3:] == IGNORE_INDEX).all()
    assert batch.normalizer == 3 and batch.learned(2).sum() == 1 and not batch.hidden[1, 2].any()
    assert torch.equal(batch.features[0, :3, 32:], model.model.embed_tokens.weight[[1, 2, 3]])  # what enters layer 0
    inner, held = split(list(range(20)), 0.1, 0)
    assert len(held) == 2 and sorted(inner + held) == list(range(20)) and split(list(range(20)), 0.1, 0)[1] == held
    with pytest.raises(ValueError, match="give more prompts"):
        split([1], 0.1, 0)


def test_continuations_are_the_model_s_own_and_kept(tmp_path):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = small_target(vocab_size=tokenizer.vocab_size)
    prompts = review_prompts(["good film", "a bad one", "hm"], tokenizer)
    assert prompts[0] == tokenizer.encode("good film") and "a bad one" in tokenizer.decode(prompts[1])
    config = ContinuationConfig(max_new_tokens=6, batch_size=2)
    made = continue_prompts(model, prompts, config, [2])
    assert made == continue_prompts(model, prompts, config, [2])
    for example, prompt in zip(made, prompts, strict=True):
        assert example.input_ids[: len(prompt)] == prompt and example.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
        assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]
    greedy = model(torch.tensor([made[0].input_ids]))[0].argmax(-1)  # prompt 0's temperature is 0
    assert greedy[len(prompts[0]) - 1 : -1].tolist() == made[0].input_ids[len(prompts[0]) :]
    file = tmp_path / "text.jsonl"
    write_continuations(file, made, recipe(model, prompts, config), tokenizer)
    assert read_continuations(file, model) == (made, recipe(model, prompts, config))
    other = small_target(vocab_size=tokenizer.vocab_size, initializer_range=0.5)
    with pytest.raises(PosttrainError, match="was continued by the model"):
        read_continuations(file, other)
    file.write_text(file.read_text().splitlines()[0] + '\n{"prompt_ids": [1], "completion_ids": [99999]}\n')
    with pytest.raises(PosttrainError, match="text.jsonl:2: token ids must be 0 to"):
        read_continuations(file, model)
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(PosttrainError, match="does not begin with how it was made"):
        read_continuations(tmp_path / "other.jsonl", model)


def test_a_model_that_ends_no_message_makes_no_prompts():
    tokenizer = byte_tokenizer()
    model = small_target(vocab_size=tokenizer.vocab_size)
    with pytest.raises(PosttrainError, match="give prompts instead"):
        own_prompts(model, tokenizer, 1, max_tokens=2, batch_size=2)


def test_wrong_settings():
    with pytest.raises(ValueError, match="kind is 'gpt'"):
        DraftConfig("gpt")
    with pytest.raises(ValueError, match="max_new_tokens is 2"):
        ContinuationConfig(max_new_tokens=2)
