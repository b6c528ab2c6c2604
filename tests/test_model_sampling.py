"""Temperature, top-k and top-p against their definitions, and draws against their probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.model.sampling import filter_logits, sample


def kept_by_definition(logits: list[float], temperature: float, top_k: int, top_p: float) -> set[int]:
    """Token by token, in Python."""
    kept = list(range(len(logits)))
    if 0 < top_k < len(logits):
        smallest = sorted(logits, reverse=True)[top_k - 1]
        kept = [i for i in kept if logits[i] >= smallest]
    if top_p < 1:
        weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in kept}
        mass, nucleus = 0.0, []
        for i in sorted(kept, key=lambda i: -logits[i]):
            if mass >= top_p * sum(weights.values()):
                break
            nucleus.append(i)
            mass += weights[i]
        kept = [i for i in kept if logits[i] >= logits[nucleus[-1]]]  # and whatever equals the last
    return set(kept)


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 32),
    st.sampled_from([0.1, 0.3, 0.77, 0.95, 1.0]),
)  # fmt: skip
def test_filters_follow_their_definition(values, temperature, top_k, top_p):
    # Halves and quarters: ties occur, and are exact.
    logits = torch.tensor(values, dtype=torch.float64) / 4
    filtered = filter_logits(logits, temperature, top_k, top_p)
    kept = set(filtered.isfinite().nonzero()[:, 0].tolist())
    expected = kept_by_definition(logits.tolist(), temperature, top_k, top_p)
    # Where the mass before a token equals top_p to the last digit, either side of the comparison is right.
    probabilities = filter_logits(logits, temperature, top_k, 1.0).softmax(-1).sort(descending=True).values
    edge = (probabilities.cumsum(-1) - top_p).abs().min() < 1e3 * torch.finfo(torch.float64).eps
    assert kept == expected or (edge and len({values[i] for i in kept ^ expected}) == 1)
    index = sorted(kept)
    assert torch.equal(filtered[index], logits[index] / temperature)


def test_rows_are_filtered_by_themselves():
    logits = torch.randn(3, 4, 50)
    whole = filter_logits(logits, 0.7, 20, 0.8)
    for i in range(3):
        for j in range(4):
            assert torch.equal(whole[i, j], filter_logits(logits[i, j], 0.7, 20, 0.8))


def test_half_precision_logits_are_filtered_in_float32():
    logits = torch.randn(2, 50).bfloat16()
    assert torch.equal(filter_logits(logits, 0.7), logits.float() / 0.7)


def test_temperature_zero_takes_the_first_of_the_largest():
    assert sample(torch.tensor([[1.0, 3.0, 3.0], [5.0, 1.0, 5.0]]), temperature=0).tolist() == [1, 0]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7)])
def test_draws_follow_the_probabilities(temperature, top_k, top_p):
    """Pearson's chi-squared over 20,000 seeded draws, below its 99.9 % point for the degrees of freedom there are."""
    logits = torch.tensor([0.0, 1.0, -0.5, 0.3, 1.7, -2.0])
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    draws = sample(logits.expand(n, -1), temperature, top_k, top_p, generator)
    probabilities = filter_logits(logits, temperature, top_k, top_p).double().softmax(-1)
    counts = draws.bincount(minlength=6).double()
    assert (counts[probabilities == 0] == 0).all()
    expected = n * probabilities[probabilities > 0]
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum().item()
    limits = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}
    assert statistic < limits[len(expected) - 1]


def test_the_same_seed_draws_the_same_tokens():
    logits = torch.randn(8, 100)
    draws = [sample(logits, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("row", "temperature"),
    [
        ([0.0, math.nan, 1.0], 0.0),
        ([0.0, math.nan, 1.0], 1.0),
        ([-math.inf] * 3, 0.0),
        ([-math.inf] * 3, 1.0),
        ([0.0, math.inf, 1.0], 1.0),
    ],
)
@pytest.mark.parametrize("top_k", [0, 2])
def test_logits_that_give_no_token_are_an_error(row, temperature, top_k):
    logits = torch.tensor([[1.0, 2.0, 3.0], row])
    with pytest.raises(ValueError, match=r"no token at temperature .* \(row 1 of the batch, 1 in all\)"):
        sample(logits, temperature, top_k)


def test_a_temperature_too_small_to_divide_by_is_an_error():
    with pytest.raises(ValueError, match="no token at temperature 1e-300"):
        sample(torch.tensor([[1.0, 2.0, 3.0]]), 1e-300)
