"""The shape of the house: which folder may import what, and what the package must not drag in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PEERS = {"bitsandbytes", "transformers", "peft", "trl", "liger_kernel", "mergekit", "gguf", "matplotlib", "scipy"}
# folder -> packages it may import beside the standard library and itself, relatively
ALLOWED = {
    "reference": {"numpy"},
    "kernels": {"torch", "triton"},
    "posttrain": {"posttrain", "torch", "numpy", "safetensors", "tokenizers", "jinja2", "yaml", "rich"},
}


def _files(folder: str) -> list[Path]:
    """Python files of a folder, not those that posttrain/ shows through its links."""
    links = {p for p in (ROOT / folder).iterdir() if p.is_symlink()}
    return sorted(f for f in (ROOT / folder).rglob("*.py") if not any(link in f.parents for link in links))


def _imports(file: Path) -> set[str]:
    """Top-level packages that a file imports absolutely."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder):
    files = _files(folder)
    assert files
    for file in files:
        foreign = _imports(file) - set(sys.stdlib_module_names) - ALLOWED[folder]
        assert not foreign, f"{file.relative_to(ROOT)} imports {sorted(foreign)}"


def test_peers_stay_outside_the_product():
    assert not PEERS & set().union(*ALLOWED.values())


def test_every_kernel_has_its_oracle_and_its_test():
    for file in _files("kernels"):
        if "def aot_variants" in file.read_text() and not file.stem.startswith("_"):
            # nf4.py has its own; a part of an operation, lora_linear_down.py, its operation's
            words = file.stem.split("_")
            names = ["_".join(words[:end]) for end in range(len(words), 0, -1)]
            operation = next((name for name in names if (ROOT / "reference" / f"{name}.py").exists()), None)
            assert operation, f"{file.stem} has no oracle"
            assert (ROOT / "tests" / f"test_{operation}.py").exists(), f"{file.stem} has no test"


def test_importing_posttrain_is_light():
    code = "import posttrain, posttrain.cli, sys; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_file_is_two_ideas():
    long = {}
    for folder in (*ALLOWED, "tests", "benchmarks"):
        for file in (*_files(folder), *(ROOT / folder).glob("cpu/*.[ch]")):
            lines = len(file.read_text().splitlines())
            if lines > 400:
                long[str(file.relative_to(ROOT))] = lines
    assert not long, f"over 400 lines: {long}"
