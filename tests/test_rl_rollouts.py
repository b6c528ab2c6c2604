"""The policy's log-probabilities, entropies and values of completions, against each on its own; parts in any order."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model
from torch import nn

from posttrain.model.generate import generate
from posttrain.rl.rollouts import Rollouts, draw, policy

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 13]]


def _rollouts():
    completions = [[20, 21], [22, 23, 24, 2], [25], [26, 27, 28]]
    lengths = torch.tensor([len(c) for c in completions])
    by_token = {"place": torch.arange(int(lengths.sum()))}
    by_completion = {"reward": torch.arange(4.0)}
    return Rollouts(list(zip(PROMPTS, completions, strict=True)), torch.ones(4, dtype=torch.bool), lengths, by_token, by_completion)


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_each_completion_as_on_its_own(temperature):
    model = random_model(dtype=torch.float64)
    head = nn.Linear(64, 1).double()
    rollouts = _rollouts()
    logps, entropy, values = policy(model, rollouts.part(range(4)).completions, temperature, _InDouble(head))
    expected: list[list[torch.Tensor]] = [[], [], []]
    for prompt, completion in rollouts.sequences:
        ids = torch.tensor([prompt + completion])
        hidden = model.hidden(ids)[0, len(prompt) - 1 : -1]
        whole = (model.head(hidden) / temperature).log_softmax(-1)
        expected[0].append(whole.gather(1, torch.tensor(completion)[:, None])[:, 0])
        expected[1].append(-(whole.exp() * whole).sum(-1))
        expected[2].append(head(hidden)[:, 0])
    for ours, parts in zip((logps, entropy, values), expected, strict=True):
        exact = torch.cat(parts)
        assert ((ours.double() - exact).abs() <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()).all()


class _InDouble(nn.Module):
    """policy() reads values off float32 hidden states."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden.double())


def test_a_part_has_its_own_values():
    part = _rollouts().part([2, 0])
    assert part.by_token["place"].tolist() == [6, 0, 1] and part.by_completion["reward"].tolist() == [2.0, 0.0]
    assert part.completions.lengths.tolist() == [1, 2] and part.normalizer == 2
    again = part.to("cpu")
    assert torch.equal(again.by_token["place"], part.by_token["place"])


def test_log_probabilities_are_of_what_was_drawn():
    """Greedy completions, drawn without a stop token, have the largest log-probability at every place."""
    model = random_model()
    drawn = draw(model, PROMPTS, 4, 1e-4, None, seed=3)
    assert not drawn.ended.any() and drawn.lengths.tolist() == [4] * 4
    batch = drawn.part(range(4)).completions
    with torch.no_grad():
        logps, entropy, _ = policy(model, batch, 1e-4)
    assert (logps > -0.1).all() and (entropy < 0.5).all()


def test_a_prompt_given_several_times_is_read_once(monkeypatch):
    """Greedily each is continued as alone; drawn, the completions of one prompt differ."""
    model = random_model()
    alone = [generate(model, [prompt], 5)[0] for prompt in PROMPTS[:2]]
    read = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **given: read.append(tuple(ids.shape)) or hidden(ids, **given))
    again = [PROMPTS[i] for i in (0, 1, 1, 0, 0)]
    assert generate(model, again, 5) == [alone[i] for i in (0, 1, 1, 0, 0)]
    assert read[0] == (2, 3) and read[1:] == [(5, 1)] * 4
    drawn = generate(model, [PROMPTS[2]] * 8, 5, temperature=1.0, seed=0)
    assert len(set(map(tuple, drawn))) > 4
