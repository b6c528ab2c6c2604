"""KTO: losses of completions on their own, the divergence from other prompts' completions, references of every kind."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from model_cases import random_model
from preference_run import pairs, settings
from tolerance import assert_as_accurate

from posttrain.adapters import LoraConfig, adapter_parameters, attach, disabled
from posttrain.errors import PosttrainError
from posttrain.kernels import kto_loss
from posttrain.preference.data import Unpaired, unpair
from posttrain.preference.unpaired import KtoConfig, collate_labelled, kto, labelled_loss, with_mismatched
from posttrain.reference import preference_loss as oracle

CONFIG = KtoConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)


def alone(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum().item()


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_loss_of_a_batch_is_the_oracle_s(loss_type):
    examples = unpair(pairs(3))
    model = random_model(dtype=torch.float64, num_hidden_layers=1)
    attach(model, LoraConfig(r=2, init_lora_weights=False), dtype=torch.float64)
    items = with_mismatched(examples, 64)
    if loss_type != "kto":
        items = [type(item)(item.example, None) for item in items]
    batch = collate_labelled([(item, None) for item in items])
    loss, told = labelled_loss(model, batch, KtoConfig(loss_type, 0.3, 1.5, 0.5))

    def ratio(prompt, completion):
        with_adapter = alone(model, prompt, completion)
        with disabled(model):
            return with_adapter, alone(model, prompt, completion)

    policy, ref = zip(*(ratio(e.prompt, e.completion) for e in examples), strict=True)
    kl = 0.0
    if loss_type == "kto":
        apart = [ratio(item.example.prompt, item.other) for item in items]
        kl = sum(one - other for one, other in apart) / len(apart)
        assert told["kl"][0].item() == pytest.approx(max(kl, 0.0), abs=1e3 * torch.finfo(torch.float64).eps)
    losses, rewards, _ = oracle.kto_loss(policy, ref, [e.label for e in examples], kl, 0.3, 1.5, 0.5)
    eps = torch.finfo(torch.float32).eps
    assert loss.item() == pytest.approx(sum(losses), rel=eps)
    chosen = [reward for reward, e in zip(rewards, examples, strict=True) if e.label]
    assert told["rewards/chosen"][0].item() == pytest.approx(sum(chosen), rel=64 * eps) and told["rewards/chosen"][1] == len(chosen)


def test_the_other_completion_is_of_another_prompt():
    examples = [Unpaired([1], [10], True), Unpaired([1], [11, 12, 13], False), Unpaired([2, 3], [14], True)]
    assert [item.other for item in with_mismatched(examples, 4)] == [[14], [14], [10]]
    assert with_mismatched(examples[1:], 4)[1].other == [11, 12]  # beside a longer prompt, cut
    with pytest.raises(PosttrainError, match="all prompts are the same"):
        with_mismatched(examples[:2], 4)


def test_training_raises_the_desirable_above_the_undesirable(tmp_path):
    model = random_model()
    changes = {"max_steps": 16, "per_device_train_batch_size": 8, "save_steps": 0}
    result = kto(model, unpair(pairs()), settings(tmp_path, **changes), LoraConfig(r=4), CONFIG, quiet=True)
    last = result.metrics[-1]
    assert last["rewards/chosen"] > 0 > last["rewards/rejected"] and last["loss"] < result.metrics[0]["loss"]
    assert {"kl", "logps/chosen", "logps/rejected", "entropy"} <= last.keys() and last["kl"] >= 0


def test_a_reference_on_disk_gives_the_same_training(tmp_path):
    found = []
    for precompute in (False, True):
        torch.manual_seed(0)
        model = random_model(dtype=torch.float64, num_hidden_layers=1)
        run = settings(tmp_path / str(precompute), max_steps=3)
        result = kto(model, unpair(pairs(4)), run, LoraConfig(r=2), CONFIG, precompute_ref=precompute, quiet=True)
        found.append(torch.tensor([entry["loss"] for entry in result.metrics], dtype=torch.float64))
        assert all(p.isfinite().all() for p in adapter_parameters(model).values())
    largest = 5 * max(len(e.completion) for e in unpair(pairs(4)))  # nats of a completion
    assert (found[0] - found[1]).abs().max() <= 3 * largest * torch.finfo(torch.float32).eps


def test_refusals(tmp_path):
    for options, message in (
        ({"loss_type": "sigmoid"}, "expected one of kto, apo_zero_unpaired"),
        ({"beta": 0}, "beta is 0; expected a positive number"),
        ({"desirable_weight": -1}, "desirable_weight is -1 and undesirable_weight 1.0; expected finite numbers of at least 0"),
        ({"undesirable_weight": float("inf")}, "undesirable_weight inf"),
        ({"desirable_weight": 0, "undesirable_weight": 0}, "one above: nothing else trains"),
    ):
        with pytest.raises(ValueError, match=message):
            KtoConfig(**options)
    foreign = [Unpaired([5], [6], True), Unpaired([7], [97], False)]
    with pytest.raises(ValueError, match="completion 1 holds token ids from 7 to 97; the vocabulary has 0 to 96"):
        kto(random_model(), foreign, settings(tmp_path), LoraConfig(r=2), quiet=True)
    with pytest.raises(PosttrainError, match="holds no completions"):
        kto(random_model(), [], settings(tmp_path), LoraConfig(r=2))


@pytest.mark.peers
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_trl_agrees(loss_type):
    """Its own loss code on these log-probabilities, what is around it stood in for: the mean losses of 8 batches in float32."""
    trainer = pytest.importorskip("trl").KTOTrainer
    B, T, ours, theirs, exact = 7, 9, [], [], []
    for _ in range(8):
        mask = torch.arange(T) < torch.randint(1, T, (B, 1))
        per_token, ref = -2 * torch.rand(B, T) * mask, -10 * torch.rand(B)
        labels, apart, ref_apart = torch.rand(B) < 0.6, -9 * torch.rand(B), -10 * torch.rand(B)
        theirs.append(_trl_loss(trainer, loss_type, per_token, mask, ref, labels, apart, ref_apart))
        for dtype, means in ((torch.float32, ours), (torch.float64, exact)):
            kl = (apart.to(dtype) - ref_apart.to(dtype)).mean() if loss_type == "kto" else None
            policy = per_token.sum(1).to(dtype)
            losses, _ = kto_loss(policy, ref.to(dtype), labels, kl, 0.3, desirable_weight=1.5, undesirable_weight=0.5)
            means.append(losses.mean())
    assert_as_accurate(torch.stack(ours), torch.stack(theirs), torch.stack(exact))


def _trl_loss(trainer, loss_type, per_token, mask, ref, labels, apart, ref_apart):
    gather = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda t: t)
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=gather, aux_loss_enabled=False, precompute_ref_logps=True,
        calculate_KL=loss_type == "kto", loss_type=loss_type, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: apart, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    nothing = torch.zeros(per_token.shape)
    outputs = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    completion = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
    inputs = {
        "input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion), "completion_mask": completion,
        "label": labels, "ref_logps": ref, "ref_KL_logps": ref_apart,
    }  # fmt: skip
    return trainer._compute_loss(stand_in, lambda **_: outputs, inputs, False)
