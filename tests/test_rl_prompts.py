"""Prompts of a JSON Lines file: text and messages, columns, and errors with file and line."""

from __future__ import annotations

import json

import pytest

from posttrain import offline
from posttrain.errors import PosttrainError
from posttrain.model.tokenizer import Tokenizer
from posttrain.rl.prompts import digest, load_prompts


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(offline.model_path())


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_and_columns(tmp_path, tokenizer):
    path = _write(tmp_path / "p.jsonl", {"prompt": "2 + 2 =", "answer": 4}, {"prompt": "x", "answer": 5})
    first, second = load_prompts(path, tokenizer)
    assert first.ids == tokenizer.encode("2 + 2 =", add_special_tokens=True)
    assert (first.text, first.columns, second.columns) == ("2 + 2 =", {"answer": 4}, {"answer": 5})
    assert digest([first, second]) != digest([second, first])


@pytest.mark.parametrize(
    ("row", "message"),
    (
        ({"answer": 4}, 'p.jsonl:2: "prompt" is missing'),
        ({"prompt": "", "answer": 4}, 'p.jsonl:2: "prompt" is empty'),
        ({"prompt": 3, "answer": 4}, 'p.jsonl:2: "prompt" is a int'),
        ({"prompt": [], "answer": 4}, 'p.jsonl:2: "prompt" is empty'),
        ({"prompt": "y"}, "p.jsonl:2: the columns are prompt; the first row has prompt, answer"),
        ({"prompt": "y" * 99, "answer": 4}, "p.jsonl:2: the prompt has 99 tokens, and at most 50 fit"),
    ),
)
def test_rows_that_are_refused(tmp_path, tokenizer, row, message):
    path = _write(tmp_path / "p.jsonl", {"prompt": "x", "answer": 1}, row)
    with pytest.raises(PosttrainError, match=message):
        load_prompts(path, tokenizer, max_length=50)


def test_an_empty_file(tmp_path, tokenizer):
    with pytest.raises(PosttrainError, match="holds no prompts"):
        load_prompts(_write(tmp_path / "p.jsonl"), tokenizer)
