"""Make everything in this folder that is not code: `python -m posttrain.offline.train` (about ten minutes on two cores).

A byte-level tokenizer (256 bytes and 3 special tokens, no merges), a Llama-family model trained on `text.documents`,
and the task's files. The text, the first weights and the order of everything follow from the seeds; the last bits of
the weights also depend on the machine's arithmetic.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from posttrain import offline, reviews
from posttrain.model.config import ModelConfig
from posttrain.model.decoder import CausalLM
from posttrain.model.loading import save
from posttrain.model.tokenizer import Tokenizer
from posttrain.offline import text

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# (sequences, bytes in each) of a step, in turn: short windows are cheap, long ones reach as far as few-shot prompts do.
WINDOWS = ((8, 256), (8, 256), (8, 256), (8, 256), (2, 1024))
STEPS, LEARNING_RATE, WARMUP, SEED = 1000, 3e-3, 50, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=offline.path().parent, help="folder for model/ and task/")
    out = parser.parse_args().out
    write_task(out / "task")
    model = train(write_tokenizer(out / "model"))
    save(model.to(torch.bfloat16), out / "model")


def write_task(folder: Path) -> None:
    for name, split in text.task()._asdict().items():
        reviews.to_jsonl(split, folder / f"{name}.jsonl")


def write_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json: ids 0 to 2 are SPECIAL, the others the bytes in the order of their ByteLevel characters."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        "unk_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Tokenizer.load(folder)


def batches(tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """The documents, end to end, as STEPS windows (B, T + 1)."""
    documents = text.documents()
    stream: list[int] = []
    for rows, length in itertools.islice(itertools.cycle(WINDOWS), STEPS):
        while len(stream) < rows * (length + 1):
            stream += tokenizer.encode(next(documents))
        yield torch.tensor(stream[: rows * (length + 1)]).view(rows, length + 1)
        del stream[: rows * (length + 1)]


def train(tokenizer: Tokenizer) -> CausalLM:
    torch.manual_seed(SEED)
    model = CausalLM(ModelConfig.from_hf(CONFIG))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.perf_counter()
    for step, batch in enumerate(batches(tokenizer), 1):
        decay = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP) * decay
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == STEPS:
            seconds = time.perf_counter() - start
            print(f"step {step} of {STEPS}  {loss.item() / math.log(2):.3f} bits a byte  {seconds:.0f} s", flush=True)
    return model


if __name__ == "__main__":
    main()
