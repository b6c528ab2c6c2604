"""The loop: order of the data, learning rates, accumulation, clipping, and what stops it."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import random_model
from small_run import examples, settings, small_run
from tolerance import assert_as_accurate

from posttrain.adapters import LoraConfig, adapter_parameters, attach
from posttrain.errors import PosttrainError
from posttrain.packing import collate
from posttrain.sft import loss_sum
from posttrain.trainer import TrainConfig, learning_rate, step_items, total_steps, train


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_each_epoch_sees_every_item_once_in_its_own_order(items, size, accumulation, seed):
    config = TrainConfig(
        "x", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, seed=seed, num_train_epochs=2
    )
    per_epoch = math.ceil(items / (size * accumulation))
    assert total_steps(config, items) == 2 * per_epoch
    epochs = []
    for epoch in range(2):
        steps = [step_items(config, epoch * per_epoch + i, items) for i in range(per_epoch)]
        assert all(1 <= len(step) <= accumulation and all(1 <= len(part) <= size for part in step) for step in steps)
        epochs.append(list(itertools.chain(*itertools.chain(*steps))))
        assert sorted(epochs[-1]) == list(range(items))
    assert items < 10 or epochs[0] != epochs[1]


def test_learning_rate():
    rates = [learning_rate(TrainConfig("x", learning_rate=1.0, warmup_steps=4), i, 12) for i in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == 0.5 * (1 + math.cos(math.pi / 2)) and all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < rates[0]
    linear = TrainConfig("x", learning_rate=1.0, warmup_ratio=0.25, lr_scheduler_type="linear")
    assert [learning_rate(linear, i, 8) for i in (0, 1, 2, 5)] == [0.5, 1.0, 1.0, 0.5]
    constant = TrainConfig("x", learning_rate=1.0, warmup_ratio=0, lr_scheduler_type="constant")
    assert {learning_rate(constant, i, 8) for i in range(8)} == {1.0}


def one_step(tmp_path, dtype, **changes):
    """The adapter's gradient in the only step over 12 examples (seen through an optimizer that does not move)."""
    torch.manual_seed(0)
    model = random_model(dtype=dtype)
    attach(model, LoraConfig(r=2, init_lora_weights=False))
    seen = {}
    for name, parameter in adapter_parameters(model).items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    config = settings(tmp_path, max_steps=1, max_grad_norm=0.0, **changes)
    rows = [[example] for example in examples(12)]
    result = train(model, rows, collate, loss_sum, config, quiet=True)
    return torch.cat([g.flatten() for g in seen.values()]), result.metrics[0]


def test_accumulation_equals_one_big_batch(tmp_path):
    """Micro-batches have different numbers of labels: a mean of means would weigh their tokens differently."""
    cuts = {"whole": (12, 1), "two": (6, 2), "four": (3, 4), "uneven": (5, 3)}
    runs = {}
    for name, (size, accumulation) in cuts.items():
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        runs[name], entry = one_step(tmp_path / name, torch.float32, **changes)
        assert entry["tokens"] == sum(len(e.input_ids) for e in examples(12))
    exact, _ = one_step(tmp_path / "exact", torch.float64, per_device_train_batch_size=12, gradient_accumulation_steps=1)
    for gradient in runs.values():
        assert_as_accurate(gradient, runs["whole"], exact)


def test_loss_and_tokens_are_those_of_the_data(tmp_path):
    _, entry = one_step(tmp_path, torch.float64, per_device_train_batch_size=5, gradient_accumulation_steps=3)
    torch.manual_seed(0)
    model = random_model(dtype=torch.float64)
    attach(model, LoraConfig(r=2, init_lora_weights=False))
    losses = []
    for example in examples(12):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        losses.append(torch.nn.functional.cross_entropy(model(ids)[0, :-1], labels[1:], reduction="none")[labels[1:] != -100])
    plain = torch.cat(losses).mean()
    assert abs(entry["loss"] - plain.item()) <= 100 * torch.finfo(torch.float64).eps * plain.item()  # about 100 terms


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_kill_left_half_written_is_deleted(tmp_path, resume):
    if resume:
        small_run(tmp_path, max_steps=2)
    names = ("checkpoint-4", "model", "adapter_model.safetensors", "metrics.jsonl", "loss.svg")
    for name in names[:2]:
        (tmp_path / f".{name}.abcd_123.tmp").mkdir()
        (tmp_path / f".{name}.abcd_123.tmp" / "half").write_text("x")
    for name in names[2:]:
        (tmp_path / f".{name}.abcd_123.tmp").write_text("half")
    others = {".notes.abcd_123.tmp", ".model.tmp", "model.abcd_123.tmp", ".model.abcd_123.old"}
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    small_run(tmp_path, max_steps=2, resume=resume)
    assert {p.name for p in tmp_path.iterdir() if p.suffix in (".tmp", ".old")} == others


def test_clipping(tmp_path):
    norms, moved = [], []
    for limit in (0.0, 1e-3):
        model, result = small_run(tmp_path / str(limit), max_steps=1, max_grad_norm=limit, adam_epsilon=1.0)
        norms.append(result.metrics[0]["grad_norm"])
        moved.append(sum(p.abs().sum().item() for n, p in adapter_parameters(model).items() if "lora_B" in n))
    assert norms[0] == norms[1] > 1e-3  # the norm that is shown is the one before clipping
    assert moved[1] < moved[0]


def test_metrics_file_and_plot(tmp_path):
    seen = []
    _, result = small_run(tmp_path, on_step=seen.append)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen == result.metrics and [e["step"] for e in lines] == list(range(1, 8))
    keys = {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "peak_memory",
        "seconds",
    }
    assert all(e.keys() == keys for e in lines)
    assert (tmp_path / "loss.svg").read_text().startswith("<svg")
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-6", "checkpoint-7"]


def test_training_learns(tmp_path):
    _, result = small_run(tmp_path, max_steps=24, learning_rate=3e-2, save_steps=0)
    losses = [e["loss"] for e in result.metrics]
    # Six epochs of 13 short sequences: the worst of the last five steps is below the best of the first five.
    assert max(losses[-5:]) < min(losses[:5])


def test_activation_checkpointing_gives_the_same_bits(tmp_path):
    runs = [small_run(tmp_path / str(on), activation_checkpointing=on, max_steps=2)[0] for on in (False, True)]
    first, second = (adapter_parameters(model) for model in runs)
    assert all(torch.equal(p, second[name]) for name, p in first.items())


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, broken):
    model = random_model()
    attach(model, LoraConfig(r=2))
    calls, before = [], {}

    def loss(model, batch):
        calls.append(batch)
        value = loss_sum(model, batch)
        if len(calls) == 8:  # the second micro-batch of the fourth step
            before.update({n: p.detach().clone() for n, p in adapter_parameters(model).items()})
            value = value * torch.nan if broken == "loss" else _Explode.apply(value)
        return value

    rows = [[example] for example in examples(16)]
    config = settings(tmp_path)
    what = "the loss is nan in micro-batch 2 of 2" if broken == "loss" else "the gradient's norm is (nan|inf)"
    items = step_items(config, 3, 16)
    named = items[1] if broken == "loss" else items[0] + items[1]
    with pytest.raises(PosttrainError, match=rf"step 4: {what} .items {', '.join(map(str, named))} of the data") as error:
        train(model, rows, collate, loss, config, quiet=True)
    assert "the last good checkpoint is" in str(error.value) and str(tmp_path / "checkpoint-2") in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


class _Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def test_what_cannot_be_trained(tmp_path):
    model = random_model()
    rows = [[example] for example in examples()]
    with pytest.raises(PosttrainError, match="holds no examples"):
        train(model, [], collate, loss_sum, settings(tmp_path), quiet=True)
    model.requires_grad_(False)
    with pytest.raises(PosttrainError, match="attach an adapter first"):
        train(model, rows, collate, loss_sum, settings(tmp_path), quiet=True)
    attach(model, LoraConfig())
    masked = [[type(e)(e.input_ids, [-100] * len(e.labels))] for e in examples()]
    with pytest.raises(PosttrainError, match="no token of this step has a label"):
        train(model, masked, collate, loss_sum, settings(tmp_path), quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; .* at least 1"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"num_train_epochs": 1e308}, r"num_train_epochs is 1e\+308; expected at most 1e\+12"),
        ({"num_train_epochs": math.inf}, "num_train_epochs is inf"),
        ({"max_steps": 10**400}, "max_steps is 10+; expected at most"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan"),
        ({"max_grad_norm": math.inf}, "max_grad_norm is inf"),  # a checkpoint's JSON cannot hold it
        ({"seed": 10**20}, "seed is 1"),
        ({"lr_scheduler_type": "step"}, "expected cosine, linear or constant"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("x", **changes)
