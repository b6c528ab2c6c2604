"""PEFT beside ours for methods with virtual tokens: the same random model in both, and the two ways between their files."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import random_model
from safetensors.torch import load_file
from test_model_decoder import transformers_model
from tolerance import assert_as_accurate

from posttrain import adapters, offline
from posttrain.data import load_dataset
from posttrain.model import generate, load
from posttrain.model.tokenizer import Tokenizer
from posttrain.sft import sft
from posttrain.trainer import TrainConfig

IDS = torch.arange(40).view(2, 20)
T = IDS.shape[1]
MASK = torch.ones(2, T, dtype=torch.bool)
MASK[1, :6] = False


def assert_equal_models(model, peer):
    """Equal logits to rounding, rows whole and padded on the left; equal greedy continuations.

    PEFT counts padding as positions (a padded row's logits change with it); here it is told so, elsewhere it does not.
    """
    wide, positions = copy.deepcopy(model).double(), torch.arange(T).expand(2, T)
    with torch.no_grad():
        for ours_too, theirs_too in (
            ({}, {}),
            ({"position_ids": positions, "attention_mask": MASK}, {"attention_mask": MASK.long()}),
        ):
            ours, exact = model(IDS, **ours_too), wide(IDS, **ours_too)
            theirs = peer(IDS, **theirs_too).logits[:, -T:]
            assert_as_accurate(ours[MASK], theirs[MASK], exact[MASK])
            assert_as_accurate(theirs[MASK], ours[MASK], exact[MASK])
        peer.base_model.generation_config.eos_token_id = None
        arguments = {"attention_mask": torch.ones_like(IDS[:1]), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        continued = peer.generate(input_ids=IDS[:1], **arguments)
    assert generate(model, IDS[:1].tolist(), 12) == continued[:, T:].tolist()


def check_peft_loads_ours(folder, name, config):
    peft = pytest.importorskip("peft")
    model = random_model(name)
    peer = transformers_model(name, model.state_dict())
    adapters.attach(model, config)
    adapters.save_adapter(model, folder)
    assert_equal_models(model, peft.PeftModel.from_pretrained(peer, folder))


def check_we_load_pefts(folder, name, make_config):
    """make_config: peft -> its configuration."""
    peft = pytest.importorskip("peft")
    model = random_model(name)
    peer = peft.get_peft_model(transformers_model(name, model.state_dict()), make_config(peft)).eval()
    peer.save_pretrained(folder)
    adapters.load_adapter(model, folder)
    assert_equal_models(model, peer)
    adapters.save_adapter(model, folder / "again")
    ours, theirs = (load_file(where / "adapter_model.safetensors") for where in (folder / "again", folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return model, peer


def assert_learns(folder, config, learning_rate, steps=6):
    """Every step sees the same eight reviews, and the last has a smaller loss than the first."""
    model = load(offline.path(), dtype="fp32")
    data = load_dataset(offline.task_path("train"), Tokenizer.load(offline.path()))
    data = sorted(data, key=lambda example: len(example.input_ids))[:8]
    settings = TrainConfig(folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=learning_rate)
    losses = [entry["loss"] for entry in sft(model, data, settings, config, quiet=True).metrics]
    assert losses[-1] < losses[0] and len(losses) == steps
