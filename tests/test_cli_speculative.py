"""`posttrain generate --speculative` and `posttrain speculative`: the same text, what is said about it, and clear errors."""

from __future__ import annotations

import pytest

from posttrain import offline
from posttrain.cli import main
from posttrain.speculative import drafters

GENERATE = ["generate", "--model", "offline", "--dtype", "fp32", "--prompt", "the film was the film was ", "--max-new-tokens", "12"]


def test_the_text_is_plain_decodings(capsys):
    assert main(GENERATE) == 0
    plain = capsys.readouterr()
    for arguments in (["ngram"], ["lookahead", "--draft-length", "3"], ["draft", "--draft", "offline", "--draft-quantize", "nf4"]):
        assert main([*GENERATE, "--speculative", *arguments]) == 0
        drafted = capsys.readouterr()
        assert drafted.out == plain.out and plain.out.strip()
        assert f"{arguments[0]}: " in drafted.err and "tokens a pass" in drafted.err and "speedup" in drafted.err
    assert "tokens a pass" not in plain.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculative", "draft"], "draft drafts need the folder of what was trained for them"),
        (["--speculative", "ngram", "--draft", "offline"], "need nothing trained"),
        (["--speculative", "draft", "--draft", "nowhere"], "no model folder at 'nowhere'"),
        (["--draft", "offline"], "--draft goes with --speculative"),
        (["--draft-length", "4"], "--draft-length goes with --speculative"),
        (["--speculative", "ngram", "--draft-quantize", "nf4"], "--draft-quantize goes with --speculative draft"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, message, capsys):
    assert main([*GENERATE, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_error_names_the_whole_command(capsys):
    assert main(["speculative", "plan", "--alpha", "2", "--gamma", "4", "--c", "0.1"]) == 1
    assert capsys.readouterr().err.startswith("posttrain speculative plan: error: ")


def test_the_command_line_names_all_drafters():
    from posttrain.cli.generate import DRAFTS

    assert set(DRAFTS) == set(drafters.KINDS)


def test_an_unknown_kind_is_named():
    from posttrain.errors import PosttrainError
    from posttrain.model import load
    from posttrain.model.tokenizer import Tokenizer

    path = offline.model_path()
    with pytest.raises(PosttrainError, match="the kind of draft is 'oracle'; expected one of draft, medusa"):
        drafters.make_drafter("oracle", load(path), Tokenizer.load(path))
