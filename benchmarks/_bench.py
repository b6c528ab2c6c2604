"""What the kernel benchmarks share: timing in turn in one process, measured memory bandwidth, a table, JSON and a plot.

Candidates run one after the other in every round, so that a noisy machine disturbs all of them alike; medians and quartiles are
shown, and ratios of medians. `--cpu-time --threads 1` counts the thread's own processor time: on a machine that other processes
share it is the fairer clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of this thread; takes --threads 1")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time sees this thread alone: add --threads 1")
    torch.set_num_threads(options.threads)
    return options


def in_turn(candidates: dict[str, Callable[[], object] | None], options: argparse.Namespace) -> dict[str, list[float] | None]:
    """Milliseconds of each candidate in every round; None for a candidate that is not here. Each runs once untimed right before it
    is timed: the caches and the allocator are then as it leaves them itself, not as its neighbour did."""
    clock = time.thread_time if options.cpu_time else time.perf_counter
    times: dict[str, list[float] | None] = {name: [] if f else None for name, f in candidates.items()}
    for _ in range(options.rounds):
        for name, function in candidates.items():
            if function is None:
                continue
            function()
            start = clock()
            function()
            times[name].append((clock() - start) * 1e3)
    return times


def bandwidth(options: argparse.Namespace) -> float:
    """Bytes a second that this machine reads with `options.threads` threads, measured on a sum of 256 MiB."""
    big = torch.zeros(1 << 26)
    return big.numel() * 4 / (min(in_turn({"sum": big.sum}, options)["sum"]) / 1e3)


def row(title: str, times: dict[str, list[float] | None], limit_bytes: int, bytes_per_second: float) -> dict:
    """One line of the table, printed: the median of each (quartiles), peers' medians over ours, ours over the limit."""
    medians = {name: statistics.median(t) if t else None for name, t in times.items()}
    ours, *peers = medians
    limit = limit_bytes / bytes_per_second * 1e3
    cells = []
    for name, t in times.items():
        if t is None:
            cells.append(f"{name} n/a")
            continue
        low, _, high = statistics.quantiles(t, n=4)
        cells.append(f"{name} {medians[name]:.3f} ms ({low:.3f}-{high:.3f})")
    ratios = {peer: medians[peer] / medians[ours] if medians[peer] else None for peer in peers}
    faster = ", ".join(f"{r:.2f}x {peer}" if r else f"n/a {peer}" for peer, r in ratios.items())
    print(f"{title:34} {'; '.join(cells)}")
    limits = f"limit {limit:.3f} ms ({limit_bytes / 1e6:.1f} MB), ours takes {medians[ours] / limit:.2f} of it"
    print(f"{'':34} faster by: {faster}; {limits}", flush=True)
    return {"title": title, "milliseconds": times, "medians": medians, "ratios": ratios, "limit_milliseconds": limit}


def save(name: str, rows: list[dict], options: argparse.Namespace, facts: dict) -> None:
    """results/<name>.json and, where matplotlib is installed, results/<name>.png."""
    RESULTS.mkdir(exist_ok=True)
    facts = {**vars(options), **facts, "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    (RESULTS / f"{name}.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    print(f"wrote {RESULTS / name}.json")
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed (extra `bench`)")
        return
    names = list(dict.fromkeys(candidate for r in rows for candidate in r["medians"]))
    figure, axes = pyplot.subplots(figsize=(10, 0.5 + 0.22 * len(rows) * (len(names) + 1)))
    for i, candidate in enumerate(names):
        values = [r["medians"].get(candidate) or 0 for r in rows]
        axes.barh([-(j * (len(names) + 1) + i) for j in range(len(rows))], values, label=candidate)
    axes.set_yticks([-(j * (len(names) + 1) + len(names) / 2) for j in range(len(rows))], [r["title"] for r in rows])
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds (median)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    print(f"wrote {RESULTS / name}.png")
