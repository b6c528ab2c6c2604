"""Verification as a textbook has it, on whole batches of probabilities in PyTorch, and with one known mistake put in: what the
tests of spec_verify must tell apart. Each mistake was seen in a published implementation.
"""

from __future__ import annotations

import torch
from spec_cases import chi_square, noise
from torch import Tensor

from posttrain.kernels import logit_filter

MISTAKES = (  # wrong as a distribution
    "the draw is from p", "the draw is from |p - q|", "one u for all positions", "u again for the draw", "q without the filters",
    "p unfiltered in the draw", "words behind the draft's vocabulary cut off", "chosen drafts as if drawn",
)  # fmt: skip


def verifier(mistake: str | None = None):
    def verify(drafted, draft, target, num, temperature=1.0, top_k=0, top_p=1.0, *, uniforms, gumbel) -> tuple[Tensor, Tensor]:
        (B, K), V = drafted.shape, target.shape[2]
        setting = (temperature, top_k, top_p)
        p, u = _probabilities(target, *setting), uniforms
        if draft is None:
            q = torch.nn.functional.one_hot(drafted.clamp(0, V - 1), V).to(p.dtype)
            if mistake == "chosen drafts as if drawn":
                q = p[:, :K]
        else:
            q = _probabilities(draft, *((1.0, 0, 1.0) if mistake == "q without the filters" else setting))
            q = torch.cat([q, q.new_zeros(B, K, V - q.shape[2])], 2)
        if mistake == "words behind the draft's vocabulary cut off":
            p = torch.cat([p[..., : draft.shape[2]], torch.zeros_like(p[..., draft.shape[2] :])], 2)
        if mistake == "probabilities in float16":
            p, q = p.half().to(p.dtype), q.half().to(q.dtype)
        if mistake == "one u for all positions":
            u = u[:, :1].expand(B, K)
        x = drafted.clamp(0, V - 1)[..., None]
        px, qx = p[:, :K].gather(2, x)[..., 0], q.gather(2, x)[..., 0]
        inside = (drafted >= 0) & (drafted < V) | (mistake == "placeholders are words")
        drawable = inside & (qx > 0)
        accepted = drawable & (u < px / qx)
        if mistake == "u q <= p":
            accepted = drawable & (u * qx <= px)
        if mistake == "q = 0 accepted":
            accepted = inside & (u * qx < px)
        if mistake != "padding is a draft":
            accepted &= torch.arange(K) < num[:, None]
        n = accepted.long().cumprod(1).sum(1)
        refused = n < (num if mistake != "padding is a draft" else K)
        rows = torch.arange(B)
        p_row = p[rows, n]
        weights = p_row
        if K:
            at = n.clamp(max=K - 1)
            q_row = q[rows, at].where((refused & drawable[rows, at])[:, None], 0)
            source = _probabilities(target, temperature, 0, 1.0)[rows, n] if mistake == "p unfiltered in the draw" else p_row
            weights = (source - q_row).clamp(min=0)
            if mistake == "the draw is from p":
                weights = p_row
            if mistake == "the draw is from |p - q|":
                weights = (p_row - q_row).abs()
        if mistake not in ("an empty remainder gives the first word", "padded words may win"):
            weights = weights.where((weights > 0).any(1, keepdim=True), p_row)
        token = (weights.log() + gumbel).argmax(1)
        if mistake == "padded words may win":
            lanes = torch.cat([weights * gumbel.exp(), weights.new_zeros(B, 8)], 1)  # of equals the last wins
            token = lanes.shape[1] - 1 - lanes.flip(1).argmax(1)
        if mistake == "u again for the draw" and K:
            share = weights.cumsum(1) / weights.sum(1, keepdim=True)
            inverse = (share <= u[rows, n.clamp(max=K - 1)][:, None]).sum(1).clamp(max=V - 1)
            token = inverse.where(refused, token)
        tokens = torch.cat([drafted, drafted.new_full((B, 1), -1)], 1).where(torch.arange(K + 1) < n[:, None], -1)
        tokens[rows, n] = token
        return tokens, n

    return verify


def _probabilities(logits: Tensor, temperature, top_k, top_p) -> Tensor:
    threshold, log_total = logit_filter(logits, temperature, top_k, top_p)
    return (logits / temperature - log_total[..., None]).exp().masked_fill(logits < threshold[..., None], 0)


class Process:
    """A target and a draft that are Markov chains of order one, so that what is emitted depends on what was."""

    def __init__(self, V: int, narrow: int, seed: int = 0, temperature=1.0, top_k=0, top_p=1.0, chosen=False):
        self.V, self.setting, self.chosen = V, (temperature, top_k, top_p), chosen
        self.generator = torch.Generator().manual_seed(seed)
        self.target = 1.5 * torch.randn(V, V, generator=self.generator).double()
        near = self.target[:, :narrow] * 0.5 + 0.7 * torch.randn(V, narrow, generator=self.generator)
        self.draft = near.double()
        self.p = _probabilities(self.target, *self.setting)
        self.q = _probabilities(self.draft, *self.setting)

    def step(self, verify, last: Tensor, K: int) -> tuple[Tensor, Tensor]:
        """One step of N requests whose last tokens are `last`: (tokens (N, K + 1), how many each emits)."""
        drafted = torch.empty(len(last), K, dtype=torch.int64)
        previous = last
        for j in range(K):
            if self.chosen:
                drafted[:, j] = self.draft[previous].argmax(1)
            else:
                drafted[:, j] = torch.multinomial(self.q[previous], 1, generator=self.generator)[:, 0]
            previous = drafted[:, j]
        before = torch.cat([last[:, None], drafted], 1)
        num = torch.randint(0, K + 1, (len(last),), generator=self.generator)
        made = noise(len(last), K, self.V, generator=self.generator)
        draft = None if self.chosen else self.draft[before[:, :K]]
        tokens, n = verify(drafted, draft, self.target[before], num, *self.setting, **made)
        return tokens, n + 1

    def sequences(self, verify, N: int, length: int, K: int) -> Tensor:
        """int64 (N, length), each begun after token 0."""
        out, count = torch.zeros(N, 1 + length + K, dtype=torch.int64), torch.zeros(N, dtype=torch.int64)
        while len(running := (count < length).nonzero()[:, 0]):
            tokens, emitted = self.step(verify, out[running, count[running]], K)
            for j in range(K + 1):
                some = j < emitted
                out[running[some], count[running[some]] + 1 + j] = tokens[some, j]
            count[running] += emitted
        return out[:, 1 : length + 1]

    def statistic(self, verify, N: int, length: int = 3, K: int = 2) -> tuple[float, float]:
        """(Pearson's statistic of whole sequences against the target's own, its limit)."""
        found = self.sequences(verify, N, length, K)
        index, expected = found[:, 0] * 0, torch.ones(1).double()
        last = torch.zeros(1, dtype=torch.int64)
        for j in range(length):
            index = index * self.V + found[:, j]
            expected = (expected[:, None] * self.p[last]).flatten()
            last = torch.arange(len(expected)) % self.V
        counts = index.bincount(minlength=len(expected))
        assert (counts[expected == 0] == 0).all(), "a word that the filters exclude"
        return chi_square(counts, N * expected)
