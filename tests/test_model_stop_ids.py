"""Where a text ends: the tokenizer, config.json and generation_config.json, and the commands that ask them."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from posttrain import cli, offline
from posttrain.evaluate import generation_accuracy
from posttrain.model import ModelConfig, generate, load
from posttrain.model.stop_ids import stop_ids
from posttrain.model.tokenizer import Tokenizer


def config(**changes) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((offline.path() / "config.json").read_text()) | changes)


@pytest.mark.parametrize(
    ("eos", "in_config", "in_file", "expected"),
    [
        (2, 2, None, (2,)),
        (2, [9, 2, 7], None, (2, 9, 7)),
        (None, 9, None, (9,)),
        (None, None, None, ()),
        (2, 9, {"eos_token_id": [5, 2]}, (2, 5)),
        (2, 9, {"eos_token_id": 5}, (2, 5)),
        (2, 9, {"eos_token_id": None}, (2,)),
        (2, 9, {"temperature": 1}, (2, 9)),
    ],
)
def test_which_tokens_end_a_text(tmp_path, eos, in_config, in_file, expected):
    tokenizer = SimpleNamespace(eos_id=eos)
    if in_file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(in_file))
        assert stop_ids(tokenizer, config(eos_token_id=in_config), tmp_path) == expected
    else:
        assert stop_ids(tokenizer, config(eos_token_id=in_config), tmp_path) == expected
        assert stop_ids(tokenizer, config(eos_token_id=in_config)) == expected


def test_what_is_no_token_id_is_named(tmp_path):
    for wrong in ("2", [2, "x"], 1.5, True, {}):
        with pytest.raises(ValueError, match=r"^config\.json: eos_token_id is .* expected a token id, or a list"):
            config(eos_token_id=wrong)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is .* expected a token id, or a list"):
            stop_ids(SimpleNamespace(eos_id=2), config(), tmp_path)


@pytest.fixture(scope="module")
def model_that_ends_early(tmp_path_factory):
    """(folder, prompt, text up to the end): generation_config.json ends a text at a token that the tokenizer does not."""
    folder = tmp_path_factory.mktemp("stop") / "model"
    shutil.copytree(offline.path(), folder)
    model, tokenizer = load(folder), Tokenizer.load(folder)
    prompt = "Review: the film was"
    ids = generate(model, [tokenizer.encode(prompt, add_special_tokens=True)], 16)[0]
    end = next(i for i in range(4, len(ids)) if ids[i] not in ids[:i])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, ids[end]]}))
    return folder, prompt, tokenizer.decode(ids[:end])


@pytest.mark.parametrize("options", [[], ["--speculative", "ngram"]])
def test_generate_stops_there(model_that_ends_early, capsys, options):
    folder, prompt, text = model_that_ends_early
    assert cli.main(["generate", "--model", str(folder), "--prompt", prompt, "--max-new-tokens", "16", *options]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_generated_answers_stop_there(model_that_ends_early, tmp_path, capsys):
    folder, prompt, text = model_that_ends_early
    model, tokenizer = load(folder), Tokenizer.load(folder)
    ids = [tokenizer.encode(prompt, add_special_tokens=True)]
    assert generation_accuracy(model, tokenizer, ids, [text], folder=folder).accuracy == 1
    assert generation_accuracy(model, tokenizer, ids, [text]).accuracy == 0
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"prompt": prompt, "answer": text}) + "\n")
    assert cli.main(["evaluate", "--model", str(folder), "--data", str(items)]) == 0
    assert "(1 of 1)" in capsys.readouterr().out
