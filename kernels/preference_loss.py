"""Preference losses on sequence log-probabilities: DPO and its family, with gradients and rewards, in one kernel.

For a pair of completions of one prompt, chosen w and rejected l, of |w| and |l| tokens:
    c = log pi(w) - log pi_ref(w)     j = log pi(l) - log pi_ref(l)     d = h(c) - h(j)
    loss = f(c, j, d)                 rewards = beta c, beta j         (Rafailov et al., arXiv:2305.18290, eq. 7 and section 4)
h is the derivative of an f-divergence (Wang et al., arXiv:2309.16240), h(u) = u for the usual reverse KL. Definitions, with
their papers and derivatives, are in preference_losses.py, once for every engine.

policy_chosen_logps ... ref_rejected_logps  float32 | float64 (B,)  sums over a completion's tokens
chosen_lengths, rejected_lengths            (B,)                    a completion's tokens, where a loss is per token
weights                                     (B,)                    multiply the losses (WPO, arXiv:2406.11827)
losses, chosen_rewards, rejected_rewards    as the log-probabilities (B,)
Backward: dlosses times dloss/dlog pi, which the forward pass wrote beside the loss; references and weights take none.

Least bytes: 16 read and 20 written a pair in float32, so a launch's latency; in PyTorch the expression is about twenty launches.
The GPU computes in float32; the CPU in the log-probabilities' own dtype. Oracle: reference/preference_loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._library import define, differentiable
from ._triton import tl, triton
from ._variant import Variant
from .preference_losses import DIVERGENCES, LOSSES, Loss, on_tensors

_BLOCK = 256


@triton.jit
def _load(ptr, offs, mask, other: tl.constexpr):
    """The values where there are any, else a constant."""
    value = tl.full(offs.shape, other, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["B"])
def _preference_loss_kernel(
    chosen_ptr, rejected_ptr, ref_chosen_ptr, ref_rejected_ptr, chosen_lengths_ptr, rejected_lengths_ptr, weights_ptr,
    losses_ptr, chosen_rewards_ptr, rejected_rewards_ptr, dchosen_ptr, drejected_ptr,
    B, beta, smoothing, parameter, alpha,
    LOSS: tl.constexpr, DIVERGENCE: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK pairs. LOSS and DIVERGENCE are functions of preference_losses.py.
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < B
    c = _load(chosen_ptr, offs, mask, 0.0) - _load(ref_chosen_ptr, offs, mask, 0.0)
    j = _load(rejected_ptr, offs, mask, 0.0) - _load(ref_rejected_ptr, offs, mask, 0.0)
    tl.store(chosen_rewards_ptr + offs, beta * c, mask=mask)
    tl.store(rejected_rewards_ptr + offs, beta * j, mask=mask)
    per_c, per_j = 1.0 / _load(chosen_lengths_ptr, offs, mask, 1.0), 1.0 / _load(rejected_lengths_ptr, offs, mask, 1.0)
    loss, dc, dj = _pair(c, j, per_c, per_j, beta, smoothing, parameter, alpha, LOSS, DIVERGENCE, PER_TOKEN)
    weight = _load(weights_ptr, offs, mask, 1.0)
    tl.store(losses_ptr + offs, weight * loss, mask=mask)
    tl.store(dchosen_ptr + offs, weight * dc, mask=mask)
    tl.store(drejected_ptr + offs, weight * dj, mask=mask)


@triton.jit
def _pair(c, j, per_c, per_j, beta, smoothing, parameter, alpha, LOSS, DIVERGENCE, PER_TOKEN):
    """(loss, dloss/dlog pi(w), dloss/dlog pi(l)); per_c and per_j are 1 / length. Also run on tensors."""
    if PER_TOKEN == "logps":
        c, j = c * per_c, j * per_j
    score_c, slope_c = DIVERGENCE(c, alpha)
    score_j, slope_j = DIVERGENCE(j, alpha)
    if PER_TOKEN == "scores":
        score_c, score_j, slope_c, slope_j = score_c * per_c, score_j * per_j, slope_c * per_c, slope_j * per_j
    loss, by_c, by_j, by_d = LOSS(c, j, score_c - score_j, beta, smoothing, parameter)
    dc, dj = by_c + by_d * slope_c, by_j - by_d * slope_j
    if PER_TOKEN == "logps":
        dc, dj = dc * per_c, dj * per_j
    return loss, dc, dj


def preference_loss_triton(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weights,
    loss_type: str, divergence: str, beta: float, smoothing: float, parameter: float, alpha: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch the kernel: losses, chosen and rejected rewards, and the losses' derivatives by the policy's log-probabilities."""
    given = (chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weights)
    tensors = [None if t is None else t.to(chosen.dtype).contiguous() for t in given]  # lengths may be integers
    outputs = tuple(torch.empty(chosen.shape, dtype=chosen.dtype, device=chosen.device) for _ in range(5))
    B = chosen.numel()
    if B:
        _preference_loss_kernel[(triton.cdiv(B, _BLOCK),)](
            *tensors, *outputs, B, beta, smoothing, parameter, alpha,
            LOSS=LOSSES[loss_type].function, DIVERGENCE=DIVERGENCES[divergence], PER_TOKEN=LOSSES[loss_type].per_token,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return outputs


def _preference_loss_cpu(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weights,
    loss_type, divergence, beta, smoothing, parameter, alpha,
):  # fmt: skip
    c = chosen if ref_chosen is None else chosen - ref_chosen
    j = rejected if ref_rejected is None else rejected - ref_rejected
    per_c, per_j = (1.0 if lengths is None else 1.0 / lengths.to(c.dtype) for lengths in (chosen_lengths, rejected_lengths))
    definition = LOSSES[loss_type]
    functions = on_tensors(definition.function), on_tensors(DIVERGENCES[divergence])
    values = on_tensors(_pair)(c, j, per_c, per_j, beta, smoothing, parameter, alpha, *functions, definition.per_token)
    weight = 1.0 if weights is None else weights.to(c.dtype)
    loss, dc, dj = (torch.empty_like(c).copy_(weight * value) for value in values)
    return loss, beta * c, beta * j, dc, dj


define(
    "preference_loss(Tensor policy_chosen_logps, Tensor policy_rejected_logps, Tensor? ref_chosen_logps, "
    "Tensor? ref_rejected_logps, Tensor? chosen_lengths, Tensor? rejected_lengths, Tensor? weights, str loss_type, "
    "str f_divergence, float beta, float label_smoothing, float parameter, float alpha) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda chosen, *rest: tuple(torch.empty_like(chosen, memory_format=torch.contiguous_format) for _ in range(5)),
    CPU=_preference_loss_cpu,
    CUDA=preference_loss_triton,
)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])


@once_differentiable  # what was saved is a number to autograd, and losses' own second derivative would be missing
def _backward(ctx, dlosses, *_):
    # dlog pi(w) = dlosses dloss/dlog pi(w), and so for l
    dchosen, drejected = ctx.saved_tensors
    return dlosses * dchosen, dlosses * drejected, *(None,) * 11


differentiable("preference_loss", _backward, _setup_context)


def check_options(
    loss_type: str, f_divergence: str, beta: float, label_smoothing: float, alpha: float, simpo_gamma: float, discopop_tau: float
) -> Loss:
    """The loss of that name; ValueError for an unknown one, or for an option that it does not have or cannot."""
    if loss_type == "kto":
        raise ValueError("loss_type is 'kto', which has no pairs; use kto_loss")
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join(n for n in LOSSES if not LOSSES[n].unpaired)}")
    if f_divergence not in DIVERGENCES:
        raise ValueError(f"f_divergence is {f_divergence!r}; expected one of {', '.join(DIVERGENCES)}")
    definition = LOSSES[loss_type]
    _check_beta(beta)
    low, high = definition.smoothing
    if not (low <= label_smoothing < high or label_smoothing == low == 0.0):
        allowed = f"{low} <= label_smoothing < {high}" if high else "0: this loss has no label smoothing"
        raise ValueError(f"label_smoothing is {label_smoothing} with loss_type={loss_type!r}; expected {allowed}")
    if f_divergence != "reverse_kl" and not definition.divergence:
        raise ValueError(f"loss_type={loss_type!r} is not defined with f_divergence={f_divergence!r}; use 'reverse_kl'")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; expected a finite number")
    if not math.isfinite(simpo_gamma):
        raise ValueError(f"simpo_gamma is {simpo_gamma}; expected a finite margin")
    if not 0.0 < discopop_tau < math.inf:
        raise ValueError(f"discopop_tau is {discopop_tau}; expected a positive number: it divides every margin")
    if f_divergence == "alpha_divergence" and alpha == 1.0:
        raise ValueError("alpha is 1, where the alpha-divergence is the reverse KL; use f_divergence='reverse_kl'")
    return definition


def _check_beta(beta: float) -> None:
    if not 0.0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}; expected a positive number: it divides or scales every margin")


def _check_tensors(given: dict[str, Tensor | None]) -> None:
    first, chosen = next(iter(given.items()))
    assert chosen is not None
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.shape != chosen.shape or tensor.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one value a row, as the others: (B,)")
        if tensor.device != chosen.device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {chosen.device}; move one to the other")
        if name.endswith("logps") and (tensor.dtype != chosen.dtype or tensor.dtype not in (torch.float32, torch.float64)):
            raise TypeError(f"{name} is {tensor.dtype}; expected float32 (or float64) like all log-probabilities: sum tokens in it")


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    *,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen_rewards, rejected_rewards), each (B,); the losses are differentiable in the policy's log-probabilities.

    policy_*_logps, ref_*_logps: float32 (B,), summed over each completion's tokens. A reference of None is zero
    log-probabilities: "sigmoid" without one is CPO's loss (arXiv:2401.08417). loss_type: TRL's names, and "simpo", "orpo"
    (preference_losses.py lists them with their papers). alpha belongs to f_divergence="alpha_divergence"; SimPO with it,
    alpha = 1 - a, is AlphaPO (arXiv:2501.03884). chosen_lengths and rejected_lengths (B,): tokens of each completion, needed by
    "ipo", "sigmoid_norm", "simpo", "orpo" and "sft". weights (B,) multiply the losses. "aot" and "aot_unpaired" compare sorted
    margins within the batch: their k-th loss is of the k-th smallest.

    Raises ValueError for an unknown loss, shapes that differ, or an option that the loss does not have; TypeError for
    half-precision log-probabilities.
    """
    definition = check_options(loss_type, f_divergence, beta, label_smoothing, alpha, simpo_gamma, discopop_tau)
    lengths = chosen_lengths, rejected_lengths
    _check_tensors(
        {
            "policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps,
            "ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps,
            "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, "weights": weights,
        }
    )  # fmt: skip
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("one of ref_chosen_logps and ref_rejected_logps is None; give both, or neither")
    if definition.per_token and None in lengths:
        raise ValueError(f"loss_type={loss_type!r} is per token: give chosen_lengths and rejected_lengths")
    if not definition.reference and ref_chosen_logps is not None:
        raise ValueError(f"loss_type={loss_type!r} has no reference model; leave ref_chosen_logps and ref_rejected_logps out")
    if loss_type == "sft" and chosen_lengths is not None:  # the mean over pairs becomes the mean over tokens
        share = chosen_lengths / chosen_lengths.mean(dtype=policy_chosen_logps.dtype)
        weights = share if weights is None else weights * share
    chosen, rejected, ref_chosen, ref_rejected = definition.arrange(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    parameter = {"simpo": simpo_gamma, "discopop": discopop_tau}.get(loss_type, 0.0)
    losses, chosen_rewards, rejected_rewards, _, _ = torch.ops.posttrain.preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, *(lengths if definition.per_token else (None, None)), weights,
        loss_type, f_divergence, beta, label_smoothing, parameter, alpha,
    )  # fmt: skip
    if chosen is not policy_chosen_logps:  # sorted: rewards stay in the order of the pairs
        chosen_rewards = _reward(policy_chosen_logps, ref_chosen_logps, beta)
        rejected_rewards = _reward(policy_rejected_logps, ref_rejected_logps, beta)
    return losses, chosen_rewards, rejected_rewards


def _reward(policy: Tensor, ref: Tensor | None, beta: float) -> Tensor:
    return beta * (policy.detach() if ref is None else policy.detach() - ref)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta (c - j)) (arXiv:2305.18290, eq. 7): `preference_loss` with loss_type "sigmoid"."""
    return preference_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, "sigmoid", label_smoothing
    )


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: Tensor | None = None,
    beta: float = 0.1,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(losses, rewards), each (B,), of completions that people called desirable or not; differentiable in policy_logps.

        r = log pi(y) - log pi_ref(y)
        losses = w_D (1 - sigmoid(beta (r - kl))) of desirable ones, w_U (1 - sigmoid(beta (kl - r))) of undesirable ones

    (Ethayarajh et al., arXiv:2402.01306). policy_logps, ref_logps: float32 (B,), sums over each completion's tokens.
    labels: bool (B,), desirable. kl: float32 (), the policy's divergence from the reference, held at 0 from below and without
    gradient; its estimate is the mean of r over completions of other prompts. Without kl the point of comparison is 0, which
    is "apo_zero_unpaired" (D'Oosterlinck et al., arXiv:2408.06266). Rewards are beta r.

    An undesirable completion is the rejected one of a pair whose chosen one is the point of comparison: the pair's kernel serves.
    Raises ValueError for shapes that differ, weights below 0 or beta not above it; TypeError for other dtypes.
    """
    _check_beta(beta)
    _check_tensors({"policy_logps": policy_logps, "ref_logps": ref_logps, "labels": labels})
    if labels.dtype != torch.bool:
        raise TypeError(f"labels are {labels.dtype}; expected bool: whether each completion is desirable")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(f"the weights are {desirable_weight} and {undesirable_weight}; expected at least 0")
    zero = torch.zeros_like(policy_logps)
    point = zero if kl is None else kl.detach().to(zero.dtype).clamp(min=0).expand_as(zero)
    weights = zero.masked_fill(labels, desirable_weight).masked_fill(~labels, undesirable_weight)
    losses, _, _, _, _ = torch.ops.posttrain.preference_loss(
        torch.where(labels, policy_logps, point), torch.where(labels, point, policy_logps),
        torch.where(labels, ref_logps, zero), torch.where(labels, zero, ref_logps),
        None, None, weights, "kto", "reverse_kl", beta, 0.0, 0.0, 0.5,
    )  # fmt: skip
    return losses, _reward(policy_logps, ref_logps, beta)


def aot_variants() -> Iterator[Variant]:
    """Every loss and every divergence once, with what the loss takes; weights, which add a load, with one of each kind."""
    tensors = (
        "chosen_ptr", "rejected_ptr", "ref_chosen_ptr", "ref_rejected_ptr", "chosen_lengths_ptr", "rejected_lengths_ptr",
        "weights_ptr", "losses_ptr", "chosen_rewards_ptr", "rejected_rewards_ptr", "dchosen_ptr", "drejected_ptr",
    )  # fmt: skip
    scalars = {"B": "i32", **dict.fromkeys(("beta", "smoothing", "parameter", "alpha"), "fp32")}
    names = [(loss, "reverse_kl") for loss in LOSSES] + [("sigmoid", divergence) for divergence in DIVERGENCES]
    for loss, divergence in dict.fromkeys(names):
        definition, weighted = LOSSES[loss], loss in ("ipo", "sft")
        absent = [] if definition.reference else ["ref_chosen_ptr", "ref_rejected_ptr"]
        absent += [] if definition.per_token else ["chosen_lengths_ptr", "rejected_lengths_ptr"]
        absent += [] if weighted else ["weights_ptr"]
        signature = {name: "constexpr" if name in absent else "*fp32" for name in tensors} | scalars
        constants = {
            **dict.fromkeys(absent), "LOSS": definition.function, "DIVERGENCE": DIVERGENCES[divergence],
            "PER_TOKEN": definition.per_token, "BLOCK": _BLOCK,
        }  # fmt: skip
        yield Variant(f"preference_loss_{loss}_{divergence}", _preference_loss_kernel, signature, constants)
