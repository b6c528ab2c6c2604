"""LoRA's starts and LoRA+'s rate, from the command line into the adapter. The rest of `posttrain sft` is in test_cli.py."""

from __future__ import annotations

import json

import pytest

from posttrain import cli


def train(tmp_path, *options: object) -> tuple[int, dict]:
    data, output = tmp_path / "train.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    command = ["sft", "--model", "offline", "--data", data, "--output", output, "--max-steps", 2, "--r", 2, *options]
    code = cli.main([str(word) for word in command])
    config = output / "adapter_config.json"
    return code, json.loads(config.read_text()) if config.is_file() else {}


@pytest.mark.parametrize(("start", "r"), [("olora", 4), ("orthogonal", 2)])
def test_starts(tmp_path, start, r) -> None:
    """Those that begin with a part of the weight are saved at twice the rank, for the whole weight."""
    code, config = train(tmp_path, "--method", "qlora", "--init-lora-weights", start)
    assert code == 0 and config["r"] == r


def test_loftq_gets_the_weights_before_they_are_in_4_bits(tmp_path) -> None:
    assert train(tmp_path, "--method", "qlora", "--init-lora-weights", "loftq", "--quantize", "fp4")[0] == 0


def test_unknown_start(tmp_path, capsys) -> None:
    code, config = train(tmp_path, "--init-lora-weights", "nonsense")
    assert code != 0 and not config and "'nonsense'" in capsys.readouterr().err


def test_loraplus_ratio_scales_the_rate_of_B(tmp_path, capsys) -> None:
    """The rate is part of what a resumed run must share; without LoRA it is an error."""
    assert train(tmp_path, "--loraplus-lr-ratio", 4)[0] == 0
    assert train(tmp_path, "--loraplus-lr-ratio", 8, "--resume")[0] != 0
    assert "loraplus_lr_ratio was 4.0 and is 8.0" in capsys.readouterr().err
    (tmp_path / "ia3").mkdir()
    assert train(tmp_path / "ia3", "--method", "ia3", "--r", 2)[0] != 0


@pytest.mark.parametrize("names", ["q_proj, v_proj", "q_proj,v_proj,", "self_attn.q_proj,self_attn.v_proj"])
def test_names_with_commas_between_are_names(tmp_path, names) -> None:
    code, config = train(tmp_path, "--target-modules", names)
    assert code == 0 and [name.rpartition(".")[2] for name in config["target_modules"]] == ["q_proj", "v_proj"]
