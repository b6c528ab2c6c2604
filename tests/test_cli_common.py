"""--device: what each command takes it for, on machines with and without a GPU."""

from __future__ import annotations

import pytest
import torch

from posttrain import cli
from posttrain.cli import common
from posttrain.errors import PosttrainError


def _machine(monkeypatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("gpus", "name", "device"),
    [(0, "auto", "cpu"), (1, "auto", "cuda"), (8, "auto", "cuda"), (0, "cpu", "cpu"), (2, "cpu", "cpu"), (1, "cuda", "cuda"),
     (2, "cuda:1", "cuda:1")],
)  # fmt: skip
def test_device(monkeypatch, gpus, name, device) -> None:
    _machine(monkeypatch, gpus)
    assert common.resolve_device(name) == device


@pytest.mark.parametrize(
    ("gpus", "name", "message"),
    [
        (0, "cuda", "sees 0 GPUs here; use --device cpu"),
        (2, "cuda:2", "sees 2 GPUs"),
        (1, "gpu", "expected auto, cpu, cuda or cuda:N"),
        (1, "cuda:", "expected auto"),
        (1, "cuda:one", "expected auto"),
        (1, "cpu:0", "expected auto"),
        (1, "", "expected auto"),
    ],
)
def test_device_that_is_not_here(monkeypatch, gpus, name, message) -> None:
    _machine(monkeypatch, gpus)
    with pytest.raises(PosttrainError, match=message):
        common.resolve_device(name)


REQUIRED = {
    "quickstart": [],
    "generate": ["--model", "offline", "--prompt", "hello"],
    "evaluate": ["--model", "offline", "--data", "x.jsonl"],
    "sft": ["--model", "offline", "--data", "x.jsonl", "--output", "y"],
}


@pytest.mark.parametrize("command", REQUIRED)
def test_every_command_that_computes_takes_the_gpu_where_there_is_one(command, capsys) -> None:
    parser = cli.build_parser()
    assert parser.parse_args([command, *REQUIRED[command]]).device == "auto"
    with pytest.raises(SystemExit):
        parser.parse_args([command, "--help"])
    assert "the GPU where there is one" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("gpus", (0, 1))
def test_the_model_is_loaded_where_it_will_compute(monkeypatch, gpus) -> None:
    """`load` is told the device. Here it loads on the CPU whatever it is told: the GPU is a pretended one."""
    from posttrain.model import loading

    _machine(monkeypatch, gpus)
    asked, load = [], loading.load

    def load_elsewhere(folder, **options):
        asked.append(options.pop("device"))
        return load(folder, **options, device="cpu")

    monkeypatch.setattr(loading, "load", load_elsewhere)
    common.load_model(cli.build_parser().parse_args(["generate", *REQUIRED["generate"]]))
    assert asked == ["cuda" if gpus else "cpu"]
