"""A small model and task that come with posttrain, for trying every step, and testing it, without a network.

model/          byte-level Llama of 0.8 million parameters in bfloat16, trained by train.py on the text of text.py
task/*.jsonl    made-up reviews with their sentiment (text.py), in the columns prompt and completion
"""

from __future__ import annotations

from pathlib import Path

from posttrain.reviews import Review, Splits

SCORES = {"negative": -2.0, "positive": 2.0}
_PREFIX, _SUFFIX = "Review: ", "\nSentiment:"


def path() -> Path:
    """The model's Hugging Face directory."""
    return Path(__file__).parent / "model"


model_path = path


def task_path(split: str = "train") -> Path:
    """The JSON Lines file of "train", "validation" or "test"."""
    return Path(__file__).parent / "task" / f"{split}.jsonl"


def load_task() -> Splits:
    """The made-up reviews, as `posttrain.reviews.load_reviews` gives the real ones (scores are 2 and -2)."""
    from posttrain.data import read_jsonl

    splits = {}
    for split in Splits._fields:
        rows = [row for _, row in read_jsonl(task_path(split))]
        labels = [row["completion"].strip() for row in rows]
        splits[split] = tuple(
            Review(row["prompt"].removeprefix(_PREFIX).removesuffix(_SUFFIX), label, SCORES[label])
            for row, label in zip(rows, labels, strict=True)
        )
    return Splits(**splits)
