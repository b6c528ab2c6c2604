"""What commands say of values that cannot work: the file that was given, and options by the names they have there."""

from __future__ import annotations

import errno
import json
import os

import pytest
from test_cli import assert_one_error, run

PAIR = '{"prompt": "a long prompt", "chosen": " b", "rejected": " c"}\n'


def test_answers_that_cannot_be_saved_are_told_before_the_model_is_loaded(capsys, tmp_path, monkeypatch) -> None:
    def load(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr("posttrain.cli.evaluate.load_model", load)
    items, folder = tmp_path / "items.jsonl", tmp_path / "folder"
    items.write_text('{"prompt": "a", "answer": "b"}\n')
    folder.mkdir()
    for path, message in ((folder, "is a folder; give"), (items / "x", "cannot be written"), (tmp_path / ("n" * 300), "too long")):
        result = run(capsys, "evaluate", "--model", "offline", "--data", items, "--save", path)
        assert_one_error(result, f"{path} ", message)


@pytest.mark.parametrize(
    ("what", "option", "value", "home"),
    [
        ("--text", "--limit", 1, "--task and --data"),
        ("--text", "--shots", 1, "--task"),
        ("--text", "--match", "exact", "--data without choices"),
        ("--data", "--shots", 0, "--task"),
        ("--data", "--split", "test", "--task"),
        ("--data", "--window", 8, "--text"),
        ("--data", "--match", "prefix", "--data without choices"),
        ("--task", "--match", "prefix", "--data without choices"),
        ("--task", "--max-new-tokens", 2, "--data without choices"),
        ("--task", "--stride", 2, "--text"),
    ],
)
def test_an_option_of_another_measurement_is_refused(capsys, tmp_path, what, option, value, home) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": "b"}\n')
    argv = ["evaluate", "--model", "offline", what, "offline" if what == "--task" else file, option, value]
    assert_one_error(run(capsys, *argv), f"{option} goes with {home}", "leave it out here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", 4], "--r goes with --method; leave it out here"),
        (["--method", "lora", "--target-modules", "q_proj,nope"], "'nope' matches no layer"),
    ],
)
def test_adapters_counts_what_would_train_or_says_why_not(capsys, options, message) -> None:
    result = run(capsys, "adapters", "--model", "offline", *options)
    assert_one_error(result, message)
    assert not result[1]


def test_adapters_names_a_broken_configuration(capsys, tmp_path) -> None:
    (tmp_path / "config.json").write_text("[1")
    assert_one_error(run(capsys, "adapters", "--model", tmp_path), f"{tmp_path / 'config.json'}")


def test_a_text_that_is_not_utf8_is_named(capsys, tmp_path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes("a caf\xe9".encode("latin-1"))
    assert_one_error(run(capsys, "evaluate", "--model", "offline", "--text", text), f"{text}: not UTF-8 (byte 5)", "save the file")


def test_quickstart_wants_a_folder(capsys, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    assert_one_error(run(capsys, "quickstart", "--offline", "--output", file), f"{file} is a file", "give the path of a folder")
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("command", "row", "option"),
    [
        ("sft", '{"prompt": "a long prompt", "completion": " b"}\n', "cut prompts with --truncate"),
        ("dpo", PAIR, "cut prompts with --truncation keep_end"),
        ("reward", PAIR, "cut prompts with --truncation keep_end"),
    ],
)
def test_options_have_their_names(capsys, tmp_path, command, row, option) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(row)
    argv = [command, "--model", "offline", "--data", data, "--output", tmp_path / "out"]
    assert_one_error(run(capsys, *argv, "--max-length", 5), "data.jsonl:1: ", f"raise --max-length, or {option}")
    assert_one_error(run(capsys, *argv, "--epochs", -1), "--epochs is -1.0; expected more than 0")
    assert not (tmp_path / "out").exists()


def test_a_model_in_4_bits_is_not_quantized_again(capsys, tmp_path) -> None:
    small = tmp_path / "nf4"
    assert run(capsys, "quantize", "--model", "offline", "--output", small)[0] == 0
    assert json.loads((small / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    again = run(capsys, "quantize", "--model", small, "--output", tmp_path / "again")
    assert_one_error(again, f"{small} is in 4 bits already, and is not quantized again")
    assert "None" not in again[2]
    loaded = run(capsys, "generate", "--model", small, "--quantize", "nf4", "--prompt", "a")
    assert_one_error(loaded, "load it as it is, without quantize")


def test_a_full_disk_s_advice_works_for_a_run_that_has_checkpoints(capsys, tmp_path, monkeypatch) -> None:
    from posttrain import checkpoint

    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "the sea", "completion": " is wide"}\n')
    command = ["sft", "--model", "offline", "--data", data, "--output", tmp_path / "o", "--max-steps", 2, "--save-steps", 1]
    write = checkpoint.write_safetensors

    def full(path, tensors):
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_safetensors", full)
        assert_one_error(run(capsys, *command), "No space left on device", "make room", "with --resume")
    assert run(capsys, *command, "--resume")[0] == 0


def test_where_no_model_can_be_written_is_told_before_the_work(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("posttrain.model.loading.load", None)
    (tmp_path / "file").write_text("old")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "there")
    for command in (["quantize"], ["merge-adapter", "--adapter", tmp_path / "adapter"]):
        for output, message in (
            (tmp_path / "file" / "x", "cannot be written (Not a directory)"),
            ("/proc/none", "cannot be written"),
            (tmp_path / "adapter", "adapter holds an adapter (adapter_config.json)"),
            (tmp_path / "pipe", "there is neither a file nor a folder"),
        ):
            assert_one_error(run(capsys, *command, "--model", "offline", "--output", output, "--force"), message)
