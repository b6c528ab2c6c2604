"""The reference's log-probabilities: measured in batches of like length, kept whole or not at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import random_model

from posttrain.adapters import LoraConfig, adapter_parameters, attach
from posttrain.errors import PosttrainError
from posttrain.preference.reference_logps import cached, identity_of, measure, reference_of


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_every_item_once_in_batches_of_bounded_tokens(lengths, limit):
    seen, told = [], []

    def sums_of(indices):
        assert len(indices) == 1 or sum(lengths[i] for i in indices) <= limit
        seen.extend(indices)
        return torch.tensor([[i, lengths[i]] for i in indices], dtype=torch.float64)

    result = measure(lengths, sums_of, limit, lambda done, total: told.append((done, total)))
    assert sorted(seen) == list(range(len(lengths))) and told[-1] == (len(lengths), len(lengths))
    assert result.tolist() == [[i, length] for i, length in enumerate(lengths)]


def test_what_is_not_finite_is_named():
    with pytest.raises(PosttrainError, match=r"2 items of the data are not finite \(items 1, 3, from 0\)"):
        measure([1] * 4, lambda some: torch.tensor([[torch.nan if i % 2 else 0.0] for i in some]))


def test_a_file_is_whole_or_not_there(tmp_path):
    path, about = tmp_path / "logps", {"data": "a", "reference": "b"}

    def broken():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        cached(path, about, 3, broken)
    assert not any(tmp_path.iterdir())
    made = cached(path, about, 3, lambda: torch.randn(3, 2))
    assert torch.equal(cached(path, about, 3, broken), made) and [p.name for p in tmp_path.iterdir()] == ["logps"]
    with pytest.raises(PosttrainError, match="data is 'a' there and 'c' here; reference is 'b' there and 'd' here"):
        cached(path, {"data": "c", "reference": "d"}, 3, broken)
    with pytest.raises(PosttrainError, match="holds 3 items and the data has 4"):
        cached(path, about, 4, broken)


def test_an_identity_is_of_base_storage_and_adapter():
    torch.manual_seed(0)
    model = random_model(num_hidden_layers=1)
    base = identity_of(model, with_adapter=True)
    attach(model, LoraConfig(r=2))
    assert identity_of(model, with_adapter=False) == base
    first = identity_of(model, with_adapter=True)
    next(iter(adapter_parameters(model).values())).data.add_(1e-3)
    assert first.startswith(base) and identity_of(model, with_adapter=True) not in (base, first)


def test_the_policy_comes_back_as_it_was():
    torch.manual_seed(0)
    model = random_model(num_hidden_layers=1)
    attach(model, LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5))
    model.train()
    ids = torch.arange(5)[None]
    with reference_of(model, None) as reference:
        base = reference(ids)
        assert not torch.is_grad_enabled() and not model.training
    assert model.training and all(module.training for module in model.modules())
    with reference_of(model, model) as reference:
        assert not torch.equal(reference(ids), base)
