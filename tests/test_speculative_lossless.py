"""What comes out is distributed as plain sampling: joint sequences through the real drafters, against exact probabilities.

A model of 5 tokens and four sampled in a row: 625 sequences of known probabilities. Chi-square over them, bins of fewer than 5
expected merged; a run fails beyond ten standard deviations, which no right engine reaches. Mutants that leave the first token's
distribution nearly alone (a draft distribution that is not the sampled one, shared noise) are shown to fail.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from model_cases import random_model

from posttrain.model.sampling import filter_logits
from posttrain.speculative import engine
from posttrain.speculative.draft_model import DraftModel
from posttrain.speculative.interface import Requests
from posttrain.speculative.ngram import NgramDrafter

V, LENGTH, BATCH, RUNS = 5, 4, 512, 5
PROMPT = [4, 1, 4, 4, 0, 2, 1, 4, 3, 2]
SETTINGS = {"temperature": 0.8, "top_k": 4, "top_p": 0.95}


def tiny(seed: int, **sizes):
    torch.manual_seed(seed)
    sizes |= {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "initializer_range": 0.4}
    return random_model("smollm2", num_attention_heads=1, num_key_value_heads=1, bos_token_id=0, eos_token_id=0, **sizes)


@torch.inference_mode()
def exact(model, **settings) -> torch.Tensor:
    """Probability of every sequence of LENGTH tokens after PROMPT, (V,) * LENGTH."""
    sequences = torch.tensor([[*PROMPT, *tail] for tail in itertools.product(range(V), repeat=LENGTH)])
    log_p = filter_logits(model(sequences)[:, len(PROMPT) - 1 : -1], **settings).log_softmax(-1)
    return log_p.gather(2, sequences[:, len(PROMPT) :, None]).sum((1, 2)).exp().view((V,) * LENGTH)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, float]:
    """(statistic, limit)."""
    order = p.flatten().argsort()
    expected, seen = p.flatten()[order].double() * counts.sum(), counts.flatten()[order].double()
    small = int((expected.cumsum(0) < 5).sum()) + 1
    expected = torch.cat((expected[:small].sum()[None], expected[small:]))
    seen = torch.cat((seen[:small].sum()[None], seen[small:]))
    freedom = len(expected) - 1
    return ((seen - expected) ** 2 / expected).sum().item(), freedom + 10 * (2 * freedom) ** 0.5


def counted(model, drafter, **settings) -> tuple[torch.Tensor, float]:
    """(counts of the sequences, accepted of drafted)."""
    counts, accepted, drafted = torch.zeros((V,) * LENGTH), 0, 0
    for run in range(RUNS):
        outputs, report = engine.generate(model, [PROMPT] * BATCH, LENGTH, drafter, seed=run, draft_length=2, **settings)
        counts.index_put_(tuple(torch.tensor(outputs).t()), torch.ones(BATCH), accumulate=True)
        accepted, drafted = accepted + report.accepted, drafted + report.drafted
    return counts, accepted / drafted


@pytest.mark.parametrize(("drafter", "settings"), [("draft", SETTINGS), ("ngram", {"temperature": 1.0})])
def test_sequences_are_distributed_as_the_targets(drafter, settings):
    model = tiny(2)
    made = NgramDrafter() if drafter == "ngram" else DraftModel(tiny(3), model)
    counts, rate = counted(model, made, **settings)
    assert 0.05 < rate < 0.95  # drafts were accepted, and refused
    statistic, limit = chi_square(counts, exact(model, **settings))
    assert statistic < limit


def test_a_draft_that_lies_about_its_distribution_is_seen(monkeypatch):
    """The draft takes the most probable token and says that it was drawn."""
    model = tiny(2)
    monkeypatch.setattr(Requests, "draw", lambda self, logits, depth: logits.argmax(-1))
    counts, _ = counted(model, DraftModel(tiny(3), model), **SETTINGS)
    statistic, limit = chi_square(counts, exact(model, **SETTINGS))
    assert statistic > limit


def test_drafts_with_the_verifications_noise_are_seen(monkeypatch):
    """Drafted by the very noise by which the correction is drawn."""
    from posttrain.kernels.cpu import pytorch_spec_verify

    def draw(self, logits, depth):
        noise = pytorch_spec_verify.gumbel_noise(V, self.generated, self.seeds, torch.float32)
        return (filter_logits(logits, self.temperature, self.top_k, self.top_p) + noise).argmax(-1)

    model = tiny(2)
    monkeypatch.setattr(Requests, "draw", draw)
    counts, _ = counted(model, DraftModel(tiny(3), model), **SETTINGS)
    statistic, limit = chi_square(counts, exact(model, **SETTINGS))
    assert statistic > limit
