"""A run's state on disk and back: weights, moments, random states; nothing half written, nothing half loaded."""

from __future__ import annotations

import errno
import json
import random

import numpy as np
import pytest
import torch
from model_cases import random_model

from posttrain import checkpoint
from posttrain.adapters import LoraConfig, attach, load_adapter
from posttrain.checkpoint import checkpoints, keep_last, load_checkpoint, read_state, save_checkpoint, trainable
from posttrain.errors import PosttrainError
from posttrain.model.safetensors_file import SafetensorsReader, write_safetensors

IDS = torch.arange(24).view(2, 12)


def started(adapter=True, steps=2, seed=0):
    torch.manual_seed(seed)
    model = random_model()
    if adapter:
        attach(model, LoraConfig(r=2))
    else:
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, fused=True)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    (model(IDS) * torch.randn(97) * random.random() * np.random.rand()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("adapter", [True, False])
def test_goes_on_in_the_same_bits(tmp_path, adapter):
    model, optimizer = started(adapter)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2, "note": "x"})
    step(model, optimizer)
    again, its_optimizer = started(adapter, steps=1)
    for _ in range(3):
        random.random(), np.random.rand(), torch.rand(3)
    assert load_checkpoint(path, again, its_optimizer)["note"] == "x"
    step(again, its_optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_is_an_adapter(tmp_path):
    model, optimizer = started()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 7})
    torch.manual_seed(0)
    other = random_model()
    load_adapter(other, path)
    assert path.name == "checkpoint-7" and torch.equal(other(IDS), model(IDS))
    names = {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"}
    assert {p.name for p in path.iterdir()} == names


def test_only_whole_checkpoints_count_and_the_last_are_kept(tmp_path):
    model, optimizer = started()
    for number in (2, 10, 9):
        save_checkpoint(tmp_path, model, optimizer, {"step": number})
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    (tmp_path / ".checkpoint-4.abc.tmp").mkdir()
    (tmp_path / ".checkpoint-4.abc.tmp" / "half").write_text("of what a kill stopped")
    (tmp_path / ".checkpoint-5.abc.tmp").write_text("a file where a folder was expected")
    keep_last(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert not list(tmp_path.glob(".*"))
    assert checkpoints(tmp_path / "absent") == []


def state_of(model, optimizer):
    tensors = [p.detach().clone() for p in model.parameters()]
    return tensors + [v.clone() for entries in optimizer.state.values() for v in entries.values()]


WRONG = [
    {"step": "2"}, {"step": 2.0}, {"step": -1}, {"step": True}, {"tokens": None}, {"seconds": float("nan")}, {"identity": []},
    {"random_states": []}, {"untouched": 1}, {"kl_coef": "0.1"},
]  # fmt: skip


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"step": 1}', "[", "7", *(json.dumps({"step": 2, "random_states": {}} | wrong) for wrong in WRONG)]
)
def test_a_state_that_is_none_is_named(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(PosttrainError, match=r"trainer_state\.json cannot be read .* resume from another checkpoint"):
        read_state(tmp_path)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_changes_nothing(tmp_path, file, damage):
    path = save_checkpoint(tmp_path, *started(), {"step": 2})
    if damage == "cut":
        (path / file).write_bytes((path / file).read_bytes()[:-5])
    else:
        (path / file).unlink()
    model, optimizer = started(steps=1, seed=4)
    before, random_before = state_of(model, optimizer), torch.get_rng_state()
    with pytest.raises(PosttrainError, match="resume from another checkpoint"):
        load_checkpoint(path, model, optimizer)
    assert all(map(torch.equal, before, state_of(model, optimizer)))
    assert torch.equal(random_before, torch.get_rng_state())


def of_shape_3(tensors, name):
    tensors[f"{name}.exp_avg"] = torch.zeros(3)


def of_integers(tensors, name):
    tensors[f"{name}.exp_avg_sq"] = tensors[f"{name}.exp_avg_sq"].int()


def of_two_steps(tensors, name):
    tensors[f"{name}.step"] = torch.ones(2)


def without_a_moment(tensors, name):
    del tensors[f"{name}.exp_avg"]


def without_a_step(tensors, name):
    del tensors[f"{name}.step"]


def with_one_more(tensors, name):
    tensors[f"{name}.max_exp_avg_sq"] = tensors[f"{name}.exp_avg"].clone()


def empty(tensors, name):
    tensors.clear()


CHANGES = [of_shape_3, of_integers, of_two_steps, without_a_moment, without_a_step, with_one_more, empty]


@pytest.mark.parametrize("change", CHANGES)
def test_moments_that_the_optimizer_would_not_save_change_nothing(tmp_path, change):
    """Its fused step reads them by the parameters' sizes, whatever their own."""
    model, optimizer = started()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    with SafetensorsReader(path / "optimizer.safetensors") as file:
        tensors = {name: file.read(name) for name in file.entries}
    change(tensors, next(iter(trainable(model))))
    write_safetensors(path / "optimizer.safetensors", tensors.items())
    model, optimizer = started(steps=1, seed=4)
    before = state_of(model, optimizer)
    with pytest.raises(PosttrainError, match=r"optimizer\.safetensors is of another model, or damaged: .* expected .*; resume"):
        load_checkpoint(path, model, optimizer)
    assert all(map(torch.equal, before, state_of(model, optimizer)))


def test_what_no_step_has_touched_has_no_moments(tmp_path):
    model, optimizer = started(steps=0)
    names = list(trainable(model))
    trainable(model)[names[0]].grad = torch.ones_like(trainable(model)[names[0]])
    optimizer.step()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    assert read_state(path)["untouched"] == names[1:]
    again, its_optimizer = started(steps=2)
    load_checkpoint(path, again, its_optimizer)
    assert len(its_optimizer.state) == 1


def test_a_state_that_lacks_what_is_needed_is_named(tmp_path):
    path = save_checkpoint(tmp_path, *started(), {"step": 2, "tokens": 3})
    with pytest.raises(PosttrainError, match=r"trainer_state\.json cannot be read .it lacks identity, seconds"):
        read_state(path, needed=("tokens", "seconds", "identity"))


NUMPY = {"bit_generator": "MT19937", "has_gauss": 0, "gauss": 0.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"torch": "AAAA"},
        {"torch": 5},
        {"cuda": KeyError},
        {"python": [3, [1, 2], None]},
        {"python": [3, [2**40] * 625, None]},
        {"numpy": {"bit_generator": "MT19937"}},
        {"numpy": NUMPY | {"state": {"key": [-1] * 624, "pos": 0}}},
        {"numpy": NUMPY | {"state": {"key": [1] * 624, "pos": 10**9}}},
        dict.fromkeys(("torch", "cuda", "python", "numpy"), KeyError),
    ],
)
def test_random_states_that_are_none_change_nothing(tmp_path, wrong):
    path = save_checkpoint(tmp_path, *started(), {"step": 2})
    state = json.loads((path / "trainer_state.json").read_text())
    states = {key: value for key, value in (state["random_states"] | wrong).items() if value is not KeyError}
    (path / "trainer_state.json").write_text(json.dumps(state | {"random_states": states}))
    model, optimizer = started(steps=1, seed=4)
    before, random_before = state_of(model, optimizer), checkpoint.random_states()
    with pytest.raises(PosttrainError, match=r"trainer_state\.json cannot be read .its random_states are no .*; resume"):
        load_checkpoint(path, model, optimizer)
    assert all(map(torch.equal, before, state_of(model, optimizer))) and checkpoint.random_states() == random_before


def test_another_model_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, *started(), {"step": 2})
    model = random_model()
    attach(model, LoraConfig(r=3))
    optimizer = torch.optim.AdamW(trainable(model).values())
    with pytest.raises(PosttrainError, match="holds other parameters than this model trains .42 differ"):
        load_checkpoint(path, model, optimizer)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path, monkeypatch, fails_at):
    model, optimizer = started(adapter=False)
    save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    real, calls = checkpoint.write_safetensors, []

    def full(path, tensors):
        calls.append(path)
        if len(calls) == fails_at:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    for number in (2, 3):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, model, optimizer, {"step": number})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, *started(), {"step": 2})
    json.loads((path / "trainer_state.json").read_text())
    for file in path.glob("*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little")
        json.loads(file.read_bytes()[8 : 8 + header])
