"""What each method of `posttrain sft` would train on a model: parameters, their share, and the adapter's size on disk.

Computed from config.json alone: no weight is read. --method shows one; the adapter's options are those of `posttrain sft`.
"""

from __future__ import annotations

import argparse

from posttrain.cli.common import goes_with, resolve_model
from posttrain.cli.sft import ADAPTER_OPTIONS, METHODS, adapter_of, add_adapter_arguments

HELP = "count what each fine-tuning method would train"
EXAMPLES = """\
examples:
  posttrain adapters --model smollm2-135m
  posttrain adapters --model smollm2-135m --method lora --r 64 --target-modules q_proj,v_proj
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="a folder, or smollm2-135m, offline")
    add_adapter_arguments(parser.add_argument_group("adapter"), default=None)


def run(args: argparse.Namespace) -> None:
    from posttrain.adapters.counts import total_parameters, trainable_parameters
    from posttrain.model.checkpoint import read_json
    from posttrain.model.config import ModelConfig

    goes_with(args, args.method is not None, "--method", *ADAPTER_OPTIONS)
    config = ModelConfig.from_hf(read_json(resolve_model(args.model) / "config.json"))
    total = total_parameters(config)
    methods = METHODS if args.method is None else [args.method]
    counts = {method: trainable_parameters(config, adapter_of(method, args if args.method else None)) for method in methods}
    print(f"{total:,} parameters\n{'method':10}{'trained':>14}{'% of all':>10}{'in fp32':>12}")
    for method, count in counts.items():
        print(f"{method:10}{count:14,}{100 * count / total:10.3f}{4 * count / 1e6:9.2f} MB")
