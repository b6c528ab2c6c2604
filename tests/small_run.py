"""A small training run, the same every time; as a script, one that kills itself.

python small_run.py FOLDER step 5       SIGKILL after the fifth step
python small_run.py FOLDER save 4       SIGKILL while checkpoint-4 is written
"""

from __future__ import annotations

import os
import signal
import sys

import torch
from model_cases import random_model

from posttrain import checkpoint
from posttrain.adapters import LoraConfig
from posttrain.data import Example
from posttrain.sft import sft
from posttrain.trainer import TrainConfig

STEPS = 7


def examples(count=13, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, 18, (), generator=generator))
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        made.append(Example(ids, [-100, -100, *ids[2:]]))
    return made


def settings(folder, **changes):
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2}
    return TrainConfig(folder, **{"learning_rate": 1e-2, **defaults, **changes})


def small_run(folder, resume=False, on_step=None, model=None, **changes):
    """Seven steps with dropout over two epochs; a checkpoint after each second step."""
    torch.manual_seed(0)
    model = model or random_model(dtype=torch.bfloat16, num_hidden_layers=1)
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "down_proj"])
    result = sft(model, examples(), settings(folder, **changes), lora, resume=resume, quiet=True, on_step=on_step)
    return model, result


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder, where, number):
    real = checkpoint.write_safetensors

    def write(path, tensors):
        if f"checkpoint-{number}." in str(path):
            path.write_bytes(b"half")
            kill()
        real(path, tensors)

    if where == "save":
        checkpoint.write_safetensors = write
    small_run(folder, on_step=lambda entry: kill() if where == "step" and entry["step"] == number else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
