"""What the drafters' tests share: a target that drafts often get right, and the distribution of what it says."""

from __future__ import annotations

import itertools
import math

import torch
from model_cases import random_model

from posttrain.data import Example
from posttrain.speculative import engine

PROMPTS = [[3, 1, 4, 1], [2], [0, 5, 3, 5, 0, 2, 1]]


def small_target(dtype=torch.float32, vocab_size=6, **changes):
    """So few tokens that a guess among three is often right. A large spread of weights, so that its texts are no loops."""
    torch.manual_seed(1)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}
    sizes |= {"initializer_range": 0.4}
    return random_model("smollm2", dtype, **{**sizes, "num_hidden_layers": 2, **changes})


def examples(vocab_size, count=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(8, 20, (), generator=generator))
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        made.append(Example(ids, [-100, -100, *ids[2:]]))
    return made


def assert_distributed_as_the_target(model, drafter, count=400, length=4, temperature=0.9, prompt=(1, 2), beyond=0):
    """Chi-square of sequences sampled through the engine (their first `length` tokens of `beyond` more) against the target's own
    probabilities of them."""
    prompt, V = list(prompt), model.config.vocab_size
    outputs, report = engine.generate(
        model, [prompt] * count, length + beyond, drafter, temperature, seed=11, draft_length=length, adaptive=False
    )
    assert report.accepted > count / 2 and 0 < report.acceptance_by_position[0] < 1
    sequences = list(itertools.product(range(V), repeat=length))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *sequence] for sequence in sequences]))[:, len(prompt) - 1 : -1]
    log_p = (logits.double() / temperature).log_softmax(-1).gather(2, torch.tensor(sequences)[..., None])[..., 0].sum(1)
    expected = (log_p.exp() * count).tolist()
    observed = dict.fromkeys(sequences, 0)
    for output in outputs:
        observed[tuple(output[:length])] += 1
    bins, rest = [], [0.0, 0.0]
    for sequence, e in zip(sequences, expected, strict=True):
        if e < 5:
            rest = [rest[0] + observed[sequence], rest[1] + e]
        else:
            bins.append((observed[sequence], e))
    bins += [tuple(rest)] if rest[1] >= 5 else []
    chi2 = sum((o - e) ** 2 / e for o, e in bins)
    degrees = len(bins) - 1
    assert degrees > 5
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees), (chi2, degrees)
    return chi2, degrees
