"""Train a reward model: a score for a prompt's completion, from pairs of which one was preferred (Bradley-Terry).

Each line of --data holds TRL's columns: {"prompt", "chosen", "rejected"}, as text or as chat messages, and may have "margin",
by how much the chosen one is better. The names positive:train and reviews:train (or :validation, :test) stand for pairs derived
from the scores of the fetched movie reviews, which nobody compared: the positive review is always the chosen one, or the one of
the sentiment that the prompt asks for.

LoRA on the frozen base and a score head are written into --output in PEFT's format for sequence classification, with
metrics.jsonl and loss.svg; `posttrain ppo --reward-model` learns from it. --eval-data tells how often the chosen completion
gets the higher score, and whether chance could do it. Interrupted, the same command with --resume goes on, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from posttrain.cli.common import add_model_arguments, check_data, in_options, load_model, positive_int, progress_bar
from posttrain.cli.training import TRUNCATION, add_training_arguments, train_config

if TYPE_CHECKING:
    from posttrain.model.tokenizer import Tokenizer
    from posttrain.preference.data import Pair

LEARNING_RATE = 1e-3
HELP = "train a reward model on pairs of completions"
EXAMPLES = """\
examples:
  echo '{"prompt": "The sea is", "chosen": " wide.", "rejected": " a sea."}' > pairs.jsonl
  posttrain reward --model offline --data pairs.jsonl --output my-reward --max-steps 10
  posttrain reward --model smollm2-135m --data positive:train --eval-data positive:test --output my-reward --max-steps 60
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter=False)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines to learn from, or positive:train")
    parser.add_argument("--eval-data", metavar="FILE", help="held-out pairs to measure on at the end")
    parser.add_argument("--eval-limit", type=positive_int, metavar="N", help="only the first N of these")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder for the adapter and its checkpoints")
    group = parser.add_argument_group("reward model")
    group.add_argument("--r", type=positive_int, default=8, help="rank of LoRA (default %(default)s)")
    group.add_argument("--lora-alpha", type=float, default=16.0, help="scaling = alpha / r (default %(default)s)")
    group.add_argument("--no-margins", action="store_true", help='pass over the column "margin"')
    group.add_argument("--center-rewards-coefficient", type=float, metavar="X", help="pulls scores towards 0 (0.01, say)")
    training = add_training_arguments(parser, "pairs at once", 8, f"{LEARNING_RATE:g}")
    training.add_argument("--max-length", type=positive_int, metavar="N", help="tokens of prompt and completion")
    training.add_argument(
        "--truncation", choices=("error", "keep_end", "keep_start"), default="error",
        help="of longer ones: keep_end cuts prompts, keep_start the ends of completions, never a whole one (default: refuse)",
    )  # fmt: skip


def _read(name: str, tokenizer: Tokenizer, args: argparse.Namespace) -> list[Pair]:
    """Pairs of a file, or derived from the reviews."""
    from posttrain.cli.dpo import read
    from posttrain.cli.practice import split_of
    from posttrain.preference.data import encode_pair, fit_pair
    from posttrain.review_pairs import NOTE
    from posttrain.review_prompts import positive

    if not name.startswith("positive:"):
        return read(name, tokenizer, args)
    reviews, _ = split_of(name)
    print(f"{name}: {NOTE}", file=sys.stderr)
    return [fit_pair(encode_pair(row, tokenizer), args.max_length, args.truncation, tokenizer.bos_id) for row in positive(reviews)]


def run(args: argparse.Namespace) -> None:
    from posttrain.adapters import LoraConfig
    from posttrain.reward import score_accuracy, train_reward_model

    config = train_config(args, LEARNING_RATE)
    check_data(args, ("reviews:", "positive:"))
    model, tokenizer = load_model(args)
    with in_options(TRUNCATION):
        pairs = _read(args.data, tokenizer, args)
        held_out = _read(args.eval_data, tokenizer, args)[: args.eval_limit] if args.eval_data else []
    print(f"{len(pairs)} pairs to learn from, {len(held_out)} held out", file=sys.stderr)
    try:
        train_reward_model(
            model,
            pairs,
            config,
            LoraConfig(r=args.r, lora_alpha=args.lora_alpha),
            center_rewards_coefficient=args.center_rewards_coefficient,
            use_margins=not args.no_margins,
            pad_id=0 if tokenizer.pad_id is None else tokenizer.pad_id,
            resume=args.resume,
        )
    except KeyboardInterrupt:
        print("\nRun the same command with --resume: it goes on from the last checkpoint.", file=sys.stderr)
        raise
    if held_out:
        with progress_bar("held-out pairs") as progress:
            print(f"the chosen completion scores higher: {score_accuracy(model, held_out, progress=progress)}")
    print(args.output)
