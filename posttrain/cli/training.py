"""Options of the commands that train, and the TrainConfig they make. Light until a function is called."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from posttrain.cli.common import in_options, positive_int

if TYPE_CHECKING:
    from posttrain.trainer import TrainConfig


# What the library's messages call an option, and the option.
LENGTH = {"raise max_length": "raise --max-length"}
TRUNCATION = LENGTH | {"truncation='keep_end'": "--truncation keep_end"}


def add_training_arguments(
    parser: argparse.ArgumentParser, batch: str, batch_size: int, learning_rate: str
) -> argparse._ArgumentGroup:
    """batch: what --batch-size counts. learning_rate: its default, in words."""
    group = parser.add_argument_group("training")
    group.add_argument("--max-steps", type=int, default=0, metavar="N", help="default: what --epochs makes")
    group.add_argument("--epochs", type=float, default=1.0, help="default %(default)s")
    group.add_argument("--batch-size", type=positive_int, default=batch_size, metavar="N", help=f"{batch} (default {batch_size})")
    group.add_argument("--accumulate", type=positive_int, default=1, metavar="N", help="batches a step (default 1)")
    group.add_argument("--learning-rate", type=float, help=f"default: {learning_rate}")
    group.add_argument("--loraplus-lr-ratio", type=float, metavar="X", help="LoRA+: the rate of B over that of A (16, say)")
    group.add_argument("--warmup-ratio", type=float, default=0.03, help="of the steps (default %(default)s)")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="0 does not clip (default %(default)s)")
    group.add_argument("--activation-checkpointing", action="store_true", help="less memory, a third more work")
    group.add_argument("--seed", type=int, default=0, help="default %(default)s")
    group.add_argument("--save-steps", type=int, default=50, metavar="N", help="between checkpoints (default 50)")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")
    return group


def train_config(args: argparse.Namespace, learning_rate: float) -> TrainConfig:
    """learning_rate: where --learning-rate is not given."""
    from posttrain.trainer import TrainConfig

    with in_options({"num_train_epochs": "--epochs"}):
        return TrainConfig(
            output_dir=args.output,
            max_steps=args.max_steps,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=learning_rate if args.learning_rate is None else args.learning_rate,
            loraplus_lr_ratio=args.loraplus_lr_ratio,
            warmup_ratio=args.warmup_ratio,
            max_grad_norm=args.max_grad_norm,
            activation_checkpointing=args.activation_checkpointing,
            seed=args.seed,
            save_steps=args.save_steps,
        )
