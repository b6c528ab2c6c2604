"""Verification of four drafted tokens on this CPU, V = 49,152 in bfloat16: ours from logits, in C and in PyTorch, beside the plain
expression (softmax of all rows, masked copies for top-k and top-p, ratio, remainder, multinomial) and, at batch 1, what
transformers runs in assisted generation: its logits processors and its function.

All draw their own noise. First the agreement: with the same u and Gumbel noise, ours and the plain expression emit the same.
The limit is the bytes of the rows that are reached, at the bandwidth that a sum of 256 MiB has.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from posttrain.kernels import cpu, verify_draft_tokens
from posttrain.kernels.cpu import pytorch_spec_verify
from posttrain.model.sampling import filter_logits

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

V, K = 49_152, 4
SETTINGS = {
    "greedy": (0.0, 0, 1.0),
    "T=1": (1.0, 0, 1.0),
    "T=1, top-k 50, top-p 0.9": (1.0, 50, 0.9),
    "T=0.8, top-p 0.95": (0.8, 0, 0.95),
}


def plain(drafted, draft, target, temperature, top_k, top_p, u=None, gumbel=None):
    """Whole probabilities of every row, in float32; at temperature 0 argmaxes."""
    rows, best = torch.arange(len(drafted)), None
    if temperature == 0:
        best = target.argmax(2)
        accepted = drafted == best[:, :K]
    else:
        p, q = (_masked(logits, temperature, top_k, top_p).softmax(-1) for logits in (target, draft))
        px, qx = p[:, :K].gather(2, drafted[..., None])[..., 0], q.gather(2, drafted[..., None])[..., 0]
        accepted = (torch.rand_like(px) if u is None else u) < px / qx
    n = accepted.long().cumprod(1).sum(1)
    if best is not None:
        token = best[rows, n]
    else:
        weights = torch.cat([(p[:, :K] - q).clamp(min=0), p[:, K:]], 1)[rows, n]
        token = torch.multinomial(weights, 1)[:, 0] if gumbel is None else (weights.log() + gumbel).argmax(1)
    tokens = torch.cat([drafted, token[:, None]], 1).where(torch.arange(K + 1) < n[:, None], -1)
    return tokens.scatter(1, n[:, None], token[:, None]), n


def _masked(logits, temperature, top_k, top_p):
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        largest, _ = logits.sort(descending=True)
        probabilities = largest.softmax(-1)
        kept = probabilities.cumsum(-1) - probabilities < top_p
        logits = logits.masked_fill(logits < largest.masked_fill(~kept, torch.inf).amin(-1, keepdim=True), -torch.inf)
    return logits


def transformers_sampling(drafted, draft, target, temperature, top_k, top_p):
    """As `GenerationMixin._assisted_decoding`: processors on each position, then the function."""
    from transformers.generation import logits_process
    from transformers.generation.utils import _speculative_sampling

    steps = [logits_process.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    steps += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    steps += [logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []

    def processed(logits):
        rows = logits[0].float()
        for step in steps:
            rows = step(drafted, rows)
        return rows[None]

    return _speculative_sampling(drafted, processed(draft), K, processed(target), False)


def case(B: int, setting):
    torch.manual_seed(0)
    target = (4 * torch.randn(B, K + 1, V)).bfloat16()
    draft = (target[:, :K].float() + 0.5 * torch.randn(B, K, V)).bfloat16()
    if setting[0] == 0:
        return target[:, :K].argmax(2), draft, target
    noise = -torch.empty(B, K, V).exponential_().log()
    return (filter_logits(draft, *setting) + noise).argmax(2), draft, target


def compare(B: int, name: str, options, bytes_per_second: float) -> dict:
    setting = SETTINGS[name]
    drafted, draft, target = case(B, setting)
    num = torch.full((B,), K)
    u, gumbel = torch.rand(B, K), -torch.empty(B, V).exponential_().log()
    ours = verify_draft_tokens(drafted, draft, target, num, *setting, uniforms=u, gumbel=gumbel)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain(drafted, draft, target, *setting, u, gumbel), strict=True))
    peer = importlib.util.find_spec("transformers") and B == 1 and setting[0] > 0
    made = (*setting, None, None, None, 1, None, None)
    candidates = {
        "posttrain": lambda: verify_draft_tokens(drafted, draft, target, num, *setting, seed=1),
        "posttrain, PyTorch": lambda: pytorch_spec_verify.verify_draft_tokens(drafted, draft, target, num, *made),
        "plain": lambda: plain(drafted, draft, target, *setting),
        "transformers": (lambda: transformers_sampling(drafted, draft, target, *setting)) if peer else None,
    }
    times = _bench.in_turn(candidates, options)
    accepted = verify_draft_tokens(drafted, draft, target, num, *setting, seed=1)[1]
    rows = int((accepted + 1).sum()) + (int((accepted + (accepted < K)).sum()) if setting[0] else 0)
    medians = {candidate: statistics.median(t) if t else None for candidate, t in times.items()}
    limit = 2 * V * rows / bytes_per_second * 1e3
    return {"title": f"batch {B}, {name}", "milliseconds": times, "medians": medians, "limit_milliseconds": limit}


def table(rows: list[dict]) -> Table:
    shown = Table(title=f"milliseconds to verify {K} drafts, V = {V:,}: median (quartiles), over ours", title_justify="left")
    for i, column in enumerate(("", *rows[0]["medians"], "limit")):
        shown.add_column(column, justify="right" if i else "left")
    for r in rows:
        ours, cells = r["medians"]["posttrain"], []
        for candidate, t in r["milliseconds"].items():
            if t is None:
                cells.append("n/a")
                continue
            low, _, high = statistics.quantiles(t, n=4)
            ratio = "" if candidate == "posttrain" else f" {r['medians'][candidate] / ours:.0f}x"
            cells.append(f"{r['medians'][candidate]:.2f} ({low:.2f}-{high:.2f}){ratio}")
        shown.add_row(r["title"], *cells, f"{r['limit_milliseconds']:.3f}")
    return shown


def main() -> None:
    options = _bench.arguments(__doc__)
    bytes_per_second = _bench.bandwidth(options)
    rows = [compare(B, name, options, bytes_per_second) for B in (1, 4) for name in SETTINGS]
    Console(width=150 if not sys.stdout.isatty() else None).print(table(rows))
    facts = cpu.describe()
    print(f"{facts['engine']} engine, {facts['isa']}, {options.threads} threads; {bytes_per_second / 1e9:.1f} GB/s")
    _bench.save("spec_verify", rows, options, {"V": V, "K": K, **facts})


if __name__ == "__main__":
    main()
