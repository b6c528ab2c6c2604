"""One page on a quickstart run: report.md, accuracy.svg and loss.svg in the run's folder."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from posttrain.atomic import atomic_write
from posttrain.statistics import format_p

if TYPE_CHECKING:
    from posttrain.evaluate import Accuracy
    from posttrain.quickstart import Results

_WIDTH, _ROW, _LEFT, _RIGHT, _TOP = 640, 44, 110, 120, 48


def write(results: Results) -> Path:
    """Write the report and its plots into results.output; returns the path of report.md."""
    output = results.output
    interval_chart(output / "accuracy.svg", results.accuracies, f"Test accuracy, n = {_n(results)} (95 % intervals)")
    shutil.copyfile(results.adapter / "loss.svg", output / "loss.svg")
    path = output / "report.md"
    with atomic_write(path) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    return path


def markdown(results: Results) -> str:
    """The page, as GitHub's Markdown."""
    r, s, tuned = results, results.settings, results.accuracies["fine-tuned"]
    first = r.comparisons[0]
    peak = max(phase.peak_bytes for phase in r.phases)
    losses = [entry["loss"] for entry in r.training.metrics]
    ends = max(1, len(losses) // 10)
    counts = ", ".join(f"{len(reviews)} {split}" for split, reviews in r.splits._asdict().items())
    chosen = "given" if r.own_model or not s.is_default else "chosen on the validation split"
    base = "offline" if s.task == "offline" else shlex.quote(str(r.model))
    with_adapter = f"--model {base} --quantize nf4 --adapter {shlex.quote(str(r.adapter))}"
    lines = [
        f"# {r.model.name}: QLoRA on `{s.task}`",
        "",
        f"**{first.a_accuracy:.3f} → {tuned.accuracy:.3f}** test accuracy (McNemar p {format_p(first.p_value)}, "
        f"n = {tuned.n}) in {r.seconds:.0f} s after the downloads, peak memory {peak / 1e9:.2f} GB.",
        "",
        f"- Task: is a movie-review snippet positive or negative? {counts} items, no near-duplicate in two splits; the "
        f"first {tuned.n} of test are measured.",
        f"- Model: {r.model.name}. {r.model_note}",
        f"- In memory: {r.storage}.",
        f"- Steps and learning rate were {chosen}; the test split was only measured.",
        "",
        "| system | accuracy | 95 % interval (Wilson) | right of |",
        "|---|---|---|---|",
        *(
            f"| {name} | {a.accuracy:.3f} | {a.interval[0]:.3f} to {a.interval[1]:.3f} | {sum(a.correct)} of {a.n} |"
            for name, a in r.accuracies.items()
        ),
        "",
        *(f"- {comparison}" for comparison in r.comparisons),
        f"- Saved, loaded into a fresh model and measured again: all {tuned.n} predictions are the same; "
        f"largest difference of a log-probability {r.reload_error:g}.",
        "",
        "![accuracy](accuracy.svg)",
        "",
        "![loss](loss.svg)",
        "",
        f"Training: {r.training.steps} steps, {r.training.tokens} tokens, LoRA r = {s.r}, "
        f"alpha = {s.lora_alpha:g} on all linear layers, learning rate {s.learning_rate:g}, seed {s.seed}; loss "
        f"{sum(losses[:ends]) / ends:.3f} over the first {ends} steps, {sum(losses[-ends:]) / ends:.3f} over the last.",
        "",
        "| phase | seconds | CPU seconds, all threads | peak memory by then (GB) |",
        "|---|---|---|---|",
        *(f"| {p.name} | {p.seconds:.1f} | {p.cpu_seconds:.1f} | {p.peak_bytes / 1e9:.2f} |" for p in r.phases),
        "",
        f"A test item, answered by the fine-tuned model (people say {r.sample['label']}):",
        "",
        *(f"> {line}" for line in f"{r.sample['prompt']}**{r.sample['output']}**".splitlines()),
        "",
        "To go on:",
        "",
        "```",
        f"posttrain generate {with_adapter} --prompt $'Review: What a fine film.\\nSentiment:'",
        f"posttrain evaluate {with_adapter} --task {s.task}",
        f"posttrain merge-adapter --model {base} --adapter {shlex.quote(str(r.adapter))} --output merged",
        "```",
        "",
        "Machine: " + "; ".join(f"{name} {value}" for name, value in r.machine.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def interval_chart(path: Path, accuracies: Mapping[str, Accuracy], title: str) -> None:
    """Write one bar a system, its 95 % interval as a whisker, on an axis from 0 to 1."""
    height = _TOP + _ROW * len(accuracies) + 36
    bottom = _TOP + _ROW * len(accuracies)

    def across(share: float) -> float:
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def text(x: float, y: float, content: str, anchor: str, size: int = 13) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(content)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        text(_WIDTH / 2, 24, title, "middle", 15),
    ]
    for tenth in range(0, 11, 2):
        x = across(tenth / 10)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(text(x, bottom + 18, f"{tenth / 10:g}", "middle", 12))
    for i, (name, result) in enumerate(accuracies.items()):
        top, middle = _TOP + _ROW * i + 8, _TOP + _ROW * i + _ROW / 2
        low, high = map(across, result.interval)
        width = across(result.accuracy) - _LEFT
        parts += [
            text(_LEFT - 8, middle + 4, name, "end"),
            f'<rect x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_ROW - 16}" fill="#9ecae1"/>',
            f'<path d="M{low:.1f} {middle - 6}v12M{low:.1f} {middle}H{high:.1f}M{high:.1f} {middle - 6}v12" '
            'stroke="#08306b" stroke-width="1.6" fill="none"/>',
            text(_WIDTH - _RIGHT + 10, middle + 4, f"{result.accuracy:.3f}", "start"),
        ]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _n(results: Results) -> int:
    return results.accuracies["fine-tuned"].n
