"""Drafts by a smaller model: what its cache holds, its context, other vocabularies. (The text: test_speculative_engine.py.)"""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model

from posttrain.model import generate
from posttrain.quantized import quantize_model
from posttrain.speculative import engine
from posttrain.speculative.draft_model import DraftModel
from posttrain.speculative.interface import Requests

PROMPTS = [[3, 14, 15, 92, 6], [7], [1, 2, 3, 1, 2, 3, 1, 2]]


def requests(texts: list[list[int]], caps: list[int]) -> Requests:
    return Requests([list(text) for text in texts], caps, torch.zeros(len(texts)), torch.zeros(len(texts)))


def continued(model, text: list[int], count: int) -> list[int]:
    return generate(model, [text], count)[0]


@torch.inference_mode()
def test_drafts_go_on_from_whatever_became_of_the_last():
    """All accepted, some, none, tokens in between that it never drafted, a row without room: always what it would say afresh."""
    draft = random_model("mistral_sliding")
    drafter = DraftModel(draft, draft)
    texts, generator = [list(prompt) for prompt in PROMPTS], torch.Generator().manual_seed(0)
    drafter.begin(3)
    for step in range(9):
        caps = [4, 4 if step % 3 else 1, 0 if step == 5 else 3]
        proposal = drafter.propose(requests(texts, caps), 4)
        assert proposal.num.tolist() == caps
        for i, (text, cap) in enumerate(zip(texts, caps, strict=True)):
            tokens = proposal.tokens[i, :cap].tolist()
            assert tokens == continued(draft, text, cap) and (proposal.tokens[i, cap:] == -1).all()
            kept = int(torch.randint(0, cap + 1, (), generator=generator))
            text += tokens[:kept] + torch.randint(0, 97, (1 + 2 * (step == 7),), generator=generator).tolist()
    drafter.select(torch.tensor([2, 0]))
    proposal = drafter.propose(requests([texts[2], texts[0]], [2, 2]), 2)
    assert proposal.tokens.tolist() == [continued(draft, texts[2], 2), continued(draft, texts[0], 2)]


def test_itself_is_always_accepted():
    model = random_model("smollm2")
    _, report = engine.generate(model, PROMPTS, 26, DraftModel(model, model), draft_length=4, adaptive=False)
    assert report.acceptance_rate == 1 == report.alpha and report.mean_accepted_length == 5 and report.passes == 5


def test_a_quantized_draft_and_a_shorter_context():
    model = random_model("smollm2")
    draft = random_model("smollm2", num_hidden_layers=1, max_position_embeddings=24)
    quantize_model(draft)
    expected = generate(model, PROMPTS, 40)
    outputs, report = engine.generate(model, PROMPTS, 40, DraftModel(draft, model), draft_length=6, adaptive=False)
    assert outputs == expected and report.lengths[0] > 10 and report.lengths[6] > 0


def test_the_prompts_cost_is_by_the_layers():
    model = random_model("smollm2")
    assert DraftModel(random_model("smollm2", num_hidden_layers=1), model).prompt_cost == 1 / 3


def test_other_vocabularies_need_their_correspondence():
    with pytest.raises(ValueError, match=r"the draft's vocabulary has 50 tokens and the target's 97; give vocabulary=match"):
        DraftModel(random_model("smollm2", vocab_size=50), random_model("smollm2"))
