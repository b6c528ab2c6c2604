"""Preference training: losses of pairs on their own, one base for two models, kills that change nothing, and TRL's trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import random_model
from preference_run import STEPS, pairs, preference_run, settings
from tolerance import assert_as_accurate

from posttrain.adapters import LoraConfig, adapter_parameters, attach, disabled
from posttrain.errors import PosttrainError
from posttrain.kernels import preference_loss
from posttrain.kernels.preference_losses import LOSSES
from posttrain.preference.accuracy import pair_accuracy
from posttrain.preference.data import Pair
from posttrain.preference.paired import PreferenceConfig, collate_pairs, dpo, pair_logps, pair_loss
from posttrain.quantized import quantize_model

LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def adapted(dtype=torch.float32, layers=3):
    torch.manual_seed(0)
    model = random_model(dtype=dtype, num_hidden_layers=layers)
    attach(model, LORA, dtype=torch.float64 if dtype == torch.float64 else None)
    return model


def one_by_one(model, some, preference):
    """The mean loss, every completion in a forward pass of its own, through whole logits; its gradient goes to the adapter."""
    sums = []
    for pair in some:
        for completion in (pair.chosen, pair.rejected):
            logits = model(torch.tensor([pair.prompt + completion]))[0, len(pair.prompt) - 1 : -1]
            logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            each = logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
            with torch.no_grad():
                weight = (each - (2 * logprobs).logsumexp(1)).mean().exp()
            shared = min(len(pair.chosen), len(pair.rejected))
            tail = 1.0 if preference.ld_alpha is None else preference.ld_alpha
            sums.append((each[:shared].sum() + tail * each[shared:].sum(), weight, len(completion)))
    values, weights, lengths = zip(*sums, strict=True)
    stacked, of_pair = torch.stack(values), torch.stack(weights).view(-1, 2).prod(1)
    sizes = torch.tensor(lengths)
    return stacked[::2], stacked[1::2], of_pair, sizes[::2], sizes[1::2]


# One of each kind: of the difference, per token in two ways, sorted, without a reference; every loss is in test_preference_loss.
CONFIGS = [PreferenceConfig(loss_type=name) for name in ("sigmoid", "ipo", "simpo", "aot", "sft")] + [
    PreferenceConfig(ld_alpha=0.3),
    PreferenceConfig(use_weighting=True, label_smoothing=0.1),
    PreferenceConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], f_divergence_type="reverse_kl"),
    PreferenceConfig(f_divergence_type="js_divergence"),
    PreferenceConfig(reference_free=True),
    PreferenceConfig(loss_type="cpo"),
    PreferenceConfig(loss_type="orpo", beta=0.5),
]


@pytest.mark.parametrize("preference", CONFIGS, ids=lambda c: f"{c.loss_type}-{c.ld_alpha}-{c.use_weighting}-{c.f_divergence_type}")
def test_loss_and_gradient_of_packed_pairs_are_those_of_each_alone(preference):
    some = pairs(3)

    def run(dtype, packed):
        model = adapted(dtype, layers=1)
        if packed:
            total, told = pair_loss(model, collate_pairs([(pair, None) for pair in some]), preference)
            loss, margins = total / len(some), told["rewards/margins"][0] / len(some)
        else:
            chosen, rejected, weights, *lengths = one_by_one(model, some, preference)
            with torch.no_grad(), disabled(model):
                refs = one_by_one(model, some, preference)[:2]
            refs = refs if preference.needs_reference else (torch.zeros_like(chosen), torch.zeros_like(rejected))
            loss = torch.zeros((), dtype=chosen.dtype)
            for name, weight in zip(preference.terms, preference.loss_weights or [1.0] * 9, strict=False):
                losses, _, _ = preference_loss(
                    chosen, rejected, *(refs if LOSSES[name].reference else (None, None)), preference.beta, name,
                    preference.label_smoothing, f_divergence=preference.f_divergence_type, chosen_lengths=lengths[0],
                    rejected_lengths=lengths[1], weights=weights if preference.use_weighting else None,
                )  # fmt: skip
                loss = loss + weight * losses.mean()
            margins = preference.beta * ((chosen - refs[0]) - (rejected - refs[1])).mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()]), torch.stack([loss, margins]).detach()

    (gradient, values), (plain_gradient, plain_values) = run(torch.float32, True), run(torch.float32, False)
    exact_gradient, exact = run(torch.float64, False)
    assert_as_accurate(gradient, plain_gradient, exact_gradient)
    # One order of sums or another: in float64 the packed run is the plain one to what its float32 parts can tell.
    also_gradient, also = run(torch.float64, True)
    for one, other in ((also, exact), (also_gradient, exact_gradient)):
        assert (one - other).norm() <= torch.finfo(torch.float32).eps * other.norm()
    assert values.isfinite().all() and plain_values.isfinite().all()


def test_a_pair_s_reward_starts_at_zero_and_its_loss_at_log_2(tmp_path):
    model = random_model(dtype=torch.float64)
    result = dpo(model, pairs(6), settings(tmp_path, max_steps=1), LoraConfig(r=2), quiet=True)
    entry = result.metrics[0]
    assert entry["rewards/margins"] == pytest.approx(0, abs=torch.finfo(torch.float32).eps)
    assert entry["loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=torch.finfo(torch.float32).eps)
    names = ("chosen", "rejected", "accuracies", "margins")
    assert {f"rewards/{name}" for name in names} | {"logps/chosen", "logps/rejected", "entropy"} <= entry.keys()


def test_training_raises_the_chosen_above_the_rejected(tmp_path):
    model, some = random_model(), pairs()
    result = dpo(model, some, settings(tmp_path, max_steps=24, save_steps=0), LoraConfig(r=4), quiet=True)
    assert result.metrics[-1]["rewards/accuracies"] == 1.0 and result.metrics[-1]["loss"] < result.metrics[0]["loss"] / 2
    measured = pair_accuracy(model, some)
    assert all(measured.by_reward) and measured.by_likelihood.difference > 0
    assert "by reward: 1.000" in str(measured) and measured.reward_p_value < 0.05


def test_references_of_three_kinds_give_the_same_training(tmp_path):
    """The adapter off, a second model, and a file: in float64 to what is float32 in it."""
    found = {}
    for kind in ("off", "second", "file"):
        torch.manual_seed(0)
        model = random_model(dtype=torch.float64)
        torch.manual_seed(0)
        options = {"ref_model": random_model(dtype=torch.float64)} if kind == "second" else {"precompute_ref": kind == "file"}
        result = dpo(model, pairs(), settings(tmp_path / kind), LoraConfig(r=2), quiet=True, **options)
        found[kind] = torch.tensor([entry["loss"] for entry in result.metrics], dtype=torch.float64)
        assert (tmp_path / kind / "reference_logps.safetensors").exists() == (kind == "file")
    assert torch.equal(found["off"], found["second"])
    largest = max(len(p.chosen) + len(p.rejected) for p in pairs()) * 5  # nats of a completion
    assert (found["file"] - found["off"]).abs().max() <= STEPS * largest * torch.finfo(torch.float32).eps


def test_a_file_of_another_base_or_other_data_is_refused(tmp_path):
    cache = tmp_path / "logps.safetensors"
    some = pairs()

    def run(folder, data=some, model=None, **options):
        torch.manual_seed(0)
        model = model or random_model()
        return dpo(model, data, settings(tmp_path / folder, max_steps=1), LoraConfig(r=2), quiet=True, ref_cache=cache, **options)

    run("first")
    before = cache.read_bytes()
    run("again")
    assert cache.read_bytes() == before
    with pytest.raises(PosttrainError, match=r"logps\.safetensors holds .* data is '[0-9a-f]{16}' there and '[0-9a-f]{16}' here"):
        run("other", some[:-1])
    torch.manual_seed(5)
    with pytest.raises(PosttrainError, match="reference is 'sha256:.* in float32' there and 'sha256:.* in float32' here"):
        run("other", model=random_model())
    torch.manual_seed(0)
    quantized = random_model()
    quantize_model(quantized)
    with pytest.raises(PosttrainError, match="in float32' there and '.* in nf4-float32' here"):
        run("other", model=quantized)
    with pytest.raises(PosttrainError, match="ld_alpha is 'None' there and '0.5' here"):
        run("other", preference=PreferenceConfig(ld_alpha=0.5))
    assert not (tmp_path / "other").exists() and cache.read_bytes() == before
    cache.write_bytes(before[:-4])
    with pytest.raises(PosttrainError, match="not a whole safetensors file"):
        run("other")


def test_a_reference_that_is_not_finite_leaves_no_file(tmp_path):
    def model():
        broken = random_model("llama2", num_hidden_layers=1)
        broken.model.embed_tokens.weight.data[50] = torch.nan
        return broken

    some = [Pair([5], [6], [7])] * 3 + [Pair([50], [6], [7])]
    with pytest.raises(PosttrainError, match=r"1 items of the data are not finite \(items 3, from 0\)"):
        dpo(model(), some, settings(tmp_path), LoraConfig(r=2), quiet=True, precompute_ref=True)
    assert not any(tmp_path.iterdir())
    with pytest.raises(PosttrainError, match=r"step 1: the loss is nan in micro-batch"):
        dpo(model(), some, settings(tmp_path), LoraConfig(r=2), quiet=True)


def test_an_adapter_trains_on_against_itself(tmp_path):
    """A model that comes with an adapter (supervised fine-tuning's) is its own reference, as it came."""
    model = adapted(torch.float64)
    before = pair_logps(model, pairs())
    result = dpo(model, pairs(), settings(tmp_path), preference=PreferenceConfig(), quiet=True)
    assert result.metrics[0]["rewards/margins"] == pytest.approx(0, abs=64 * torch.finfo(torch.float32).eps)
    measured = pair_accuracy(model, pairs(), before)
    assert not torch.equal(measured.policy, before)
    again = adapted(torch.float64)
    adapter_parameters(again).popitem()[1].data.add_(1)
    with pytest.raises(PosttrainError, match="reference is '.* with adapter [0-9a-f]{16}' there"):
        dpo(again, pairs(), settings(tmp_path), quiet=True, resume=True)


def test_all_weights_train_against_the_model_as_it_was(tmp_path):
    model = random_model()
    result = dpo(model, pairs(), settings(tmp_path, learning_rate=1e-3), quiet=True)
    assert result.metrics[0]["rewards/margins"] == pytest.approx(0, abs=64 * torch.finfo(torch.float32).eps)
    assert result.metrics[-1]["rewards/margins"] > 0 and (tmp_path / "model" / "config.json").exists()


def test_one_copy_of_a_quantized_base(tmp_path):
    torch.manual_seed(0)
    model = random_model()
    quantize_model(model)
    packed = [buffer.data_ptr() for buffer in model.buffers() if buffer.dtype == torch.uint8]
    result = dpo(model, pairs(), settings(tmp_path, max_steps=12), LoraConfig(r=4, target_modules="all-linear"), quiet=True)
    assert packed and packed == [buffer.data_ptr() for buffer in model.buffers() if buffer.dtype == torch.uint8]
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]


def final(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    """With the reference's log-probabilities on disk: the resumed run reads what the killed one wrote."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        preference_run(tmp_path / "whole", precompute_ref=True)
        tests = Path(__file__).parent
        command = [sys.executable, str(tests / "preference_run.py"), str(tmp_path / "killed"), "3"]
        ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tests)}, capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        preference_run(tmp_path / "killed", resume=True, precompute_ref=True)
    finally:
        torch.set_num_threads(threads)
    assert final(tmp_path / "killed") == final(tmp_path / "whole")
    with pytest.raises(PosttrainError, match=r"belongs to another run: preference\.beta was 0.1 and is 0.2\. Set"):
        preference_run(tmp_path / "killed", resume=True, precompute_ref=True, preference=PreferenceConfig(beta=0.2))


def test_a_base_held_otherwise_is_not_gone_on_with(tmp_path):
    for block_size in (64, 128):
        torch.manual_seed(0)
        model = random_model(num_hidden_layers=1)
        quantize_model(model, block_size=block_size)
        if block_size == 64:
            dpo(model, pairs(), settings(tmp_path, max_steps=2), LORA, quiet=True)
    with pytest.raises(PosttrainError, match=r"another run: held\.in_4_bits was .* blocks of 64, .* blocks of 128, "):
        dpo(model, pairs(), settings(tmp_path, max_steps=2), LORA, quiet=True, resume=True)


def test_refusals(tmp_path):
    for options, message in (
        ({"loss_type": "dpo"}, "expected one of sigmoid"),
        ({"beta": 0}, "beta is 0; expected a positive number"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights are 1 and the losses sigmoid, sft"),
        ({"loss_type": []}, "the losses none"),
        ({"loss_weights": [0.0]}, "loss_weights are 0.0; expected finite numbers, one at least other than 0"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0, 0]}, "loss_weights are 0, 0; expected"),
        ({"loss_weights": [float("nan")]}, "loss_weights are nan"),
        ({"loss_type": "simpo", "simpo_gamma": float("nan")}, "simpo_gamma is nan; expected a finite margin"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "hinge has none"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5; expected 0"),
        ({"loss_type": "aot", "use_weighting": True}, "use another loss"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "not defined with"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceConfig(**options)
    model = random_model()
    run = {"config": settings(tmp_path), "adapter": LoraConfig(r=2), "quiet": True}
    with pytest.raises(PosttrainError, match="holds no pairs"):
        dpo(model, [], **run)
    with pytest.raises(PosttrainError, match="example has 70 tokens; max_length is not given and the model's context holds 64"):
        dpo(model, [Pair([5] * 60, [6] * 10, [7])], **run)
    foreign = [Pair([5], [6], [7]), Pair([5], [6], [97])]
    for learn in (lambda: dpo(model, foreign, **run), lambda: pair_logps(model, foreign)):
        with pytest.raises(ValueError, match="pair 1 holds token ids from 5 to 97; the vocabulary has 0 to 96"):
            learn()
    with pytest.raises(PosttrainError, match="this loss needs no reference model"):
        dpo(model, pairs(), **run, preference=PreferenceConfig(loss_type="sft"), ref_model=random_model())
    with pytest.raises(PosttrainError, match="leave it out"):
        dpo(model, pairs(), **run, ref_model=model)
    with pytest.raises(PosttrainError, match="knows 33 tokens and the model 97"):
        dpo(model, pairs(), **run, ref_model=random_model(vocab_size=33))
    assert not any(tmp_path.iterdir())


def test_metrics_are_means_over_a_step_s_pairs(tmp_path):
    """However the step is cut into micro-batches."""
    shown = []
    for size, accumulation in ((6, 1), (2, 3)):
        torch.manual_seed(0)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        folder = tmp_path / str(size)
        dpo(random_model(dtype=torch.float64), pairs(6), settings(folder, **changes), LoraConfig(r=2), quiet=True)
        shown.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1])
    for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "entropy", "grad_norm"):
        assert shown[0][name] == pytest.approx(shown[1][name], rel=64 * torch.finfo(torch.float32).eps)
