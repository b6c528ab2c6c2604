"""Speculative decoding at batch 1 on prompts of four kinds: each engine, plain decoding and transformers, in turn.

First what decides: v(n), a target's pass over n tokens over one over one. Then every prompt is continued greedily by each contender
in turn, in one process. Agreement is checked first: ours must be plain decoding's tokens. Where bf16 lets two tokens tie, what
follows differs; a first difference must be such a tie, the two logits no farther apart than passes of different widths put them.

    python benchmarks/bench_speculative.py [--quantize nf4] [--draft PATH] [--medusa PATH] [--eagle PATH] [--tokens 64] [--rounds 1]
        [--cpu-time] [--threads 2] [--json FILE]

Drafts that are not named are those that `make drafts` trained for SmolLM2-135M, if it did.

tokens/pass: tokens a pass of the target yields. alpha: accepted of examined drafts. Speedups: seconds of plain decoding, ours and
transformers', over the contender's in the same round, summed over a kind's prompts; the median of the rounds, and their range.
--cpu-time takes processor time of one thread: fairer on a machine that other processes share.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from posttrain.model import CausalLM, KVCache, generate, load
from posttrain.model.fused import fused_projections
from posttrain.model.tokenizer import Tokenizer
from posttrain.speculative import engine, pace
from posttrain.speculative.drafters import make_drafter
from posttrain.speculative.report import Report

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from speculative_prompts import PROMPTS

DRAFTS = {"draft": "draft/model", "medusa": "medusa/heads", "eagle": "eagle/heads"}  # where `make drafts` leaves them
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17)
clock = time.perf_counter


@torch.inference_mode()
def pass_costs(model: CausalLM, rounds: int = 9) -> dict[int, float]:
    """Seconds of a pass over each of WIDTHS tokens, head included, behind 256 cached ones: medians, in turn."""
    weight = model.model.embed_tokens.weight
    cache = KVCache(model.config, 1, 300, weight.dtype, weight.device)
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    with fused_projections(model):
        model.hidden(torch.randint(5, 1000, (1, 256)), cache=cache)
        for _ in range(rounds + 1):
            for width in WIDTHS:
                cache.length = 256
                input_ids = torch.randint(5, 1000, (1, width))
                start = clock()
                model.head(model.hidden(input_ids, cache=cache))
                times[width].append(clock() - start)
    return {width: statistics.median(seconds[1:]) for width, seconds in times.items()}


def contenders(model: CausalLM, tokenizer: Tokenizer, path: Path, options: argparse.Namespace) -> dict[str, Callable]:
    """name -> (prompt, count) -> (tokens, Report or None)."""

    def ours(drafter) -> Callable:
        def run(prompt: list[int], count: int) -> tuple[list[int], Report]:
            outputs, report = engine.generate(model, [prompt], count, drafter)
            return outputs[0], report

        return run

    found: dict[str, Callable] = {"ours plain": lambda prompt, count: (generate(model, [prompt], count)[0], None)}
    found["ours ngram"] = ours(make_drafter("ngram", model, tokenizer))
    found["ours lookahead"] = ours(make_drafter("lookahead", model, tokenizer))
    for kind in DRAFTS:
        if folder := getattr(options, kind):
            found[f"ours {kind}"] = ours(make_drafter(kind, model, tokenizer, folder, any_base=True))
    if importlib.util.find_spec("transformers") and not options.quantize:
        found |= transformers_contenders(path, options)
    return found


def transformers_contenders(path: Path, options: argparse.Namespace) -> dict[str, Callable]:
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def theirs(**arguments) -> Callable:
        def run(prompt: list[int], count: int) -> tuple[list[int], None]:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = peer.generate(
                ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **arguments
            )
            return out[0, len(prompt) :].tolist(), None

        return run

    found = {"transformers plain": theirs(), "transformers prompt lookup": theirs(prompt_lookup_num_tokens=10)}
    if options.draft:
        assistant = AutoModelForCausalLM.from_pretrained(options.draft, dtype=torch.bfloat16).eval()
        found["transformers assisted"] = theirs(assistant_model=assistant)
    return found


@torch.inference_mode()
def first_difference(model: CausalLM, prompt: list[int], plain: list[int], other: list[int]) -> str | None:
    """None where the tokens are the same; else that they part at a tie. AssertionError where it is none."""
    at = next((i for i, pair in enumerate(zip(plain, other, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return None
    text = torch.tensor([prompt + plain[:at]])
    cache = KVCache(model.config, 1, text.shape[1], model.model.norm.weight.dtype)
    model.hidden(text[:, :-1], cache=cache)
    one = model(text[:, -1:], cache=cache)[0, -1].float()  # the same position by a pass over one token and by one over all
    whole = model(text)[0, -1].float()
    gap = (one[plain[at]] - one[other[at]]).abs().item()
    noise = 2 * (one - whole).abs().max().item()
    assert gap <= noise, f"token {at}: logits differ by {gap}, passes of different widths by {noise / 2}"
    return f"tie at token {at}"


def encode(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    return tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text, add_special_tokens=True)


def merged(reports: list[Report]) -> Report:
    """The counts of several runs as of one."""
    whole = Report()
    for report in reports:
        for name in ("rows", "passes", "tokens", "drafts", "drafted", "accepted", "examined", "seconds", "draft_seconds", "rested"):
            setattr(whole, name, getattr(whole, name) + getattr(report, name))
        for name in ("offered", "accepted_at", "lengths"):
            getattr(whole, name).update(getattr(report, name))
    return whole


def measure(kind: str, prompts: list[list[int]], runs: dict[str, Callable], model: CausalLM, options) -> dict[str, dict]:
    """Every contender's row for one kind of prompt."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in runs}  # by prompt, by round
    reports: dict[str, list[Report]] = {name: [] for name in runs}
    ties = dict.fromkeys(runs, 0)
    for prompt in prompts:
        times: dict[str, list[float]] = {name: [] for name in runs}
        plain: list[int] = []
        for _ in range(options.rounds):
            for name, run in runs.items():
                start = clock()
                tokens, report = run(prompt, options.tokens)
                times[name].append(clock() - start)
                if name == "ours plain":
                    plain = tokens
                elif name.startswith("ours"):
                    ties[name] += first_difference(model, prompt, plain, tokens) is not None
                    reports[name].append(report)
        for name in runs:
            seconds[name].append(times[name])
    rounds = {name: [sum(each) for each in zip(*by_prompt, strict=True)] for name, by_prompt in seconds.items()}

    def speedups(base: str, name: str) -> list[float] | None:
        """In rising order, a round each."""
        return sorted(a / b for a, b in zip(rounds[base], rounds[name], strict=True)) if base in rounds else None

    rows = {}
    for name in runs:
        report = merged(reports[name])
        rows[name] = {
            "seconds": seconds[name],
            "speedups": speedups("ours plain", name),
            "speedups_over_transformers": speedups("transformers plain", name),
            "tokens_per_pass": report.tokens_per_pass,
            "alpha": report.alpha,
            "acceptance_rate": report.acceptance_rate,
            "mean_accepted_length": report.mean_accepted_length,
            "switched_off": report.rested / report.passes if report.passes else None,
            "ties": ties[name],
        }
        print(f"{kind:10} {name:27} {describe(rows[name])}", flush=True)
    return rows


def describe(row: dict) -> str:
    def cell(value: float | None, form: str = ".2f") -> str:
        return "n/a" if value is None else format(value, form)

    def spread(speedups: list[float] | None) -> str:
        return "n/a" if speedups is None else f"{statistics.median(speedups):.2f} ({speedups[0]:.2f}-{speedups[-1]:.2f})"

    text = f"times ours plain {spread(row['speedups'])}, times transformers plain {spread(row['speedups_over_transformers'])}"
    if row["tokens_per_pass"] is not None:
        text += f"; {cell(row['tokens_per_pass'])} tokens/pass, alpha {cell(row['alpha'])}, "
        text += f"accepted of drafted {cell(row['acceptance_rate'])}, off {cell(row['switched_off'], '.0%')} of passes"
        text += f", {row['ties']} ties" if row["ties"] else ""
    return text


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--quantize", choices=("nf4", "fp4"))
    for kind in DRAFTS:
        parser.add_argument(f"--{kind}", type=Path, metavar="FOLDER", help="what `posttrain speculative train-draft` made")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--prompts", type=int, default=3, help="of each kind (default %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        options.threads, clock = 1, time.thread_time
        pace.clock = clock
    torch.set_num_threads(options.threads)
    path = options.model
    if path is None:
        from posttrain.fetch import fetch

        path = fetch("smollm2-135m")
        for kind, place in DRAFTS.items():
            folder = Path(__file__).parent / "results" / "drafts" / place
            if getattr(options, kind) is None and folder.is_dir():
                setattr(options, kind, folder)
    model, tokenizer = load(path, quantize=options.quantize), Tokenizer.load(path)
    costs = pass_costs(model)
    print(f"{path.name}, {options.quantize or 'bf16'}, {options.threads} threads, {options.tokens} tokens a prompt")
    print("v(n):", "  ".join(f"{width}: {seconds / costs[1]:.2f}" for width, seconds in costs.items()))
    runs = contenders(model, tokenizer, path, options)
    for run in runs.values():
        run(encode(tokenizer, "Warm up.", False), 4)
    rows = {}
    for kind in options.kinds:
        chat, texts = PROMPTS[kind]
        rows[kind] = measure(kind, [encode(tokenizer, text, chat) for text in texts[: options.prompts]], runs, model, options)
    if options.json:
        facts = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"facts": facts, "pass_seconds": costs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
