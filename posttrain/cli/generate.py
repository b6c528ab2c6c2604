"""Continue a prompt, or answer a chat message, writing each token as it comes.

--prompt and --chat take text, or - for standard input. Temperature 0 (the default) is greedy and repeatable.
--speculative drafts tokens and verifies several in one pass of the model: the same text (its distribution, where temperature > 0),
sooner. Only the text goes to standard output; speed and warnings go to standard error.
"""

from __future__ import annotations

import argparse
import sys
import time

from posttrain.cli.common import QUANT_TYPES, add_model_arguments, goes_with, load_model, positive_int, resolve_model
from posttrain.errors import PosttrainError

HELP = "continue a prompt or answer a chat message"
EXAMPLES = """\
examples:
  posttrain generate --model offline --prompt "the film was " --max-new-tokens 40
  posttrain generate --model smollm2-135m --quantize nf4 --chat "Name three rivers."
  echo "Once upon a time" | posttrain generate --model smollm2-135m --prompt - --temperature 0.8 --top-p 0.9 --seed 7
  posttrain generate --model smollm2-135m --speculative ngram --chat "Write this out again: to be or not to be, that is"
"""
DRAFTS = ("draft", "ngram", "medusa", "eagle", "lookahead")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="plain text to continue")
    source.add_argument("--chat", metavar="TEXT", help="a user's message, put through the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before --chat")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    speculative = parser.add_argument_group("speculative decoding")
    speculative.add_argument("--speculative", choices=DRAFTS, help="how tokens are drafted (default: not at all)")
    speculative.add_argument("--draft", metavar="PATH", help="folder of the draft model, the Medusa heads or the EAGLE head")
    speculative.add_argument("--draft-quantize", choices=QUANT_TYPES, help="hold the draft model's linear layers in 4 bits")
    speculative.add_argument("--draft-length", type=positive_int, metavar="N", help="longest draft, or depth of its tree")


def run(args: argparse.Namespace) -> None:
    goes_with(args, args.chat is not None, "--chat, and --prompt has its text", "system")
    text = args.chat if args.prompt is None else args.prompt
    text = sys.stdin.read() if text == "-" else text

    goes_with(args, args.speculative is not None, "--speculative draft, medusa or eagle", "draft")
    goes_with(args, args.speculative is not None, "--speculative, without which nothing is drafted", "draft_length")
    goes_with(args, args.speculative == "draft", "--speculative draft, whose model it quantizes", "draft_quantize")
    from posttrain.model.generate import generate
    from posttrain.model.stop_ids import stop_ids

    model, tokenizer = load_model(args)
    drafter = None if args.speculative is None else _drafter(args, model, tokenizer)
    if args.chat is not None:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        ids = tokenizer.chat([*system, {"role": "user", "content": text}])
    else:
        ids = tokenizer.encode(text, add_special_tokens=True)
    if not ids:
        raise PosttrainError("the prompt is empty: it has no tokens")
    writer = TokenWriter(tokenizer)
    start = time.perf_counter()
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    ends = stop_ids(tokenizer, model.config, resolve_model(args.model))
    report = None
    if drafter is None:
        outputs = generate(model, [ids], args.max_new_tokens, **sampling, stop_ids=ends, on_token=writer)
    else:
        from posttrain.speculative import engine

        outputs, report = engine.generate(
            model,
            [ids],
            args.max_new_tokens,
            drafter,
            **sampling,
            stop_ids=ends,
            on_token=writer,
            draft_length=args.draft_length,
        )
    seconds = time.perf_counter() - start
    writer.finish()
    new = len(outputs[0])
    print(f"{len(ids)} prompt tokens, {new} new in {seconds:.2f} s ({new / seconds:.1f} tokens/s)", file=sys.stderr)
    if report is not None:
        print(f"{args.speculative}: {report}", file=sys.stderr)


def _drafter(args: argparse.Namespace, model, tokenizer):
    from posttrain.speculative.drafters import make_drafter

    path = resolve_model(args.draft) if args.draft and args.speculative == "draft" else args.draft
    return make_drafter(args.speculative, model, tokenizer, path, quantize=args.draft_quantize, any_base=args.any_base)


class TokenWriter:
    """Print text as tokens come. A character whose bytes are still incomplete waits for the token that ends it."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.printed = 0  # ids whose text is out
        self.context = 0  # ids decoded along with the new ones, so that joins (leading spaces, bytes) come out right

    def __call__(self, row: int, token: int) -> None:
        self.ids.append(token)
        self._write(final=False)

    def finish(self) -> None:
        self._write(final=True)
        print(flush=True)

    def _write(self, final: bool) -> None:
        before = self.tokenizer.decode(self.ids[self.context : self.printed])
        text = self.tokenizer.decode(self.ids[self.context :])
        if text == before:  # a token without text: it cannot be what the next ones are joined to
            return
        if final or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(before) :], end="", flush=True)
            self.context, self.printed = self.printed, len(self.ids)
