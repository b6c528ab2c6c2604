"""Choice scores, generation and perplexity against one plain forward pass per item, judged in float64."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import evaluate
from posttrain.evaluate import ChoiceItem
from posttrain.model.config import ModelConfig
from posttrain.model.decoder import CausalLM

VOCAB, CONTEXT = 40, 64


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
            "initializer_range": 0.3,
        }
    )
    return CausalLM(config).float()


@functools.cache
def _in_float64(model: CausalLM) -> CausalLM:
    return copy.deepcopy(model).double()


def plain_logprobs(model: CausalLM, ids: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """log p(ids[t + 1] | ids[: t + 1]) for every t, by one whole forward pass without cache or padding."""
    if dtype == torch.float64:
        model = _in_float64(model)
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0]
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].double()


@pytest.fixture(scope="module")
def plain_error(model) -> float:
    """Largest error of a token's log-probability from plain float32 passes, over 100 random texts of up to 40 tokens.

    A single short text can be exact by luck, so the plain expression is judged on a sample.
    """
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(VOCAB, (2 + i % 39,), generator=generator).tolist() for i in range(100)]
    return max((plain_logprobs(model, t, torch.float32) - plain_logprobs(model, t)).abs().max().item() for t in texts)


def assert_as_good_as_plain(model, items: list[ChoiceItem], scores: list[list[float]], plain_error: float) -> None:
    """Every choice's sum is within twice the plain float32 error of a token, times its tokens, of the float64 sum."""
    for item, row in zip(items, scores, strict=True):
        for choice, score in zip(item.choices, row, strict=True):
            exact = plain_logprobs(model, [*item.prompt, *choice])[len(item.prompt) - 1 :].sum().item()
            assert abs(score - exact) <= 2 * plain_error * len(choice)


tokens = st.integers(0, VOCAB - 1)
single = st.builds(
    lambda prompt, choices, answer: ChoiceItem(prompt, [[c] for c in choices], answer % len(choices)),
    st.lists(tokens, min_size=1, max_size=24),
    st.lists(tokens, min_size=1, max_size=4),
    st.integers(0, 99),
)
several = st.builds(
    lambda prompt, choices, answer: ChoiceItem(prompt, choices, answer % len(choices)),
    st.lists(tokens, min_size=1, max_size=4),
    st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 99),
)
shared_prefix = st.lists(tokens, min_size=8, max_size=12)


@settings(max_examples=25, deadline=None)
@given(st.lists(single | several, min_size=1, max_size=7), st.just([]) | shared_prefix, st.sampled_from([1, 40, 4096]))
def test_choice_scores_are_those_of_whole_passes(model, plain_error, items, prefix, tokens_per_batch) -> None:
    items = [ChoiceItem([*prefix, *item.prompt], item.choices, item.answer) for item in items]
    calls: list[tuple[int, int]] = []
    result = evaluate.choice_accuracy(model, items, tokens_per_batch, lambda *args: calls.append(args))
    assert_as_good_as_plain(model, items, result.logprobs, plain_error)
    assert [len(row) for row in result.logprobs] == [len(item.choices) for item in items]
    assert result.predictions == [row.index(max(row)) for row in result.logprobs]
    assert result.correct == [p == item.answer for p, item in zip(result.predictions, items, strict=True)]
    assert calls[-1] == (len(items), len(items)) and calls == sorted(calls)


def test_no_token_goes_through_the_layers_twice(model, monkeypatch) -> None:
    """Three prompts that share 20 tokens, with choices of up to 3 tokens: what the layers see is counted."""
    prefix = list(range(20))
    items = [ChoiceItem([*prefix, 21 + i], [[1], [2, 3, 4]], 0) for i in range(3)]
    seen = []
    hidden = CausalLM.hidden
    count = lambda self, ids, **kwargs: seen.append(ids.numel()) or hidden(self, ids, **kwargs)  # noqa: E731
    monkeypatch.setattr(CausalLM, "hidden", count)
    evaluate.choice_logprobs(model, items)
    assert seen == [20, 3, 3 * 2]


def test_head_sees_only_the_positions_asked_for(model, monkeypatch) -> None:
    items = [ChoiceItem([1] * (5 + i), [[2], [3]], 0) for i in range(4)]
    rows = []
    head = CausalLM.head
    monkeypatch.setattr(CausalLM, "head", lambda self, h: rows.append(h.shape[0]) or head(self, h))
    evaluate.choice_logprobs(model, items)
    assert sum(rows) == len(items)


def test_state_of_the_model_is_put_back(model) -> None:
    item = ChoiceItem([1, 2], [[3], [4]], 0)
    for training in (True, False):
        model.train(training)
        evaluate.choice_accuracy(model, [item])
        assert model.training is training
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("items", "match"),
    [
        ([], "empty"),
        ([ChoiceItem([], [[1]], 0)], "item 0: a prompt"),
        ([ChoiceItem([1], [[1], []], 0)], "at least one token"),
        ([ChoiceItem([1], [[1]], 0), ChoiceItem([1], [[1]], 1)], "item 1: answer 1"),
        ([ChoiceItem([1] * CONTEXT, [[1, 2]], 0)], f"context of {CONTEXT}"),
        ([ChoiceItem([1, VOCAB], [[2]], 0)], f"item 0 holds token ids from 1 to {VOCAB}; the vocabulary has 0 to {VOCAB - 1}"),
        ([ChoiceItem([1], [[2], [3, -1]], 0)], "item 0 holds token ids from -1 to 3"),
    ],
)
def test_bad_items_are_named(model, items, match) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate.choice_accuracy(model, items)


def test_a_model_that_gives_nan_is_no_result(model) -> None:
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="not numbers"):
        evaluate.choice_accuracy(broken, [ChoiceItem([1, 2], [[1], [2]], 0)])
    with pytest.raises(ValueError, match="not numbers"):
        evaluate.perplexity(broken, [1, 2, 3, 4])


def test_a_prompt_that_just_fits_is_scored(model, plain_error) -> None:
    item = ChoiceItem([i % VOCAB for i in range(CONTEXT)], [[1], [2]], 0)
    assert_as_good_as_plain(model, [item], evaluate.choice_logprobs(model, [item]), plain_error)


def test_accuracy_and_its_interval() -> None:
    result = evaluate.Accuracy([0] * 10, [True] * 8 + [False] * 2)
    assert result.accuracy == 0.8
    assert str(result) == "0.800 [0.490, 0.943] (8 of 10)"  # Wilson's interval of 8/10, from its formula by hand


class Letters:
    """Token i is the letter chr(97 + i % 26), upper case from 26 on; id 0 ends a text."""

    eos_id = 0

    def decode(self, ids) -> str:
        return " " + "".join(chr((97 if i < 26 else 65) + i % 26) for i in ids)


def test_generation_accuracy(model) -> None:
    from posttrain.model.generate import generate

    prompts = [[3, 4], [5, 6, 7, 8], [9]]
    texts = [Letters().decode(generate(model, [p], 5, stop_ids=(0,))[0]).strip() for p in prompts]
    answers = [texts[0].upper(), texts[1][:3], "?"]

    def correct(match: str) -> list[bool]:
        return evaluate.generation_accuracy(model, Letters(), prompts, answers, 5, match, batch_size=2).correct

    result = evaluate.generation_accuracy(model, Letters(), prompts, answers, 5)
    assert result.predictions == texts and result.correct == [True, False, False]
    assert correct("prefix") == correct("contains") == [True, True, False]
    with pytest.raises(ValueError, match="exact, prefix, contains"):
        correct("regex")
    with pytest.raises(ValueError, match="one answer per prompt"):
        evaluate.generation_accuracy(model, Letters(), prompts, answers[:1])


@settings(max_examples=30, deadline=None)
@given(st.lists(tokens, min_size=2, max_size=90), st.integers(2, CONTEXT), st.data())
def test_perplexity_scores_each_token_once_with_the_stated_context(model, plain_error, ids, window, data) -> None:
    stride = data.draw(st.integers(1, window - 1))
    result = evaluate.perplexity(model, ids, window, stride)
    exact = []
    for t in range(1, len(ids)):  # window k ends at window + k stride; token t belongs to the first that holds it
        k = max(0, math.ceil((t + 1 - window) / stride))
        begin = max(0, min(len(ids), window + k * stride) - window)
        assert t - begin >= min(t, window - stride)
        exact.append(plain_logprobs(model, ids[begin : t + 1])[-1].item())
    assert result.tokens == len(ids) - 1
    assert abs(result.nll + math.fsum(exact)) <= 2 * plain_error * result.tokens
    assert result.perplexity == math.exp(result.nll / result.tokens)


@pytest.mark.parametrize(
    ("ids", "window", "stride", "match"),
    [
        ([1], 8, 4, "at least 2"),
        ([1, 2], 1, 1, "window"),
        ([1, 2], CONTEXT + 1, 4, "window"),
        ([1, 2], 8, 8, "stride"),
        ([1, VOCAB], 8, 4, "holds token ids from 1 to"),
    ],
)
def test_perplexity_refuses(model, ids, window, stride, match) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate.perplexity(model, ids, window, stride)


def test_shared_prefix() -> None:
    long = list(range(10))
    assert evaluate._shared_prefix([long + [1], long + [2, 3]]) == 10
    assert evaluate._shared_prefix([long, long]) == 9  # one token is left to each prompt
    assert evaluate._shared_prefix([long]) == 0
    assert evaluate._shared_prefix([[1, 2, 3], [1, 2, 4]]) == 0  # too short for a cache to pay


def test_batches_hold_their_limits() -> None:
    items = [SimpleNamespace(prompt=[0] * (1 + i % 7), choices=[[1]]) for i in range(50)]
    batches = list(evaluate._batches(items, 0, 20))
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(len(b) * max(len(items[i].prompt) for i in b) <= 20 for b in batches)
    items[3].choices = [[1, 2]]
    assert all(len({len(items[i].prompt) for i in b}) == 1 for b in evaluate._batches(items, 0, 20))
