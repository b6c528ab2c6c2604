"""What each preference loss is, once for every engine: functions of a pair's log-ratios, with their derivatives.

    f(c, j, d, beta, e, t) -> (loss, dloss/dc, dloss/dj, dloss/dd)     c, j, d as in preference_loss.py
    h(u, alpha) -> (h(u), h'(u))                                        the f-divergences: d = h(c) - h(j)
e is label_smoothing, t a loss's own parameter (SimPO's margin, DiscoPOP's temperature). The functions are Triton's, and use
only operators, `tl.exp`, `tl.log`, `tl.sigmoid`, `tl.where` and the helpers below, so that `on_tensors` can run the same code on
PyTorch tensors. Oracle, written apart from this: reference/preference_loss.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton


@triton.jit
def log1p(x):
    u = 1.0 + x  # the rounding in u cancels in the quotient (Kahan)
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x below 0."""
    u = tl.exp(x)
    plain = (u == 1.0) | (u < 0.5)
    return tl.where(plain, tl.where(u == 1.0, x, u - 1.0), (u - 1.0) * (x / tl.log(tl.where(plain, 0.5, u))))


@triton.jit
def log_sigmoid(x):
    return tl.where(x < 0.0, x, 0.0) - log1p(tl.exp(-tl.where(x < 0.0, -x, x)))


@triton.jit
def exp(x):
    """exp(x) with what x log2(e) loses in float32 put back: the processor's 2^x alone is off by |x| units in the last place."""
    high = x * 1.4426950408889634
    low = tl.fma(x, x * 0.0 + 1.4426950408889634, -high) + x * 1.925963033500e-08
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def bounded_exp(x):
    """exp(x), and its derivative; flat past x = 40: a square of it is still a float32."""
    value = exp(tl.where(x > 40.0, 40.0, x))
    return value, tl.where(x > 40.0, 0.0, value)


@triton.jit
def reverse_kl(u, alpha):
    return u, u * 0.0 + 1.0


@triton.jit
def forward_kl(u, alpha):
    value, slope = bounded_exp(-u)
    return 1.0 - value, slope


@triton.jit
def js_divergence(u, alpha):
    return 0.6931471805599453 + log_sigmoid(u), tl.sigmoid(-u)


@triton.jit
def alpha_divergence(u, alpha):
    value, slope = bounded_exp((alpha - 1.0) * u)
    return (value - 1.0) / (alpha - 1.0), slope


@triton.jit
def sigmoid(c, j, d, beta, e, t):
    """Rafailov et al. (DPO), arXiv:2305.18290, eq. 7; e > 0: conservative DPO (Mitchell 2023)."""
    x = beta * d
    by_d = beta * (e * tl.sigmoid(x) - (1.0 - e) * tl.sigmoid(-x))
    return -(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x), 0.0, 0.0, by_d


@triton.jit
def robust(c, j, d, beta, e, t):
    """Chowdhury et al., arXiv:2403.00409: unbiased under labels flipped with probability e."""
    x = beta * d
    loss = (e * log_sigmoid(-x) - (1.0 - e) * log_sigmoid(x)) / (1.0 - 2.0 * e)
    return loss, 0.0, 0.0, -beta * ((1.0 - e) * tl.sigmoid(-x) + e * tl.sigmoid(x)) / (1.0 - 2.0 * e)


@triton.jit
def hinge(c, j, d, beta, e, t):
    """Zhao et al. (SLiC-HF), arXiv:2305.10425."""
    margin = 1.0 - beta * d
    return tl.where(margin > 0.0, margin, 0.0), 0.0, 0.0, tl.where(margin > 0.0, d * 0.0 - beta, 0.0)


@triton.jit
def ipo(c, j, d, beta, e, t):
    """Azar et al., arXiv:2310.12036, eq. 17, on scores per token."""
    x = d - 0.5 / beta
    return x * x, 0.0, 0.0, 2.0 * x


@triton.jit
def exo_pair(c, j, d, beta, e, t):
    """Ji et al., arXiv:2402.00856, eq. 16."""
    x = beta * d
    towards = log_sigmoid(x) - log1p(-e + x * 0.0)
    away = log_sigmoid(-x) - tl.log(e + x * 0.0)
    s = tl.sigmoid(x)
    return s * towards + tl.sigmoid(-x) * away, 0.0, 0.0, beta * s * tl.sigmoid(-x) * (towards - away)


@triton.jit
def discopop(c, j, d, beta, e, t):
    """Lu et al., arXiv:2406.08414, eq. 5: m exp(-x) is one exponential, so that neither factor overflows."""
    x = beta * d
    m, rest = tl.sigmoid(x / t), tl.sigmoid(-x / t)
    exponential = tl.exp(log_sigmoid(x / t) - x)
    slope = log_sigmoid(x) * m * rest / t - tl.sigmoid(-x) * rest + exponential * (rest / t - 1.0)
    return exponential - log_sigmoid(x) * rest, 0.0, 0.0, beta * slope


@triton.jit
def simpo(c, j, d, beta, e, t):
    """Meng et al., arXiv:2405.14734, eq. 6, on log-probabilities per token."""
    x = beta * d - t
    by_d = beta * (e * tl.sigmoid(x) - (1.0 - e) * tl.sigmoid(-x))
    return -(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x), 0.0, 0.0, by_d


@triton.jit
def nca_pair(c, j, d, beta, e, t):
    """Chen et al., arXiv:2402.05369."""
    loss = -log_sigmoid(beta * c) - 0.5 * log_sigmoid(-beta * c) - 0.5 * log_sigmoid(-beta * j)
    return loss, beta * (0.5 * tl.sigmoid(beta * c) - tl.sigmoid(-beta * c)), 0.5 * beta * tl.sigmoid(beta * j), 0.0


@triton.jit
def bco_pair(c, j, d, beta, e, t):
    """Jung et al., arXiv:2404.04656, without the running mean of rewards."""
    loss = -log_sigmoid(beta * c) - log_sigmoid(-beta * j)
    return loss, -beta * tl.sigmoid(-beta * c), beta * tl.sigmoid(beta * j), 0.0


@triton.jit
def sppo_hard(c, j, d, beta, e, t):
    """Wu et al., arXiv:2405.00675, eq. 4.7 with win probabilities 1 and 0."""
    x, y = c - 0.5 / beta, j + 0.5 / beta
    return x * x + y * y, 2.0 * x, 2.0 * y, 0.0


@triton.jit
def apo_zero(c, j, d, beta, e, t):
    """D'Oosterlinck et al., arXiv:2408.06266, eq. 7."""
    low, high = tl.sigmoid(-beta * c), tl.sigmoid(beta * j)
    return low + high, -beta * low * tl.sigmoid(beta * c), beta * high * tl.sigmoid(-beta * j), 0.0


@triton.jit
def apo_down(c, j, d, beta, e, t):
    """D'Oosterlinck et al., arXiv:2408.06266, eq. 8."""
    x = beta * (c - j)
    by_c, by_x = tl.sigmoid(beta * c) * tl.sigmoid(-beta * c), tl.sigmoid(x) * tl.sigmoid(-x)
    return tl.sigmoid(beta * c) + tl.sigmoid(-x), beta * (by_c - by_x), beta * by_x, 0.0


@triton.jit
def orpo(c, j, d, beta, e, t):
    """Hong et al., arXiv:2403.07691: the odds-ratio term, on log-probabilities per token, held below -1e-6."""
    c_held, j_held = tl.where(c < -1e-6, c, -1e-6), tl.where(j < -1e-6, j, -1e-6)
    miss_c, miss_j = -expm1(c_held), -expm1(j_held)
    x = (c_held - tl.log(miss_c)) - (j_held - tl.log(miss_j))
    slope = -beta * tl.sigmoid(-x)
    return -beta * log_sigmoid(x), tl.where(c < -1e-6, slope / miss_c, 0.0), tl.where(j < -1e-6, -slope / miss_j, 0.0), 0.0


@triton.jit
def sft(c, j, d, beta, e, t):
    """The chosen completion's negative log-likelihood per token."""
    return -c, c * 0.0 - 1.0, 0.0, 0.0


@triton.jit
def kto(c, j, d, beta, e, t):
    """Ethayarajh et al. (KTO), arXiv:2402.01306: 1 - sigmoid(beta d), of a completion and what it is compared with."""
    miss = tl.sigmoid(-beta * d)
    return miss, 0.0, 0.0, -beta * miss * tl.sigmoid(beta * d)


_TENSORS = {
    "tl": SimpleNamespace(exp=torch.exp, log=torch.log, sigmoid=torch.sigmoid, where=torch.where),
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "exp": torch.exp,
    "log_sigmoid": F.logsigmoid,
}


@cache
def on_tensors(function: Any) -> Callable[..., Any]:
    """The same function on PyTorch tensors: its code with PyTorch's operations in place of Triton's."""
    plain = getattr(function, "fn", function)
    names = {name: _TENSORS[name] for name in plain.__code__.co_names if name in _TENSORS}
    if "bounded_exp" in plain.__code__.co_names:
        names["bounded_exp"] = on_tensors(bounded_exp)
    return FunctionType(plain.__code__, names, plain.__name__)


def _as_given(chosen, rejected, ref_chosen, ref_rejected):
    return chosen, rejected, ref_chosen, ref_rejected


def _sorted_margins(chosen, rejected, ref_chosen, ref_rejected):
    """The policy's margins in ascending order as c, the reference's as j: their k-th are compared."""
    margin = chosen - rejected
    ref = torch.zeros_like(margin) if ref_chosen is None else ref_chosen - ref_rejected
    return margin.sort().values, ref.sort().values, None, None


def _sorted_ratios(chosen, rejected, ref_chosen, ref_rejected):
    c, j = (chosen, rejected) if ref_chosen is None else (chosen - ref_chosen, rejected - ref_rejected)
    return c.sort().values, j.sort().values, None, None


class Loss(NamedTuple):
    """One row of the table: the definition, and what it takes."""

    function: Any
    per_token: str = ""  # what is divided by the lengths: "scores" (h(c), h(j)), "logps" (c, j), or nothing
    reference: bool = True
    divergence: bool = False  # defined with f-divergences other than the reverse KL
    smoothing: tuple[float, float] = (0.0, 0.0)  # label_smoothing from, and below
    arrange: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = _as_given
    unpaired: bool = False  # of single completions with a label: `kto_loss`


LOSSES = {
    "sigmoid": Loss(sigmoid, divergence=True, smoothing=(0.0, 0.5)),
    "hinge": Loss(hinge, divergence=True),
    "ipo": Loss(ipo, "scores", divergence=True),
    "exo_pair": Loss(exo_pair, divergence=True, smoothing=(1e-6, 1.0)),
    "nca_pair": Loss(nca_pair),
    "robust": Loss(robust, divergence=True, smoothing=(0.0, 0.5)),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    # Melnyk et al., arXiv:2406.05882
    "aot": Loss(sigmoid, smoothing=(0.0, 0.5), arrange=_sorted_margins),
    "aot_unpaired": Loss(sigmoid, smoothing=(0.0, 0.5), arrange=_sorted_ratios),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "discopop": Loss(discopop, divergence=True),
    "sft": Loss(sft, "logps", reference=False),
    # Lambert et al. (Tulu 3), arXiv:2411.15124
    "sigmoid_norm": Loss(sigmoid, "scores", divergence=True, smoothing=(0.0, 0.5)),
    "simpo": Loss(simpo, "logps", reference=False, divergence=True, smoothing=(0.0, 0.5)),
    "orpo": Loss(orpo, "logps", reference=False),
    "kto": Loss(kto, unpaired=True),
}
DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
