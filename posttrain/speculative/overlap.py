"""Leviathan's alpha without the coins: the mean of sum over x of min(p(x), q(x)) (arXiv:2211.17192, Corollary 3.6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.model.sampling import filter_logits

from .interface import Proposal, Requests


def overlap(proposal: Proposal, target_logits: Tensor, num_accepted: Tensor, requests: Requests) -> tuple[float, int]:
    """(sum, how many) over a chain's examined places: everything drafted up to and including the first rejection.

    target_logits (B, N + 1, V), num_accepted int64 (B,). Tokens that were proposed for certain, and all at temperature 0, have a q
    of one at themselves.
    """
    tokens, N = proposal.tokens.clamp(min=0), proposal.tokens.shape[1]
    sampling = requests.temperature, requests.top_k, requests.top_p
    if requests.temperature == 0:
        shared = (target_logits[:, :N].argmax(-1) == tokens).double()
    else:
        p = filter_logits(target_logits[:, :N], *sampling).softmax(-1)
        if proposal.logits is None:
            shared = p.gather(2, tokens[..., None])[..., 0].double()
        else:
            q = filter_logits(proposal.logits, *sampling).softmax(-1)
            shared = torch.minimum(p, F.pad(q, (0, p.shape[-1] - q.shape[-1]))).sum(-1).double()
    places = torch.arange(N, device=tokens.device)
    examined = (places <= num_accepted[:, None]) & (places < proposal.num[:, None])
    return shared[examined].sum().item(), int(examined.sum())
