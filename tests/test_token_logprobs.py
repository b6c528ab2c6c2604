"""Log-probabilities through heads that are more than a dense weight (those of packed rows: test_completion_batch.py)."""

from __future__ import annotations

import torch
from model_cases import random_model
from preference_run import sequences

from posttrain import token_logprobs
from posttrain.adapters import LoraConfig, attach
from posttrain.completion_batch import collate_completions
from posttrain.quantized import quantize_model
from posttrain.token_logprobs import completion_logprobs


def test_a_head_that_is_more_than_a_weight(monkeypatch):
    """Chunk by chunk through an adapted head: the same as through its merged weight, gradient included."""
    monkeypatch.setattr(token_logprobs, "CHUNK", 7)
    batch, found = collate_completions(sequences()), {}
    for adapted in (True, False):
        torch.manual_seed(0)
        model = random_model("llama2", torch.float64)
        attach(model, LoraConfig(r=2, target_modules=["q_proj", *(["lm_head"] if adapted else [])]), dtype=torch.float64)
        logps, entropy = completion_logprobs(model, batch, return_entropy=True)
        logps.sum().backward()
        layer = model.model.layers[0].self_attn.q_proj
        gradient = next(p.grad for p in layer.parameters() if p.grad is not None and p.grad.any())
        found[adapted] = logps.detach(), entropy, gradient
    for one, other in zip(found[True], found[False], strict=True):
        assert ((one - other).abs() <= 1024 * torch.finfo(torch.float32).eps * other.abs().max()).all()


def test_a_quantized_head_and_an_entropy_without_gradient():
    model = random_model("llama2")
    quantize_model(model)
    attach(model, LoraConfig(r=2))
    logps, entropy = completion_logprobs(model, collate_completions(sequences()), return_entropy=True)
    assert logps.requires_grad and not entropy.requires_grad and logps.dtype == torch.float32
    assert (logps < 0).all() and (entropy > 0).all()
