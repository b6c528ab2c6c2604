"""Adapters of several sizes and places in folders, a model that serves them, and what each request should get."""

from __future__ import annotations

import functools

import pytest
import torch
from model_cases import random_model

from posttrain import adapters
from posttrain.adapters import LoraConfig, serving
from posttrain.model import generate
from posttrain.quantized import quantize_model

CONFIGS = {
    "all": LoraConfig(r=8, lora_alpha=16, init_lora_weights=False),
    "small": LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "patterned": LoraConfig(
        r=4, rank_pattern={"q_proj": 12}, alpha_pattern={"v_proj": 9}, use_rslora=True, init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "up_proj"],
    ),
    "late": LoraConfig(r=2, lora_alpha=8, target_modules=["o_proj"], layers_to_transform=[2], init_lora_weights=False),
}  # fmt: skip
PROMPTS = [[3, 14, 15, 92, 6], [5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [5], [40, 41]]


def make_model(quantized: bool = False, dtype=torch.float32):
    torch.manual_seed(7)
    model = random_model("smollm2", dtype)
    if quantized:
        quantize_model(model)
    return model


def save_adapters(root) -> dict:
    """Their folders. Their base's fingerprint is the dense model's, which is also that of its quantization."""
    found = {}
    for seed, (name, config) in enumerate([*CONFIGS.items(), ("newer", CONFIGS["all"])]):
        model = make_model()
        torch.manual_seed(seed)
        adapters.attach(model, config, name)
        adapters.save_adapter(model, root / name)
        found[name] = root / name
    return found


@functools.cache
def _attached(folder, quantized):
    model = make_model(quantized)
    if folder is not None:
        adapters.load_adapter(model, folder)
    return model


@functools.cache
def _alone(folder, prompt, quantized, count):
    return generate(_attached(folder, quantized), [prompt], count)[0]


def alone(folders, name, prompts=PROMPTS, quantized=False, count=10):
    """What each prompt gets by itself, with that adapter attached and nothing else."""
    folder = None if name is None else folders[name]
    return [_alone(folder, tuple(prompt), quantized, count) for prompt in prompts]


def serve(folders, names=CONFIGS, quantized=False):
    model = make_model(quantized)
    for name in names:
        serving.load(model, name, folders[name])
    return model


def unchanged(model, act, error, message) -> None:
    """Whether `act` raises that and leaves the model as it was."""
    before, names = generate(model, PROMPTS, 4), serving.names(model)
    modules = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        act()
    assert serving.names(model) == names and {name: type(module) for name, module in model.named_modules()} == modules
    assert generate(model, PROMPTS, 4) == before
