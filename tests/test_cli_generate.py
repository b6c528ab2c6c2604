"""Text printed while its tokens come: no half characters, no lost spaces."""

from posttrain.cli.generate import TokenWriter


def test_token_writer_holds_back_half_a_character(capsys) -> None:
    class Bytes:
        def decode(self, ids) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    writer = TokenWriter(Bytes())
    shown = []
    for byte in "aé€\N{GRINNING FACE}b".encode():
        writer(0, byte)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "\N{GRINNING FACE}", "b"]
    writer(0, 0xC3)  # the text ends in half a character
    writer.finish()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_token_writer_keeps_the_space_after_a_token_without_text(capsys) -> None:
    class Words:
        def decode(self, ids) -> str:  # of words with markers: the space before the first is not part of the text
            return "".join(["", " a", " b"][i] for i in ids).removeprefix(" ")

    writer = TokenWriter(Words())
    for token in (0, 1, 0, 0, 2, 1):
        writer(0, token)
    writer.finish()
    assert capsys.readouterr().out == "a b a\n"
