"""README.md is true: its Python runs, its files and make targets exist, its commands are commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S)


@pytest.mark.parametrize("code", [pytest.param(c, id=f"python{i}") for i, c in enumerate(_blocks(DOCUMENTS[0], "python"))])
def test_python_examples_run(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_named_files_exist(document):
    named = set(re.findall(r"`((?:kernels|reference|posttrain|benchmarks|tests|docs)/[\w./-]+)`", document.read_text()))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"{document.name} names files that do not exist: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_named_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.M))
    assert named <= targets, f"{document.name} names make targets that do not exist: {sorted(named - targets)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_named_commands_exist(document, capsys):
    from posttrain.cli import main

    for name in set(re.findall(r"(?:^|`)posttrain ([a-z-]+)", document.read_text(), re.M)):
        assert main([name, "--help"]) == 0, f"{document.name} names `posttrain {name}`"
