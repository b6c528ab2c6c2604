"""What a run shows: lines where there is no terminal, one live line where there is, and metrics that survive a kill."""

from __future__ import annotations

import io
import json
import os
import re

import pytest
import torch
from rich.console import Console

from posttrain.errors import PosttrainError
from posttrain.progress import Metrics, ProgressLine, peak_memory, read_metrics

ENTRY = {"step": 3, "loss": 1.25, "tokens_per_second": 12345.6, "peak_memory": 3 * 2**29}


def shown(terminal: bool, **options) -> str:
    out = io.StringIO()
    with ProgressLine(8, 2, Console(file=out, force_terminal=terminal, width=120), **options) as line:
        line.update(ENTRY)
    return out.getvalue()


def test_plain_lines():
    assert re.fullmatch(r"step 3/8  loss 1\.2500  12,346 tokens/s  peak 1\.50 GiB  \d+:\d\d left\n", shown(False))


def test_live_line():
    text = shown(True)
    assert "\x1b[" in text and "3/8" in text and "loss 1.2500  12,346 tokens/s  peak 1.50 GiB" in text


def test_quiet():
    assert shown(False, quiet=True) == shown(True, quiet=True) == ""


def test_metrics_keep_what_the_checkpoint_knows_of(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, 0)
    for step in range(1, 6):
        metrics.add({"step": step})
    with open(file, "a") as handle:
        handle.write('{"step": 6, "lo')
    assert [e["step"] for e in read_metrics(file)] == [1, 2, 3, 4, 5]
    Metrics(file, 3).add({"step": 4, "again": True})
    assert [json.loads(line) for line in file.read_text().splitlines()][2:] == [{"step": 3}, {"step": 4, "again": True}]
    assert read_metrics(tmp_path / "absent") == []


@pytest.mark.parametrize("line", [b"{}", b"[1]", b'{"step": "3"}', b'{"step": null}', b"7"])
def test_a_line_that_no_run_has_written_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b"\n")
    for read in (read_metrics, lambda path: Metrics(path, 3)):
        with pytest.raises(PosttrainError, match=r"metrics\.jsonl line 2: .*; expected an object with a whole number as its step"):
            read(file)
    file.write_bytes(b'{"step": 1, "\xff": 2}\n')
    with pytest.raises(PosttrainError, match=r"metrics\.jsonl is not UTF-8 "):
        Metrics(file, 3)


def test_peak_memory_sees_an_allocation():
    before = peak_memory(torch.device("cpu"))
    size = before + 2**26  # more than was ever held
    block = bytearray(os.urandom(1024)) * (size // 1024)
    assert peak_memory(torch.device("cpu")) >= size > before > 0 and block
