"""The loop: greedy tokens are plain decoding's for every kind of draft, in batches, with stops, streams, adapters; errors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import random_model
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import LoraConfig, serving
from posttrain.model import generate
from posttrain.speculative import engine
from posttrain.speculative.draft_model import DraftModel
from posttrain.speculative.interface import FINAL, Proposal
from posttrain.speculative.ngram import NgramDrafter

PROMPTS = [[3, 14, 15, 92, 6], [7], [1, 2, 3, 1, 2, 3, 1, 2], [9, 9, 9, 9], [50, 60, 70]]


class Knowing:
    """Drafts out of the answers, right as often as told, as chains or trees; it keeps what it is shown."""

    features: tuple[int, ...] = (1, FINAL)
    prompt_cost = 0.0

    def __init__(self, answers, prompts=PROMPTS, tree=False, rightness=0.7):
        self.answers, self.prompts, self.tree, self.rightness = answers, prompts, tree, rightness
        self.generator = torch.Generator().manual_seed(0)

    def begin(self, count):
        self.rows = list(range(count))
        self.tokens = [prompt[:1] for prompt in self.prompts]
        self.shown = [[] for _ in self.prompts]

    def _guess(self, right):
        wrong = torch.rand((), generator=self.generator) > self.rightness
        return int(torch.randint(97, (), generator=self.generator)) if wrong else right

    def propose(self, requests, limit):
        drafts = []
        for row, text, cap in zip(self.rows, requests.tokens, requests.cap, strict=True):
            done = len(text) - len(self.prompts[row])
            ahead = (self.answers[row] + [0] * limit)[done : done + min(cap, limit)]
            drafts.append([self._guess(token) for token in ahead for _ in range(2 if self.tree else 1)])
        N = max(map(len, drafts))
        parents = None
        if self.tree:  # two at each depth, of which either may go on
            pairs = [(i - 2 - i % 2, self.rows) for i in range(N)]
            parents = torch.tensor([[-1 if i < 2 else at + row % 2 for i, (at, _) in enumerate(pairs)] for row in self.rows])
        tokens = torch.tensor([draft + [-1] * (N - len(draft)) for draft in drafts], dtype=torch.int64).view(len(drafts), N)
        return Proposal(tokens, torch.tensor([len(draft) for draft in drafts]), None, parents)

    def observe(self, tokens, features):
        for i, row in enumerate(self.rows):
            self.tokens[row] += tokens[i][tokens[i] >= 0].tolist()
            self.shown[row].append(features[i][tokens[i] >= 0])

    def select(self, rows):
        self.rows = [self.rows[i] for i in rows.tolist()]


def layers_of(model, count: int):
    """A draft of the model's first layers, that agrees with it now and then."""
    draft = random_model("smollm2", num_hidden_layers=count)
    draft.load_state_dict({name: model.state_dict()[name] for name in draft.state_dict()})
    return draft


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding"])
def test_a_batch_that_accepts_differently_is_plain_decoding(name, tree):
    """Tokens and the features told to the drafter, through holes in the cache and their closing."""
    model = random_model(name)
    wide = copy.deepcopy(model).double()
    plain = generate(model, PROMPTS, 40)
    drafter = Knowing(plain, tree=tree)
    outputs, report = engine.generate(model, PROMPTS, 40, drafter, draft_length=5, adaptive=False)
    assert outputs == plain and 1.5 < report.tokens_per_pass < 6
    assert report.tokens == sum(map(len, plain)) - len(plain)  # the prompts' pass gave the first of each
    assert drafter.tokens == [prompt + output for prompt, output in zip(PROMPTS, plain, strict=True)]

    def features(any_model, tokens):
        states = {1: None}
        hidden = any_model.hidden(torch.tensor([tokens[:-1]]), states=states)
        return torch.cat((states[1], hidden), -1)[0]

    with torch.inference_mode():
        alone, exact = (torch.cat([features(each, tokens) for tokens in drafter.tokens]) for each in (model, wide))
        assert_as_accurate(torch.cat([torch.cat(row) for row in drafter.shown]), alone, exact)


@settings(max_examples=3)
@given(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=12), min_size=1, max_size=3), st.integers(1, 9), st.booleans())
def test_real_drafters_change_no_greedy_token(prompts, draft_length, adaptive):
    model = random_model("qwen2_sliding")
    draft = random_model("qwen2_sliding", num_hidden_layers=1)
    expected = generate(model, prompts, 20)
    for drafter in (NgramDrafter(), DraftModel(draft, model), DraftModel(model, model)):
        outputs, _ = engine.generate(model, prompts, 20, drafter, draft_length=draft_length, adaptive=adaptive)
        assert outputs == expected


def test_dynamic_positions_take_plain_steps_past_their_first_length():
    model = random_model("llama_dynamic")  # 16 positions, stretched to 64
    expected = generate(model, PROMPTS, 30)
    outputs, report = engine.generate(model, PROMPTS, 30, DraftModel(model, model), adaptive=False)
    assert outputs == expected and report.accepted > 0 and max(report.lengths) < 16 and report.lengths[0] > 14


def test_stop_tokens_end_a_row_inside_what_was_accepted():
    model = random_model("smollm2")
    free = generate(model, PROMPTS, 24)
    stop = {free[0][7], free[2][12], free[4][2]}
    expected = generate(model, PROMPTS, 24, stop_ids=stop)
    assert len({len(output) for output in expected}) > 2
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    outputs, report = engine.generate(
        model, PROMPTS, 24, Knowing(free, rightness=1.0), stop_ids=stop, on_token=lambda row, token: streamed[row].append(token),
        draft_length=6, adaptive=False,
    )  # fmt: skip
    assert outputs == streamed == expected
    assert report.tokens > sum(map(len, expected)) - len(PROMPTS)  # accepted behind the stop tokens, and left out


@pytest.mark.parametrize("count", [1, 2, 9])
def test_no_more_tokens_than_asked_for(count):
    model = random_model("smollm2")
    plain = generate(model, PROMPTS, 12)
    outputs, report = engine.generate(model, PROMPTS, count, Knowing(plain, rightness=1.0), draft_length=8, adaptive=False)
    assert outputs == [output[:count] for output in plain]
    assert report.tokens == (count - 1) * len(PROMPTS)  # nothing was drafted that could not be used
    full = engine.generate(model, [[1] * 60], 4, NgramDrafter(), adaptive=False)[0]  # the whole context of 64
    assert full == generate(model, [[1] * 60], 4)


def test_adapters_attached_and_served(tmp_path):
    prompts, names = PROMPTS[:3], ["a", None, "b"]

    def model_of():
        torch.manual_seed(3)
        return random_model("smollm2")

    for i, name in enumerate("ab"):
        model = model_of()
        torch.manual_seed(i)
        adapters.attach(model, LoraConfig(r=4, lora_alpha=32, init_lora_weights=False))
        adapters.save_adapter(model, tmp_path / name)
    attached = generate(model, prompts, 20)
    assert attached != generate(model_of(), prompts, 20)
    assert engine.generate(model, prompts, 20, Knowing(attached, prompts), adaptive=False)[0] == attached
    served = model_of()
    for name in "ab":
        serving.load(served, name, tmp_path / name)
    expected = generate(served, prompts, 20, adapter_ids=names)
    assert expected[0] != attached[0] and expected[2] == attached[2]
    drafter = Knowing(expected, prompts, rightness=0.5)
    outputs, _ = engine.generate(served, prompts, 20, drafter, adapter_ids=names, stop_ids=[expected[0][4]], adaptive=False)
    assert outputs == generate(served, prompts, 20, adapter_ids=names, stop_ids=[expected[0][4]])


def test_virtual_tokens_on_the_target():
    model = random_model("smollm2")
    adapters.attach(model, adapters.PrefixTuningConfig(num_virtual_tokens=3))
    expected = generate(model, PROMPTS, 20)
    outputs, report = engine.generate(model, PROMPTS, 20, Knowing(expected, tree=True), adaptive=False)
    assert outputs == expected and report.accepted > 0


def test_a_request_gets_its_tokens_alone_and_in_any_batch():
    model = random_model("smollm2")
    draft = DraftModel(layers_of(model, 2), model)
    prompts, seeds = PROMPTS[:3], [5, 6, 7]
    for arguments in ({"temperature": 1.3}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}):
        together, report = engine.generate(model, prompts, 14, draft, seed=seeds, draft_length=4, **arguments)
        assert report.accepted > 0 and len(report.lengths) > 1
        for prompt, seed, expected in zip(prompts, seeds, together, strict=True):
            assert engine.generate(model, [prompt], 14, draft, seed=[seed], draft_length=4, **arguments)[0] == [expected]
    first, again, other = (engine.generate(model, [PROMPTS[0]] * 2, 14, draft, seed=s, temperature=1.3)[0] for s in (0, 0, 1))
    assert first == again != other and first[0] != first[1]


def test_modes_are_restored():
    model = random_model("smollm2").train()
    engine.generate(model, [[1]], 2, NgramDrafter())
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1] * 60], "max_new_tokens": 5}, "exceed the model's context of 64"),
        ({"temperature": -0.5}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"draft_length": 0}, "draft_length is 0; expected at least 1"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected a whole number of 64 bits"),
        ({"seed": [2**64]}, "seed is 18446744073709551616"),
        ({"adapter_ids": ["a"]}, "the model serves no adapters"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(random_model("smollm2"), **{"prompts": [[1]], "max_new_tokens": 4, "drafter": NgramDrafter(), **arguments})


def test_logits_without_a_finite_number_are_named():
    model = random_model("smollm2")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="no token can be drawn"):
        engine.generate(model, [[1, 2]], 3, NgramDrafter())


def test_nothing_to_do():
    model = random_model("smollm2")
    assert engine.generate(model, [], 5, NgramDrafter())[0] == []
    outputs, report = engine.generate(model, [[1], [2]], 0, NgramDrafter())
    assert outputs == [[], []] and "no step" in str(report)
