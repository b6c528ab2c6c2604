"""The page says what the run found, and its plots are drawn to scale."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain import report
from posttrain.evaluate import Accuracy
from posttrain.quickstart import REVIEWS, Phase, Results
from posttrain.reviews import Review, Splits
from posttrain.statistics import compare
from posttrain.trainer import TrainResult


@pytest.fixture
def results(tmp_path: Path) -> Results:
    before = Accuracy([0] * 100, [True] * 60 + [False] * 40)
    after = Accuracy([0] * 100, [True] * 90 + [False] * 10)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "loss.svg").write_text("<svg/>")
    metrics = [{"step": i + 1, "loss": 2.0 / (i + 1)} for i in range(20)]
    review = Review("A film.", "positive", 2.0)
    return Results(
        settings=REVIEWS,
        splits=Splits((review,) * 7, (review,) * 3, (review,) * 100),
        model=Path("/models/tiny"),
        model_note="Weights are dequantized Q4_1 values.",
        storage="4.127 bits each",
        phases=[Phase("fetch", 100, 9, 10**8), Phase("QLoRA training", 60, 99, 15 * 10**8), Phase("end", 30, 9, 10**9)],
        accuracies={"zero-shot": before, "fine-tuned": after},
        comparisons=[compare(before.correct, after.correct, "zero-shot", "fine-tuned")],
        training=TrainResult(20, 5000, metrics),
        train_seconds=60.0,
        reload_error=0.0,
        sample={"prompt": "Review: A film.\nSentiment:", "output": " positive", "label": "positive"},
        own_model=False,
        machine={"torch": "2.13.0"},
        output=tmp_path,
        adapter=adapter,
    )


def test_page_says_what_was_found(results) -> None:
    text = report.markdown(results)
    assert "**0.600 → 0.900** test accuracy (McNemar p = 1.9e-09, n = 100) in 90 s after the downloads" in text
    assert "peak memory 1.50 GB" in text
    assert "| zero-shot | 0.600 | 0.502 to 0.691 | 60 of 100 |" in text  # Wilson's interval of 60/100
    assert str(results.comparisons[0]) in text and "is better than" in text
    assert "Weights are dequantized Q4_1 values." in text
    assert "7 train, 3 validation, 100 test" in text
    assert "loss 1.500 over the first 2 steps, 0.103 over the last" in text  # means of 2, 1 and of 2/19, 2/20
    assert "learning rate were chosen on the validation split" in text
    assert "learning rate were given" in report.markdown(replace(results, own_model=True))
    assert "learning rate were given" in report.markdown(replace(results, settings=replace(REVIEWS, steps=7)))
    assert "| QLoRA training | 60.0 | 99.0 | 1.50 |" in text
    assert len(text.splitlines()) < 66 and not re.search(r"\bnan\b|None", text)


def test_page_claims_nothing_that_was_not_shown(results) -> None:
    same = results.accuracies["zero-shot"]
    comparison = compare(same.correct, same.correct, "zero-shot", "fine-tuned")
    accuracies = {"zero-shot": same, "fine-tuned": same}
    text = report.markdown(replace(results, accuracies=accuracies, comparisons=[comparison]))
    assert "no difference can be claimed" in text and "better" not in text


def test_files_are_written_whole(results) -> None:
    path = report.write(results)
    assert path == results.output / "report.md" and path.read_text(encoding="utf-8") == report.markdown(results)
    for name in re.findall(r"!\[\w+\]\((.+)\)", path.read_text(encoding="utf-8")):
        ElementTree.parse(results.output / name)
    assert not list(results.output.glob(".*"))


def test_bars_and_whiskers_are_to_scale(results, tmp_path) -> None:
    report.interval_chart(tmp_path / "chart.svg", results.accuracies, "a < b & c")
    tree = ElementTree.parse(tmp_path / "chart.svg")
    space = "{http://www.w3.org/2000/svg}"
    assert "a < b & c" in [text.text for text in tree.iter(f"{space}text")]
    bars = [float(r.get("width")) for r in tree.iter(f"{space}rect") if r.get("x")]
    zero, *_, one = sorted({float(line.get("x1")) for line in tree.iter(f"{space}line")})
    assert [round(bar / (one - zero), 3) for bar in bars] == [0.6, 0.9]
    for path, accuracy in zip(tree.iter(f"{space}path"), results.accuracies.values(), strict=True):
        ends = re.match(r"M([\d.]+) .*H([\d.]+)M", path.get("d")).groups()
        assert ends == tuple(f"{zero + end * (one - zero):.1f}" for end in accuracy.interval)
