"""What a run shows while it goes: one live line on a terminal, plain lines elsewhere, and metrics.jsonl."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .atomic import atomic_write
from .errors import PosttrainError


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a GPU; on a CPU, the process's resident memory (0 where it is not told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(match[1]) * 1024 if match else 0
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, up to the first that a kill left half written; none without a file. PosttrainError for a
    line that no run has written."""
    path, entries = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except UnicodeDecodeError as error:
        raise PosttrainError(f"{path} is not UTF-8 ({error}); move it away, or take out what is not a run's") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            break
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            given = line if len(line) <= 60 else line[:57] + "..."
            raise PosttrainError(
                f"{path} line {number}: {given!r}; expected an object with a whole number as its step. Move the file away, or take "
                "out that line"
            )
        entries.append(entry)
    return entries


class Metrics:
    """metrics.jsonl: one JSON object a step, appended as it happens."""

    def __init__(self, path: str | os.PathLike, last_step: int):
        """Keeps the entries up to `last_step` (what a resumed run does again is not there twice)."""
        entries = [e for e in read_metrics(path) if e["step"] <= last_step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
        self._path = path

    def add(self, entry: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class ProgressLine:
    """Step, loss, tokens/s, peak memory and time left: redrawn in place on a terminal, one line an update elsewhere."""

    def __init__(self, total: int, start: int, console: Console | None = None, quiet: bool = False):
        self._console = console or Console(stderr=True)
        self._total, self._start, self._quiet = total, start, quiet
        self._began = time.perf_counter()
        self._live = None
        if self._console.is_terminal and not quiet:
            columns = (
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("starting", total=total, completed=start)

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def update(self, entry: dict[str, Any]) -> None:
        """Show a metrics entry: step, loss, tokens_per_second, peak_memory, and a reward where there is one."""
        reward = f"reward {entry['reward']:.3f}  " if "reward" in entry else ""
        text = (
            f"{reward}loss {entry['loss']:.4f}  {entry['tokens_per_second']:,.0f} tokens/s  "
            f"peak {entry['peak_memory'] / 2**30:.2f} GiB"
        )
        if self._live:
            self._live.update(self._task, completed=entry["step"], description=text)
        elif not self._quiet:
            done = entry["step"] - self._start
            left = (time.perf_counter() - self._began) / max(done, 1) * (self._total - entry["step"])
            minutes, seconds = divmod(round(left), 60)
            line = f"step {entry['step']}/{self._total}  {text}  {minutes}:{seconds:02d} left"
            self._console.print(line, highlight=False, soft_wrap=True)
