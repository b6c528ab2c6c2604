"""Learn from rewards by GRPO or RLOO: several completions of each prompt, each judged against the others; no value function.

Each line of --data holds {"prompt"}, text or chat messages, and what the reward reads, such as "answer". sentiment:train and
openings:train (or :validation, :test) stand for prompts made of the fetched movie reviews: a review to be classified, with its
answer, and a review's first words to be continued as a positive one.

--loss-type and the other settings have TRL's names. --advantages rloo --loss-type rloo is leave-one-out REINFORCE. The
reference is the base, the adapter off; --beta weighs the divergence from it, which is always shown. To go on from a fine-tuned
adapter, merge it into the base first (posttrain merge-adapter). Interrupted, the same command with --resume goes on, bit for bit.
"""

from __future__ import annotations

import argparse

from posttrain.cli.common import positive_int
from posttrain.cli.practice import add_practice_arguments, practise, sampling_of

HELP = "learn from rewards by GRPO or RLOO: groups of completions"
EXAMPLES = """\
examples:
  echo '{"prompt": "Review: dull\\nSentiment:", "answer": "negative"}' > prompts.jsonl
  posttrain grpo --model offline --data prompts.jsonl --output my-grpo --max-steps 4 --max-completion-length 4
  posttrain grpo --model smollm2-135m --data sentiment:train --eval-data sentiment:test --output my-grpo --max-steps 30
  posttrain grpo --advantages rloo --loss-type rloo --model smollm2-135m --data sentiment:train --output my-rloo --max-steps 30
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("algorithm")
    group.add_argument("--advantages", choices=("group", "rloo"), default="group", help="default group (GRPO)")
    group.add_argument("--loss-type", choices=("grpo", "bnpo", "dr_grpo", "dapo", "rloo"), default="dapo", help="default dapo")
    group.add_argument("--scale-rewards", choices=("group", "batch", "none"), default="group", help="deviation they are divided by")
    group.add_argument("--beta", type=float, default=0.0, help="weight of the divergence (default %(default)s)")
    group.add_argument("--epsilon", type=float, default=0.2, help="clipping of the ratio (default %(default)s)")
    group.add_argument("--epsilon-high", type=float, help="clipping from above, as in DAPO (default: epsilon)")
    group.add_argument("--num-iterations", type=positive_int, default=1, help="updates from the same completions (default 1)")
    add_practice_arguments(parser, num_generations=8)


def run(args: argparse.Namespace) -> None:
    from posttrain.rl.train import GRPOConfig, grpo

    names = ("advantages", "loss_type", "scale_rewards", "beta", "epsilon", "epsilon_high", "num_iterations")
    practise(args, grpo(GRPOConfig(**{name: getattr(args, name) for name in names}), sampling_of(args)))
