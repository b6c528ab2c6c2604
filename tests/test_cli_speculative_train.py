"""posttrain speculative train-draft: from prompts to a folder that generate --speculative takes, and what it says."""

from __future__ import annotations

import json

import pytest

from posttrain.cli import main

COMMAND = ["speculative", "train-draft", "--model", "offline", "--epochs", "1", "--max-new-tokens", "12", "--batch-size", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file with prompts, and where the continuations go."""
    folder = tmp_path_factory.mktemp("train_draft")
    rows = [{"prompt": f"The {noun} was"} for noun in ("soup", "bed", "plot", "hero", "tram", "choir", "room")]
    rows += [{"prompt": [{"role": "user", "content": "Write a review of a cafe."}]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("medusa", ["--heads", "2", "--vocab-size", "100"], "depth 2"),
        ("eagle", ["--unroll", "2"], "depth 6"),
        ("draft", ["--layers", "1"], "greedy_agreement"),
    ],
)
def test_train_and_decode(kind, options, said, data, tmp_path, capsys):
    text = ["--prompts", str(data / "prompts.jsonl"), "--data", str(data / "text.jsonl")]
    assert main([*COMMAND, "--kind", kind, "--output", str(tmp_path / kind), *text, *options]) == 0
    out, err = capsys.readouterr()
    assert said in err and "tokens to learn" in err
    if kind != "medusa":
        assert "text.jsonl is there and is learned as it is; --prompts, --max-new-tokens: no new text" in err
    folder = out.strip().splitlines()[-1]
    assert main(["generate", "--model", "offline", "--prompt", "The soup was", "--max-new-tokens", "12"]) == 0
    plain = capsys.readouterr().out
    drafted = ["--speculative", kind, "--draft", folder]
    assert main(["generate", "--model", "offline", "--prompt", "The soup was", "--max-new-tokens", "12", *drafted]) == 0
    assert capsys.readouterr().out == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "draft", "--quantize", "nf4"], "dense weights"),
        (["--kind", "medusa", "--reviews", "0"], "no prompts"),
        (["--kind", "medusa", "--vocab-size", "-1"], "must be 0 or more"),
        (["--kind", "medusa", "--max-new-tokens", "5000"], "--max-new-tokens 5000 leaves no room for a prompt"),
        (["--kind", "medusa", "--epochs", "0"], "--epochs is 0"),
        (["--kind", "medusa", "--learning-rate", "0"], "--learning-rate is 0"),
        (["--kind", "medusa", "--layers", "2"], "--layers goes with --kind draft; leave it out here"),
        (["--kind", "medusa", "--version", "3"], "--version goes with --kind eagle"),
        (["--kind", "draft", "--noise", "0"], "--noise goes with --kind eagle"),
        (["--kind", "draft", "--vocab-size", "10"], "--vocab-size goes with --kind medusa or eagle"),
        (["--kind", "eagle", "--own-heads"], "--own-heads goes with --kind medusa"),
        (["--kind", "eagle", "--prompts", "p", "--reviews", "3"], "--reviews goes with prompts of the command's own"),
    ],
)
def test_what_cannot_be_is_told(options, message, tmp_path, capsys):
    assert main([*COMMAND, "--output", str(tmp_path / "x"), *options]) == 1
    assert message in capsys.readouterr().err


def test_prompts_that_are_none_are_named(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert main([*COMMAND, "--kind", "medusa", "--output", str(tmp_path / "x"), "--prompts", str(tmp_path / "p.jsonl")]) == 1
    assert 'p.jsonl:2: "prompt" is null' in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text("[1]\n")
    assert main([*COMMAND, "--kind", "medusa", "--output", str(tmp_path / "x"), "--prompts", str(tmp_path / "p.jsonl")]) == 1
    assert 'expected an object with "prompt", text or messages' in capsys.readouterr().err


def test_layers_that_are_none_are_named(tmp_path, capsys):
    assert main([*COMMAND, "--kind", "draft", "--output", str(tmp_path / "x"), "--layers", "0,a"]) == 2
    assert "expected a number of layers, or their indices such as 0,1,29, given 0,a" in capsys.readouterr().err
