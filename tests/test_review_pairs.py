"""Pairs derived from scores: one use of each review, equal lengths, nothing across splits."""

from __future__ import annotations

import pytest

from posttrain.fetch import fetch
from posttrain.review_pairs import prompt, review_pairs, to_jsonl
from posttrain.reviews import LABELS, Review, load_reviews


def made_up(count):
    """More positive than negative ones, of 1 to 7 words, scores 1.1 to 3.9."""
    made = []
    for i in range(count):
        sign = -1 if i % 3 == 0 else 1
        text = " ".join([f"w{i}"] * (1 + i * 5 % 7))
        made.append(Review(text, LABELS[sign > 0], sign * (1.1 + 0.1 * (i % 29))))
    return made


def check(reviews, pairs):
    score = {f" {r.text}": r.score for r in reviews}
    for pair in pairs:
        wanted = 1 if pair.prompt == prompt("positive") else -1
        assert pair.prompt in map(prompt, LABELS)
        assert wanted * score[pair.chosen] > 0 > wanted * score[pair.rejected]
        assert pair.margin == abs(score[pair.chosen] - score[pair.rejected])
    used = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    assert len(used) == len(set(used))
    asked = [pair.prompt for pair in pairs]
    assert abs(asked.count(prompt("positive")) - asked.count(prompt("negative"))) <= 1


def test_chosen_is_what_the_prompt_asks_for():
    reviews = made_up(60)
    pairs = review_pairs(reviews)
    assert len(pairs) == 20
    check(reviews, pairs)
    assert review_pairs(list(reviews)) == pairs
    strong = review_pairs(reviews, min_score=2.0)
    assert 0 < len(strong) < 20 and all(pair.margin > 4.0 for pair in strong)


def test_jsonl_has_trl_s_columns(tmp_path):
    pairs = review_pairs(made_up(12))
    lines = to_jsonl(pairs, tmp_path / "pairs.jsonl").read_text().splitlines()
    assert len(lines) == len(pairs) and lines[0].startswith('{"prompt": "Sentiment: ')


@pytest.mark.real
def test_the_real_reviews():
    splits = load_reviews(fetch("reviews", progress=False))
    texts = []
    for split in splits:
        pairs = review_pairs(split)
        check(split, pairs)
        texts.append({text for pair in pairs for text in (pair.chosen, pair.rejected)})
        words = [len(pair.chosen.split()) - len(pair.rejected.split()) for pair in pairs]
        assert abs(sum(words)) < len(words)  # less than a word apart on average
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
