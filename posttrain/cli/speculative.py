"""Speculative decoding: train a draft for a model, or plan what drafting would gain.

`posttrain generate --speculative` decodes with drafts.
"""

from __future__ import annotations

import argparse

from posttrain.cli import speculative_plan, speculative_train

HELP = "train drafts for faster decoding, plan what they gain"
EXAMPLES = """\
examples:
  posttrain speculative plan --alpha 0.8 --gamma 7 --c 0.04
  posttrain speculative train-draft --kind medusa --model offline --output offline-medusa --epochs 3
  posttrain generate --model smollm2-135m --speculative ngram --chat "Repeat: to be or not to be."
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in (("plan", speculative_plan), ("train-draft", speculative_train)):
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run_part=module.run, prog=command.prog)


def run(args: argparse.Namespace) -> None:
    args.run_part(args)
