"""LoRA+: B's rate is the ratio times A's, in the optimizer and after a resumed run."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model
from small_run import examples, settings, small_run

from posttrain.adapters import LoraConfig, adapter_parameters, attach
from posttrain.adapters.lora_plus import parameter_groups
from posttrain.errors import PosttrainError
from posttrain.packing import collate
from posttrain.sft import loss_sum
from posttrain.trainer import TrainConfig, train


def first_moves(folder, **changes):
    """How far each parameter goes in the first step; Adam's first step is the rate itself, up to its epsilon."""
    torch.manual_seed(0)
    model = random_model(num_hidden_layers=1)
    attach(model, LoraConfig(r=2, init_lora_weights=False, use_dora=True))
    before = {key: p.detach().clone() for key, p in adapter_parameters(model).items()}
    config = settings(folder, max_steps=1, warmup_steps=1, adam_epsilon=0.0, **changes)
    train(model, [[e] for e in examples(4)], collate, loss_sum, config, quiet=True)
    return {key: (p.detach() - before[key]).double().abs().median() for key, p in adapter_parameters(model).items()}


def test_b_moves_by_the_ratio_times_the_rate(tmp_path):
    plain, plus = first_moves(tmp_path / "plain"), first_moves(tmp_path / "plus", loraplus_lr_ratio=16.0)
    for key, moved in plus.items():
        # Both are differences of fp32 numbers of a size below 64, rounded to them.
        unit = 64 * torch.finfo(torch.float32).eps
        assert abs(moved - plain[key] * (16 if "lora_B" in key else 1)) < 17 * unit
        assert plain[key] > 100 * unit


def test_groups():
    parameters = {f"x.{end}": torch.nn.Parameter(torch.zeros(1)) for end in ("lora_A.weight", "lora_B.weight", "lora_B.bias")}
    (only,) = parameter_groups(parameters)
    assert only["params"] == list(parameters.values()) and only["lr_scale"] == 1.0
    slow, fast = parameter_groups(parameters, 4.0)
    assert [id(p) for p in slow["params"]] == [id(parameters["x.lora_A.weight"])] and slow["lr_scale"] == 1.0
    assert len(fast["params"]) == 2 and fast["lr_scale"] == 4.0


def test_resumes_bit_for_bit(tmp_path):
    whole, _ = small_run(tmp_path / "whole", loraplus_lr_ratio=8.0)

    class Stop(Exception):
        pass

    def stop(entry):
        if entry["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        small_run(tmp_path / "cut", on_step=stop, loraplus_lr_ratio=8.0)
    resumed, _ = small_run(tmp_path / "cut", resume=True, loraplus_lr_ratio=8.0)
    ours, theirs = adapter_parameters(whole), adapter_parameters(resumed)
    assert all(torch.equal(p, theirs[key]) for key, p in ours.items())
    with pytest.raises(PosttrainError, match="loraplus_lr_ratio was 8.0 and is 4.0"):
        small_run(tmp_path / "cut", resume=True, loraplus_lr_ratio=4.0)


def test_refused(tmp_path):
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="loraplus_lr_ratio is"):
            TrainConfig("x", loraplus_lr_ratio=value)
    for options in ({"learning_rate": 0.5, "loraplus_lr_ratio": 1e308}, {"learning_rate": 1e39}):
        with pytest.raises(ValueError, match="learning_rate is .* and loraplus_lr_ratio .*; expected rates that float32 can hold"):
            TrainConfig("x", **options)
    model = random_model(num_hidden_layers=1)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(PosttrainError, match="nothing that trains is a LoRA adapter's B"):
        train(model, [[e] for e in examples(4)], collate, loss_sum, settings(tmp_path, loraplus_lr_ratio=2.0), quiet=True)
