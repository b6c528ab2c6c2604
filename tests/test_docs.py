"""What the documents say stands in a file stands there."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = [folder for folder in ("benchmarks", "docs", "kernels", "posttrain", "reference", "tests") if (ROOT / folder).is_dir()]
FILE = r"[\w/{},*-]+\.(?:py|c|h|md)"
NAME = r"[A-Za-z_][\w.]*"


@cache
def _files() -> frozenset[str]:
    """Paths from the root, not those that posttrain/ shows through its links."""
    links = [p for p in (ROOT / "posttrain").iterdir() if p.is_symlink()]
    found = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.*") if not any(link in f.parents for link in links)]
    return frozenset(str(f.relative_to(ROOT)) for f in (*found, *ROOT.glob("*.*")))


def _unfolded(path: str) -> list[str]:
    """`a/{b,c}.py` is two paths."""
    parts = re.split(r"\{([^}]*)\}", path)
    return ["".join(chosen) for chosen in product(*(p.split(",") if i % 2 else [p] for i, p in enumerate(parts)))]


def _found(path: str) -> list[str]:
    """The files that a path names: from the root, or in any folder where none is named."""
    return [f for f in _files() if Path(f).match(path) and (f.count("/") == path.count("/") or "/" not in path)]


@cache
def _names(file: str) -> frozenset[str]:
    """What a file defines: functions, classes, their methods and fields (also as `Class.method`), constants."""
    text = (ROOT / file).read_text()
    if not file.endswith(".py"):  # a definition of C begins its line, a call does not
        return frozenset(re.findall(r"^\w[^;={\n]*?\b(\w+)\(", text, re.M))
    found = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef)):
            continue
        owner = "" if isinstance(node, ast.Module) else node.name + "."
        for child in node.body:
            targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", child)]
            names = [getattr(target, "name", None) or getattr(target, "id", None) for target in targets]
            found |= {name for own in names if own for name in (own, owner + own)}
    return frozenset(found)


def _code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def _defined(files: list[str], name: str) -> bool:
    return any(name in _names(file) for file in files)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_refers_to_exists(document):
    missing = []
    for code in _code(document.read_text()):
        if not (match := re.fullmatch(rf"({FILE})(?:: ({NAME}(?:, {NAME})*))?", code)):
            continue
        for path in _unfolded(match[1]):
            files = _found(path)
            if not files or not all(_defined(files, name) for name in (match[2] or "").split(", ") if name):
                missing.append(code)
    assert not missing, f"{document.relative_to(ROOT)} refers to what is not there: {missing}"


@pytest.mark.parametrize("document", sorted((ROOT / "docs" / "math").glob("*.md")), ids=lambda path: path.name)
def test_the_column_where_names_functions_of_the_section_s_files(document):
    """`## Title (`posttrain/x.py`)`: a name alone in a table's last column is defined in x.py."""
    missing, files = [], []
    for line in document.read_text().splitlines():
        if line.startswith("#"):
            folder, files = "", []
            for path in _code(line):
                folder = path[: path.rfind("/") + 1] or folder
                files.append(folder + path[path.rfind("/") + 1 :])
        elif files and line.startswith("|"):
            where = [code for code in _code(line.rstrip("| ").rpartition("|")[2]) if re.fullmatch(NAME, code)]
            missing += [name for name in where if not _defined(files, name)]
    assert not missing, f"{document.name}: {missing}"


def test_what_the_documents_have_made_is_made():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert targets
    for document in DOCUMENTS:
        asked = {code.split()[1] for code in _code(document.read_text()) if re.match(r"make [a-z]", code)}
        assert asked <= targets, f"{document.name}: no rule for {asked - targets}"
