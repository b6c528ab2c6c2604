"""Prompts made of the reviews: the example, answers, openings, and their file."""

from __future__ import annotations

import json

import pytest

from posttrain import offline
from posttrain.review_pairs import review_pairs
from posttrain.review_prompts import example, openings, positive, sentiment, to_jsonl
from posttrain.reviews import Review

SPLITS = offline.load_task()
TRAIN = [
    Review("Good .", "positive", 2.0),
    Review("Great fun !", "positive", 3.5),
    Review("It is a long , great one .", "positive", 4.0),
]


def test_the_example_is_the_clearest_short_one():
    assert example(TRAIN).text == "Great fun !"
    with pytest.raises(ValueError, match="expected the training split"):
        example(TRAIN[2:])


def test_questions_have_their_answers():
    rows = sentiment([*TRAIN[:2], Review("Bad .", "negative", -3.0)], TRAIN)
    assert [row["answer"] for row in rows] == ["positive", "negative"]
    assert rows[1]["prompt"] == "Review: Great fun !\nSentiment: positive\n\nReview: Bad .\nSentiment:"


def test_openings_ask_for_a_positive_review():
    rows = openings([Review("one two three four five", "negative", -3.0), Review("too short", "positive", 3.0)])
    assert rows == [{"prompt": "Sentiment: positive\nReview: one two three four"}]


def test_pairs_are_all_turned_to_the_positive_one():
    score = {f" {review.text}": review.score for review in SPLITS.train}
    rows, pairs = positive(SPLITS.train), review_pairs(SPLITS.train)
    assert len(rows) == len(pairs) > 10
    for row, pair in zip(rows, pairs, strict=True):
        assert {row["chosen"], row["rejected"]} == {pair.chosen, pair.rejected}
        assert score[row["chosen"]] > 0 > score[row["rejected"]] and row["margin"] == pair.margin
    assert {row["prompt"] for row in rows} == {"Sentiment: positive\nReview:"}


def test_the_file(tmp_path):
    rows = openings(SPLITS.test[:5])
    path = to_jsonl(rows, tmp_path / "prompts.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
