"""A small policy-optimization run, the same every time: completions of three tokens, worth the share of tokens below 32."""

from __future__ import annotations

import torch
from model_cases import random_model

from posttrain.adapters import LoraConfig
from posttrain.rl.loop import Sampling, optimize
from posttrain.rl.prompts import Prompt
from posttrain.rl.train import GRPOConfig, PPOConfig, grpo, ppo
from posttrain.trainer import TrainConfig

SAMPLING = Sampling(num_generations=4, max_completion_length=3)
PROMPTS = [Prompt([3 + i, 4, 5][: 1 + i % 3], f"prompt {i}", {"answer": str(i)}) for i in range(8)]
METHODS = {
    "ppo": ppo(PPOConfig(kl_coef=0.01, kl_target=2.0, num_ppo_epochs=2, num_mini_batches=2), SAMPLING),
    "grpo": grpo(GRPOConfig(beta=0.01), SAMPLING),
    "rloo": grpo(GRPOConfig(advantages="rloo", loss_type="rloo", beta=0.01, num_iterations=2), SAMPLING),
}


class Words:
    """A tokenizer whose text is the ids' numbers."""

    eos_id = 2

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


def low_tokens(completion_ids, **_):
    return [sum(token < 32 for token in ids) / len(ids) for ids in completion_ids]


def settings(folder, **changes):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 2,
        "warmup_ratio": 0.0,
    }
    return TrainConfig(folder, **{"learning_rate": 1e-2, **defaults, **changes})


def practised(folder, name, reward=low_tokens, model=None, prompts=PROMPTS, resume=False, on_step=None, **changes):
    torch.manual_seed(0)
    model = model or random_model(num_hidden_layers=1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"])
    config = settings(folder, **changes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model of 64 units is faster on one
    try:
        result = optimize(model, Words(), prompts, reward, config, METHODS[name], lora, resume=resume, quiet=True, on_step=on_step)
    finally:
        torch.set_num_threads(threads)
    return model, result
