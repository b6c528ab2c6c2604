"""Learn from rewards by PPO: a value head says what each token was worth, and the policy is kept close to the reference.

Each line of --data holds {"prompt"}, text or chat messages, and what the reward reads, such as "answer". sentiment:train and
openings:train (or :validation, :test) stand for prompts made of the fetched movie reviews: a review to be classified, with its
answer, and a review's first words to be continued as a positive one.

--reward-model takes what `posttrain reward` trained: it, the policy, the value head and the reference (the base, the adapter
off) share one copy of the base. Settings have TRL's names. To go on from a fine-tuned adapter, merge it into the base first
(posttrain merge-adapter). Interrupted, the same command with --resume goes on, bit for bit.
"""

from __future__ import annotations

import argparse

from posttrain.cli.common import positive_int
from posttrain.cli.practice import add_practice_arguments, practise, sampling_of

HELP = "learn from rewards by PPO, a reward model's or verifiable ones"
EXAMPLES = """\
examples:
  echo '{"prompt": "Review: dull\\nSentiment:", "answer": "negative"}' > prompts.jsonl
  posttrain ppo --model offline --data prompts.jsonl --output my-ppo --max-steps 4 --max-completion-length 4
  posttrain ppo --model smollm2-135m --reward-model my-reward --data openings:train --output my-ppo --max-completion-length 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("algorithm")
    group.add_argument("--num-ppo-epochs", type=positive_int, default=4, help="over the same completions (default 4)")
    group.add_argument("--num-mini-batches", type=positive_int, default=1, help="updates an epoch (default 1)")
    group.add_argument("--kl-coef", type=float, default=0.05, help="what a nat of divergence costs (default %(default)s)")
    group.add_argument("--kl-target", type=float, metavar="NATS", help="adapt --kl-coef to this divergence of a completion")
    group.add_argument("--kl-estimator", choices=("k1", "k2", "k3"), default="k1", help="default k1")
    group.add_argument("--cliprange", type=float, default=0.2, help="of the ratio (default %(default)s)")
    group.add_argument("--vf-coef", type=float, default=0.1, help="weight of the value loss (default %(default)s)")
    group.add_argument("--cliprange-value", type=float, default=0.2, help="of the value (default %(default)s)")
    group.add_argument("--gamma", type=float, default=1.0, help="discount (default %(default)s)")
    group.add_argument("--lam", type=float, default=0.95, help="of advantage estimation (default %(default)s)")
    group.add_argument("--whiten-rewards", action="store_true", help="deviation 1 before advantages are made")
    group.add_argument("--missing-eos-penalty", type=float, metavar="X", help="off the score of a completion that was cut")
    add_practice_arguments(parser, num_generations=1)


def run(args: argparse.Namespace) -> None:
    from posttrain.rl.train import PPOConfig, ppo

    names = (
        "num_ppo_epochs", "num_mini_batches", "kl_coef", "kl_target", "kl_estimator", "cliprange", "vf_coef", "cliprange_value",
        "gamma", "lam", "whiten_rewards", "missing_eos_penalty",
    )  # fmt: skip
    practise(args, ppo(PPOConfig(**{name: getattr(args, name) for name in names}), sampling_of(args)))
