"""Fine-tune a real model in 4 bits, and measure it before and after.

Fetches SmolLM2-135M-Instruct and 10,605 movie-review snippets, holds the model in NF4, measures zero-shot and few-shot
accuracy on test items, trains LoRA adapters (QLoRA), measures again with a paired test, saves the adapter, loads it
into a fresh model and checks that every prediction is the same. report.md in --output has it on one page.

The fetched weights are dequantized Q4_1 values, not the original checkpoint. --offline runs the same steps on a
byte-level model and a task that come with posttrain. Interrupted, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import sys

from posttrain.cli.common import add_device_argument, positive_int

HELP = "fine-tune a real model in 4 bits, measured before and after"
EXAMPLES = """\
examples:
  posttrain quickstart
  posttrain quickstart --offline --output offline-run
  posttrain quickstart --model ~/models/Qwen2.5-0.5B-Instruct --output qwen-run --steps 30
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="PATH", help="a local Hugging Face folder instead of SmolLM2")
    source.add_argument("--offline", action="store_true", help="the model and task that come with posttrain")
    parser.add_argument("--output", default="quickstart-output", metavar="PATH", help="default %(default)s")
    parser.add_argument("--restart", action="store_true", help="drop an earlier run's adapter in --output")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="training steps")
    parser.add_argument("--rows", type=positive_int, metavar="N", help="rows of 256 tokens a step")
    parser.add_argument("--learning-rate", type=float, metavar="X")
    parser.add_argument("--test-items", type=positive_int, metavar="N", help="of the test split (default 1000)")
    add_device_argument(parser)
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")


def run(args: argparse.Namespace) -> None:
    from dataclasses import replace
    from pathlib import Path

    from posttrain.cli.common import resolve_device, resolve_model
    from posttrain.quickstart import OFFLINE, REVIEWS, quickstart

    settings = OFFLINE if args.offline else REVIEWS
    given = {
        "steps": args.steps,
        "rows": args.rows,
        "learning_rate": args.learning_rate,
        "test_items": args.test_items,
    }
    settings = replace(settings, seed=args.seed, **{name: value for name, value in given.items() if value is not None})
    model = None if args.model is None else resolve_model(args.model)
    try:
        quickstart(settings, Path(args.output), model=model, device=resolve_device(args.device), restart=args.restart)
    except KeyboardInterrupt:
        print("\nRun the same command again: training goes on from its last checkpoint.", file=sys.stderr)
        raise
