"""What to practise on, made of the scored reviews: a task with a verifiable answer; openings, and pairs for their reward model.

    sentiment   a review, after one answered example; the answer, one word and a new line, is the sign of people's score
    openings    a positive review is asked for, and its first words are given (of any review), to be continued
    positive    pairs DERIVED from the scores, which nobody compared: under that request the positive review is the chosen one

The example is one short review of the training split, so that the answer's form is told and most of the prompt is the question.
Prompts are made within a split (reviews.py): no text, nor a near-duplicate of one, crosses from train to test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from posttrain import review_pairs
from posttrain.atomic import atomic_write
from posttrain.reviews import LABELS, Review, prompt

STOP = "\n"  # ends an answer
OPENING = 4  # words
SHORT = 5  # words of an example


def example(train: Sequence[Review]) -> Review:
    """The best scored of the short positive reviews, as an answered example: of equals the first in the split."""
    short = [review for review in train if review.label == LABELS[1] and len(review.text.split()) <= SHORT]
    if not short:
        raise ValueError(f"no positive review has at most {SHORT} words; expected the training split")
    return max(short, key=lambda review: review.score)


def sentiment(reviews: Iterable[Review], train: Sequence[Review]) -> list[dict[str, Any]]:
    """Rows with "prompt" and "answer"; `train` gives the example, which is no question itself."""
    shot = example(train)
    return [{"prompt": prompt(r.text, [shot]), "answer": r.label} for r in reviews if r != shot]


def openings(reviews: Iterable[Review]) -> list[dict[str, Any]]:
    """Rows with "prompt": the request for a positive review, and the first words of one of either sentiment."""
    long = [review for review in reviews if len(review.text.split()) > OPENING]
    return [{"prompt": f"{review_pairs.prompt(LABELS[1])} {' '.join(review.text.split()[:OPENING])}"} for review in long]


def positive(reviews: Sequence[Review]) -> list[dict[str, Any]]:
    """Rows with "prompt", "chosen", "rejected" and "margin": the pairs of review_pairs.py, all turned to the same request, so that
    a reward model need not compare text and request."""
    asked = review_pairs.prompt(LABELS[1])
    pairs = [vars(pair) for pair in review_pairs.review_pairs(reviews)]
    turned = ((p["chosen"], p["rejected"]) if p["prompt"] == asked else (p["rejected"], p["chosen"]) for p in pairs)
    both = zip(pairs, turned, strict=True)
    return [{"prompt": asked, "chosen": chosen, "rejected": rejected, "margin": p["margin"]} for p, (chosen, rejected) in both]


def to_jsonl(rows: Iterable[dict[str, Any]], path: str | os.PathLike) -> Path:
    """Write JSON Lines, and return the path."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Path(path)
