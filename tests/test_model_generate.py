"""Generation: greedy against a loop without a cache, batches, stops, seeds, streaming, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import random_model

from posttrain.model import generate
from posttrain.quantized import quantize_model
from posttrain.speculative import engine
from posttrain.speculative.ngram import NgramDrafter

RUNS = (generate, lambda *args, **options: engine.generate(*args, drafter=NgramDrafter(), **options)[0])


@torch.no_grad()
def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The obvious loop: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "mistral_sliding", "qwen2_sliding", "qwen3"])
def test_greedy_equals_the_loop_without_a_cache(name):
    model = random_model(name)
    prompt = [3, 14, 15, 92, 6]
    assert generate(model, [prompt], 20) == [greedy(model, prompt, 20)]


@settings(max_examples=8)
@given(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=12), min_size=1, max_size=5))
def test_a_batch_equals_each_prompt_alone(prompts):
    model = random_model("mistral_sliding")
    assert generate(model, prompts, 8) == [generate(model, [prompt], 8)[0] for prompt in prompts]


def test_a_quantized_batch_equals_each_prompt_alone():
    model = random_model("smollm2")
    quantize_model(model)
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7]]
    assert generate(model, prompts, 12) == [greedy(model, prompt, 12) for prompt in prompts]


def test_stop_tokens_end_each_row_by_itself():
    """Rows end at different steps, the batch shrinks as they do, and the others do not notice."""
    model = random_model("smollm2")
    prompts = [[i, 2 * i + 1] for i in range(1, 9)]
    free = [greedy(model, prompt, 16) for prompt in prompts]
    stop = {free[0][3], free[3][5], free[5][0]}

    def cut(tokens):
        return tokens[: next((i for i, token in enumerate(tokens) if token in stop), len(tokens))]

    expected = [cut(tokens) for tokens in free]
    assert len({len(tokens) for tokens in expected}) > 2
    assert generate(model, prompts, 16, stop_ids=stop) == expected


def test_streaming_sees_every_token_once_in_order():
    model = random_model("smollm2")
    prompts = [[1, 2, 3], [4]]
    seen: list[list[int]] = [[], []]
    outputs = generate(model, prompts, 6, on_token=lambda row, token: seen[row].append(token))
    assert seen == outputs and len(outputs[0]) == 6


def test_seeds_fix_the_draws():
    model = random_model("smollm2")
    prompts = [[1, 2, 3], [4]]
    first, again, other = (generate(model, prompts, 24, temperature=1.5, seed=seed) for seed in (0, 0, 1))
    assert first == again and first != other
    torch.manual_seed(5)
    unseeded = generate(model, prompts, 24, temperature=1.5)
    torch.manual_seed(5)
    assert generate(model, prompts, 24, temperature=1.5) == unseeded
    # A seed leaves torch's own generator alone.
    state = torch.get_rng_state()
    generate(model, prompts, 4, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_tightest_filters_are_greedy(filters):
    model = random_model("smollm2")
    assert generate(model, [[7, 8]], 10, temperature=2.0, seed=0, **filters) == [greedy(model, [7, 8], 10)]


def test_modes_are_restored_and_dropout_is_off():
    model = random_model("smollm2").train()
    generate(model, [[1]], 2)
    assert model.training and model.model.layers[0].training
    model.eval()
    generate(model, [[1]], 2)
    assert not model.training


def test_the_context_can_be_filled_and_not_passed():
    model = random_model("smollm2")  # 64 positions
    assert len(generate(model, [[1] * 60], 4)[0]) == 4
    with pytest.raises(ValueError, match=r"prompt 1 has 61 tokens.*max_new_tokens=4.*context of 64.*shorten"):
        generate(model, [[1], [1] * 61], 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 97]]}, "ids from 1 to 97; the vocabulary has 0 to 96"),
        ({"prompts": [[-1]]}, "ids from -1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected a whole number of 64 bits"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(random_model("smollm2"), **{"prompts": [[1]], "max_new_tokens": 2, **arguments})


@pytest.mark.parametrize("run", RUNS)
def test_ids_come_as_lists_tensors_or_arrays(run):
    model, prompts = random_model("smollm2"), [[1, 2, 3], [4, 5, 6]]
    free = generate(model, prompts, 6)
    expected = [tokens[: tokens.index(free[0][2])] if free[0][2] in tokens else tokens for tokens in free]
    for give in (torch.tensor, np.array, lambda ids: [*map(np.int64, ids)], set):
        assert run(model, prompts, 6, stop_ids=give([free[0][2]])) == expected
    for same in (torch.tensor(prompts), np.array(prompts), [*map(torch.tensor, prompts)], [*map(tuple, prompts)]):
        assert run(model, same, 6) == free


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "text"}, "prompt 0 is 't'; expected a list of token ids"),
        ({"prompts": [[1], "text"]}, "prompt 1 is 'text'; expected a list of token ids"),
        ({"prompts": [1, 2]}, "prompt 0 is 1; expected a list of token ids"),
        ({"prompts": torch.tensor([1, 2])}, r"prompt 0 is tensor\(1\); expected a list"),
        ({"prompts": [[1.0, 2.7]]}, r"prompt 0 is \[1.0, 2.7\]; expected"),
        ({"stop_ids": "</s>"}, "stop_ids is '</s>'; expected a list of token ids"),
        ({"stop_ids": 2}, "stop_ids is 2; expected"),
        ({"stop_ids": [None]}, r"stop_ids is \[None\]; expected"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected a whole number"),
        ({"max_new_tokens": "2"}, "max_new_tokens is '2'; expected a whole number"),
    ],
)
def test_what_holds_no_ids_is_named(run, arguments, message):
    with pytest.raises(TypeError, match=message):
        run(random_model("smollm2"), **{"prompts": [[1]], "max_new_tokens": 2, **arguments})


def test_nothing_to_do():
    model = random_model("smollm2")
    assert generate(model, [], 5) == []
    assert generate(model, [[1], [2]], 0) == [[], []]


@pytest.mark.peers
def test_greedy_equals_transformers():
    pytest.importorskip("transformers")
    from test_model_decoder import transformers_model

    model = random_model("qwen3")
    peer = transformers_model("qwen3", model.state_dict())
    prompt = torch.tensor([[3, 14, 15, 92, 6]])
    peer.generation_config.eos_token_id = None  # twenty tokens, whichever they are
    theirs = peer.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generate(model, prompt.tolist(), 20) == theirs[:, 5:].tolist()


@pytest.mark.real
def test_the_real_model_knows_a_capital():
    from posttrain.fetch import fetch
    from posttrain.model import load
    from posttrain.model.tokenizer import Tokenizer

    path = fetch("smollm2-135m")
    tokenizer = Tokenizer.load(path)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True)
    for quantize in (None, "nf4"):
        model = load(path, quantize=quantize)
        tokens = generate(model, [prompt], 12, stop_ids=[tokenizer.eos_id])[0]
        assert tokenizer.decode(tokens).startswith("The capital of France is Paris")
