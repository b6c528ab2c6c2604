"""A small preference run, the same every time; as a script, one that kills itself: preference_run.py FOLDER STEP."""

from __future__ import annotations

import sys

import torch
from model_cases import random_model
from small_run import kill

from posttrain.adapters import LoraConfig
from posttrain.preference import dpo
from posttrain.preference.data import Pair
from posttrain.trainer import TrainConfig

STEPS = 5


def pairs(count=8, seed=2):
    generator = torch.Generator().manual_seed(seed)

    def ids(most):
        return torch.randint(3, 97, (int(torch.randint(1, most, (), generator=generator)),), generator=generator).tolist()

    return [Pair(ids(6), ids(12), ids(12)) for _ in range(count)]


def sequences(count=7, seed=3):
    """(prompt, completion) in token ids."""
    generator = torch.Generator().manual_seed(seed)

    def ids(most):
        return torch.randint(3, 97, (int(torch.randint(1, most, (), generator=generator)),), generator=generator).tolist()

    return [(ids(6), ids(14)) for _ in range(count)]


def settings(folder, **changes):
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-2}
    return TrainConfig(folder, **{**defaults, **changes})


def preference_run(folder, resume=False, on_step=None, **options):
    torch.manual_seed(0)
    model = random_model(dtype=torch.bfloat16, num_hidden_layers=1)
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "down_proj"])
    return dpo(model, pairs(), settings(folder), lora, resume=resume, quiet=True, on_step=on_step, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, step = sys.argv[1:]
    preference_run(folder, on_step=lambda entry: kill() if entry["step"] == int(step) else None, precompute_ref=True)
