"""What speculative decoding would gain: tokens a pass, speedup and arithmetic, for acceptance, draft length and cost.

--alpha  the probability that a drafted token is accepted (what `posttrain generate --speculative` reports as alpha)
--gamma  tokens drafted a step; left out, the best is taken
--c      time to draft a token over that of a pass of the target

Each takes several values: every combination is a row. The pass over gamma + 1 tokens is taken to cost one over one, unless
--pass-costs gives v(1), v(2), .. as measured (benchmarks/bench_speculative.py prints them). Leviathan et al., arXiv:2211.17192.
"""

from __future__ import annotations

import argparse
from itertools import product

from posttrain.errors import PosttrainError

HELP = "the speedup that acceptance, draft length and cost let expect"
EXAMPLES = """\
examples:
  posttrain speculative plan --alpha 0.75 --gamma 7 --c 0.02
  posttrain speculative plan --alpha 0.5 0.6 0.7 0.8 0.9 --c 0.05 0.2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--alpha", type=float, nargs="+", required=True, help="from 0 to 1")
    parser.add_argument("--gamma", type=int, nargs="+", help="0 or more (default: the best)")
    parser.add_argument("--c", type=float, nargs="+", required=True, help="0 or more")
    parser.add_argument(
        "--pass-costs", type=float, nargs="+", default=[1.0], metavar="V", help="v(1) v(2) ..; the last for all longer"
    )


def run(args: argparse.Namespace) -> None:
    from posttrain.speculative.planner import plan

    if not all(0 < cost < float("inf") for cost in args.pass_costs):
        raise PosttrainError(f"--pass-costs are {args.pass_costs}; expected positive numbers, v(1) being 1")

    def v(n: int) -> float:
        return args.pass_costs[min(n, len(args.pass_costs)) - 1]

    print(" alpha      c  gamma  tokens/pass  speedup  arithmetic  best gamma  its speedup")
    for alpha, c, gamma in product(args.alpha, args.c, args.gamma or [None]):
        row = plan(alpha, gamma, c, v)
        print(
            f"{alpha:6.2f} {c:6.2f} {row.gamma:6d} {row.tokens:12.2f} {row.speedup:8.2f} {row.operations:11.2f} "
            f"{row.best_gamma:11d} {row.best_speedup:12.2f}"
        )
