"""What a draft learns from: text that its target itself continues.

Prompts are given (a review, a chat message) or come from the target, which continues the opening of a user's message (Magpie, Xu
et al., arXiv:2406.08464): an instruct model then asks what it was trained to answer. The target's continuation of each is what
the draft will have to predict; a share of them greedy and a share sampled, as the target will be used.

    continuations.jsonl    first line: the target's fingerprint and how the rest was made
                           then {"prompt_ids", "completion_ids", "prompt", "completion"} a line: the ids count, the texts are
                           for whoever reads it
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.atomic import atomic_write
from posttrain.data import IGNORE_INDEX, Example, read_jsonl
from posttrain.errors import PosttrainError
from posttrain.fingerprint import fingerprint
from posttrain.model.decoder import CausalLM
from posttrain.model.generate import generate
from posttrain.model.tokenizer import Tokenizer

# What people ask about a text they paste; {} is the text.
ABOUT = (
    "Summarize this film review in one sentence: {}",
    "Write a short film review that begins like this: {}",
    "Rewrite this in simple words: {}",
    "Write a polite reply to the person who wrote this: {}",
    "Explain step by step what the writer of this review means: {}",
)


@dataclass(frozen=True)
class ContinuationConfig:
    """max_new_tokens of each continuation. Prompt i is continued at temperatures[i mod their number], 0 being greedy. batch_size
    rows run together, which decides a sampled text as much as the seed does."""

    max_new_tokens: int = 96
    temperatures: tuple[float, ...] = (0.0, 0.8)
    top_p: float = 1.0
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 4 or self.batch_size < 1 or not self.temperatures:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, batch_size {self.batch_size} and temperatures {self.temperatures}; "
                "expected at least 4, 1 and one temperature"
            )


def review_prompts(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """One prompt a text: by turns the text itself, to go on with, and a chat message about it (where there is a template)."""
    prompts = []
    for i, text in enumerate(texts):
        turn, about = divmod(i, 2)
        if about and tokenizer.chat_template is not None:
            prompts.append(tokenizer.chat([{"role": "user", "content": ABOUT[turn % len(ABOUT)].format(text)}]))
        else:
            prompts.append(tokenizer.encode(text, add_special_tokens=True))
    return prompts


def own_prompts(
    model: CausalLM,
    tokenizer: Tokenizer,
    count: int,
    seed: int = 0,
    max_tokens: int = 48,
    batch_size: int = 128,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Chat prompts that the model makes up: user messages sampled after the template's opening of one, those that it ended.

    PosttrainError where the tokenizer has no chat template, or the model ends too few messages.
    """
    if tokenizer.chat_template is None or tokenizer.eos_id is None:
        raise PosttrainError("the model has no chat template, so it cannot be asked for prompts; give prompts")
    mark = "\ue000"  # a private character, to find where the message goes
    opening = tokenizer.encode(tokenizer.chat_text([{"role": "user", "content": mark}]).partition(mark)[0])
    prompts: list[list[int]] = []
    tries = 0
    while len(prompts) < count:
        if tries > 2 * count + 4 * batch_size:
            raise PosttrainError(f"of {tries} messages that the model began it ended {len(prompts)}; give prompts instead")
        texts = generate(model, [opening] * batch_size, max_tokens, 0.8, stop_ids=[tokenizer.eos_id], seed=seed + tries)
        ended = [tokenizer.decode(text).strip() for text in texts if 4 <= len(text) < max_tokens]
        prompts += [tokenizer.chat([{"role": "user", "content": text}]) for text in dict.fromkeys(ended) if text]
        tries += batch_size
        if on_batch:
            on_batch(min(len(prompts), count), count)
    return prompts[:count]


def continue_prompts(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    config: ContinuationConfig,
    stop_ids: Sequence[int] = (),
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Each prompt and its continuation, which alone has labels; it ends with the first stop id where the model ended it."""
    made: dict[int, Example] = {}
    for turn, temperature in enumerate(config.temperatures):
        ours = sorted(range(turn, len(prompts), len(config.temperatures)), key=lambda i: len(prompts[i]))
        for start in range(0, len(ours), config.batch_size):
            batch = ours[start : start + config.batch_size]
            texts = generate(
                model,
                [prompts[i] for i in batch],
                config.max_new_tokens,
                temperature,
                top_p=config.top_p if temperature else 1.0,
                stop_ids=stop_ids,
                seed=config.seed * 1_000_003 + turn * len(prompts) + start,
            )
            for i, text in zip(batch, texts, strict=True):
                ids = text + ([stop_ids[0]] if stop_ids and len(text) < config.max_new_tokens else [])
                made[i] = Example([*prompts[i], *ids], [IGNORE_INDEX] * len(prompts[i]) + ids)
            if on_batch:
                on_batch(len(made), len(prompts))
    return [made[i] for i in range(len(prompts)) if made[i].num_labels >= 2]


def recipe(model: CausalLM, prompts: Sequence[Sequence[int]], config: ContinuationConfig) -> dict[str, Any]:
    """What decides the continuations, as the file's first line has it."""
    digest = hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
    settings = {"base_fingerprint": fingerprint(model), "prompts": digest, **asdict(config)}
    settings["dtype"] = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return json.loads(json.dumps(settings))


def write_continuations(
    path: str | os.PathLike, examples: Sequence[Example], made_by: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write the file described above."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(made_by) + "\n")
        for example in examples:
            start = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
            parts = {"prompt": example.input_ids[:start], "completion": example.input_ids[start:]}
            row: dict[str, Any] = {f"{name}_ids": ids for name, ids in parts.items()}
            row |= {name: tokenizer.decode(ids, skip_special_tokens=False) for name, ids in parts.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_continuations(path: str | os.PathLike, model: CausalLM) -> tuple[list[Example], dict[str, Any]]:
    """The examples and how they were made. PosttrainError for a file that is not one, or that another model continued."""
    rows = list(read_jsonl(path))
    made_by = rows[0][1] if rows else {}
    if "base_fingerprint" not in made_by:
        raise PosttrainError(f"{Path(path)} does not begin with how it was made; expected a file that train-draft wrote")
    if made_by["base_fingerprint"] != fingerprint(model):
        raise PosttrainError(
            f"{Path(path)} was continued by the model {made_by['base_fingerprint']} and this is {fingerprint(model)}; a draft "
            "learns what its own target writes: give another file, which will be made"
        )
    examples = []
    for number, row in rows[1:]:
        prompt, completion = row.get("prompt_ids"), row.get("completion_ids")
        if not (isinstance(prompt, list) and isinstance(completion, list) and prompt and completion):
            raise PosttrainError(f'{Path(path)}:{number}: expected "prompt_ids" and "completion_ids", each a list of token ids')
        if not all(type(i) is int and 0 <= i < model.config.vocab_size for i in prompt + completion):
            raise PosttrainError(f"{Path(path)}:{number}: token ids must be 0 to {model.config.vocab_size - 1}")
        examples.append(Example(prompt + completion, [IGNORE_INDEX] * len(prompt) + completion))
    if not examples:
        raise PosttrainError(f"{Path(path)} holds no continuations")
    return examples, made_by
