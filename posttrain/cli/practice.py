"""What `posttrain ppo` and `grpo` share: prompts, rewards, how completions are drawn. Light until a function is called."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from posttrain.cli.common import add_model_arguments, check_data, load_model, positive_int, progress_bar
from posttrain.cli.training import add_training_arguments, train_config
from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from posttrain.model.tokenizer import Tokenizer
    from posttrain.reviews import Review
    from posttrain.rl.loop import Method, Sampling
    from posttrain.rl.prompts import Prompt
    from posttrain.rl.rewards import Reward

LEARNING_RATE = 3e-4
TASKS = ("sentiment", "openings")  # posttrain/review_prompts.py


def add_practice_arguments(parser: argparse.ArgumentParser, num_generations: int) -> None:
    """All but what the algorithm itself is set by."""
    add_model_arguments(parser, adapter=False)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines with prompts, or sentiment:train, openings:train")
    parser.add_argument("--eval-data", metavar="FILE", help="held-out prompts: rewards of base and policy, compared at the end")
    parser.add_argument("--eval-limit", type=positive_int, metavar="N", help="only the first N of these")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder for the adapter and its checkpoints")
    reward = parser.add_mutually_exclusive_group()
    reward.add_argument("--reward", choices=("exact",), default="exact", help='1 where the completion is "answer" (default)')
    reward.add_argument(
        "--reward-regex", metavar="REGEX", help='1 where it is found, and its first group, if it has one, is "answer"'
    )
    reward.add_argument("--reward-model", metavar="PATH", help="the score of what posttrain reward trained on this base")
    drawing = parser.add_argument_group("completions")
    drawing.add_argument(
        "--num-generations", type=positive_int, default=num_generations, help="of each prompt (default %(default)s)"
    )
    drawing.add_argument("--max-completion-length", type=positive_int, metavar="N", help="tokens (default 64; of sentiment: 3)")
    drawing.add_argument("--temperature", type=float, default=1.0, help="default %(default)s")
    drawing.add_argument("--stop", metavar="TEXT", help="one token that ends a completion (default: the end-of-sequence token)")
    group = parser.add_argument_group("adapter")
    group.add_argument("--r", type=positive_int, default=8, help="rank of LoRA (default %(default)s)")
    group.add_argument("--lora-alpha", type=float, default=16.0, help="scaling = alpha / r (default %(default)s)")
    training = add_training_arguments(parser, "prompts at once", 8, f"{LEARNING_RATE:g}")
    training.add_argument("--max-length", type=positive_int, metavar="N", help="refuse prompts of more tokens")


def read_prompts(name: str, tokenizer: Tokenizer, max_length: int | None = None) -> list[Prompt]:
    """The prompts of a file, or made of the reviews."""
    from posttrain.rl.prompts import encode_prompt, load_prompts

    task = name.partition(":")[0]
    if task not in TASKS:
        return load_prompts(name, tokenizer, max_length)
    from posttrain.review_prompts import openings, sentiment

    reviews, train = split_of(name)
    rows = sentiment(reviews, train) if task == "sentiment" else openings(reviews)
    return [encode_prompt(row, tokenizer) for row in rows]


def split_of(name: str) -> tuple[tuple[Review, ...], tuple[Review, ...]]:
    """The reviews of the split that a name such as sentiment:test ends in, and those of the training split."""
    from posttrain.fetch import fetch
    from posttrain.reviews import Splits, load_reviews

    task, _, split = name.partition(":")
    if split not in Splits._fields:
        raise PosttrainError(f"{name}: expected {', '.join(f'{task}:{field}' for field in Splits._fields)}")
    splits = load_reviews(fetch("reviews"))
    return getattr(splits, split), splits.train


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How completions are drawn, as the options say; the sentiment task's answers are one word and a new line."""
    from posttrain.review_prompts import STOP
    from posttrain.rl.loop import Sampling

    short = args.data.startswith("sentiment:")
    length = args.max_completion_length or (3 if short else 64)
    stop = (STOP if short else None) if args.stop is None else args.stop
    return Sampling(args.num_generations, length, args.temperature, stop)


def practise(args: argparse.Namespace, method: Method) -> None:
    """Train and measure as the options say."""
    from posttrain.adapters import LoraConfig
    from posttrain.rl.held_out import held_out
    from posttrain.rl.loop import optimize
    from posttrain.trained_model import attach_for_training

    config = train_config(args, LEARNING_RATE)
    check_data(args, tuple(f"{task}:" for task in TASKS))
    model, tokenizer = load_model(args)
    prompts = read_prompts(args.data, tokenizer, args.max_length)
    unseen = read_prompts(args.eval_data, tokenizer, args.max_length)[: args.eval_limit] if args.eval_data else []
    print(f"{len(prompts)} prompts to practise on, {len(unseen)} held out", file=sys.stderr)
    lora = LoraConfig(r=args.r, lora_alpha=args.lora_alpha)
    attach_for_training(model, lora, config.seed)
    reward, identity = _reward(args, model)
    try:
        optimize(model, tokenizer, prompts, reward, config, method, identity=identity, resume=args.resume)
    except KeyboardInterrupt:
        print("\nRun the same command with --resume: it goes on from the last checkpoint.", file=sys.stderr)
        raise
    if unseen:
        with progress_bar("held-out prompts") as progress:
            print(held_out(model, tokenizer, unseen, reward, method.sampling, progress=progress))
    print(args.output)


def _reward(args: argparse.Namespace, model: Any) -> tuple[Reward, dict[str, Any]]:
    """The reward, and what a resumed run must share of it."""
    from posttrain.rl import rewards

    if args.reward_model is not None:
        return rewards.reward_model(model, args.reward_model), {"reward": ["model", args.reward_model]}
    if args.reward_regex is not None:
        return rewards.regex_match(args.reward_regex), {"reward": ["regex", args.reward_regex]}
    return rewards.exact_match, {"reward": ["exact"]}
