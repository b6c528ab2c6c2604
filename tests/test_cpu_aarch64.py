"""The native CPU engine's C for another processor than this one: it compiles, and lacks nothing when it is loaded."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which("aarch64-linux-gnu-gcc")


@pytest.mark.skipif(COMPILER is None, reason="no compiler for AArch64 (Debian: gcc-aarch64-linux-gnu)")
def test_nothing_is_undefined(tmp_path):
    """A name that only an x86 file defines would make the library unusable there, and say so nowhere else."""
    sources = sorted(map(str, (Path(__file__).parent.parent / "kernels" / "cpu").glob("*.c")))
    command = [COMPILER, "-O0", "-fPIC", "-shared", "-Wl,--no-undefined", *sources, "-lm", "-lpthread", "-ldl"]
    done = subprocess.run([*command, "-o", str(tmp_path / "engine.so")], capture_output=True, text=True)
    assert done.returncode == 0 and "implicit declaration" not in done.stderr, done.stderr
