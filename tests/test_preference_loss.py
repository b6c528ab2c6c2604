"""Preference losses: every engine against the oracle, in value and gradient; TRL's losses; extremes and refusals."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import four_bit
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.kernels import dpo_loss, kto_loss, preference_loss
from posttrain.kernels.preference_loss import preference_loss_triton
from posttrain.kernels.preference_losses import DIVERGENCES, LOSSES
from posttrain.reference import preference_loss as oracle

PARAMETER = {"simpo": 0.5, "discopop": 0.05}
OF_THE_OP = [
    (name, divergence) for name in LOSSES for divergence in DIVERGENCES if divergence == "reverse_kl" or LOSSES[name].divergence
]
CASES = [(name, divergence) for name, divergence in OF_THE_OP if not LOSSES[name].unpaired]


def _smoothing(name):
    return 0.1 if LOSSES[name].smoothing[1] else 0.0


def _batch(B: int, dtype=torch.float32, spread: float = 30.0):
    """Log-probabilities of policy and reference, lengths and weights."""
    generator = torch.Generator().manual_seed(B)
    logps = [-spread * torch.rand(B, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    lengths = [torch.randint(1, 40, (B,), generator=generator) for _ in range(2)]
    return logps, lengths, torch.rand(B, generator=generator, dtype=torch.float64).to(dtype)


def _oracle(name, divergence, logps, lengths, weights, beta=0.3):
    plain = [t.tolist() for t in (*logps, *lengths, weights)]
    exact = oracle.preference_loss(
        *plain[:4], beta, name, _smoothing(name), PARAMETER.get(name, 0.0), *plain[4:], divergence=divergence, alpha=0.4
    )
    return [torch.tensor(values, dtype=torch.float64) for values in exact]


def _ours(name, divergence, logps, lengths, weights, beta=0.3):
    """losses, rewards, and the gradients of the losses' sum."""
    chosen, rejected = (t.clone().requires_grad_() for t in logps[:2])
    refs = logps[2:] if LOSSES[name].reference else (None, None)
    results = preference_loss(
        chosen, rejected, *refs, beta, name, _smoothing(name), f_divergence=divergence, alpha=0.4,
        chosen_lengths=lengths[0], rejected_lengths=lengths[1], weights=weights,
    )  # fmt: skip
    gradients = torch.autograd.grad(results[0].sum(), (chosen, rejected), allow_unused=True, materialize_grads=True)
    return [t.detach() for t in results] + list(gradients)


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_values_and_gradients_are_the_oracle_s(name, divergence):
    """To a few dozen roundings of the largest value: both compute in float64, in their own order."""
    batch = _batch(9, torch.float64, spread=3.0)  # far exponentials lose their difference to cancellation
    for ours, exact in zip(_ours(name, divergence, *batch), _oracle(name, divergence, *batch), strict=True):
        assert ((ours - exact).abs() <= 64 * torch.finfo(torch.float64).eps * exact.abs().max()).all()


def _written_apart(name, divergence, logps, lengths, weights):
    """The engine's tensors straight from the op, without sorting or weights of "sft"."""
    refs = logps[2:] if LOSSES[name].reference else (None, None)
    lengths = [t.float() for t in lengths] if LOSSES[name].per_token else (None, None)
    return (*logps[:2], *refs, *lengths, weights, name, divergence, 0.3, _smoothing(name), PARAMETER.get(name, 0.0), 0.4)


def _op(arguments, dtype=torch.float64, nudge: float = 0.0, device="cpu"):
    """The op on these arguments in another dtype, its log-probabilities of the policy first multiplied by 1 + nudge."""
    moved = [t.to(device, dtype) if isinstance(t, torch.Tensor) else t for t in arguments]
    return torch.ops.posttrain.preference_loss(moved[0] * (1 + nudge), moved[1] * (1 - nudge), *moved[2:])


def _check_float32(launch, B: int) -> None:
    """The error against float64 is at most twice PyTorch's in float32, or twice what a unit in the inputs' last place changes: no
    evaluation in float32 of these exponentials can be asked for more."""
    batch = _batch(B)
    for name, divergence in OF_THE_OP:
        arguments = _written_apart(name, divergence, *batch)
        exact, plain = _op(arguments), _op(arguments, torch.float32)
        nudged = _op(arguments, nudge=torch.finfo(torch.float32).eps)
        for ours, theirs, moved, right in zip(launch(*arguments), plain, nudged, exact, strict=True):
            worse = torch.where((moved - right).abs() > (theirs - right).abs(), moved, theirs.double())
            assert_as_accurate(ours, worse, right)


@pytest.mark.interpret
def test_interpreted():
    _check_float32(preference_loss_triton, 300)


@pytest.mark.interpret
@pytest.mark.parametrize("B", (0, 1, 255, 256, 257))
def test_interpreted_tails(B):
    """A pair's result does not depend on how many there are."""
    arguments = _written_apart("ipo", "js_divergence", *_batch(300))
    fewer = [t[:B] if isinstance(t, torch.Tensor) else t for t in arguments]
    for some, all_of_them in zip(preference_loss_triton(*fewer), preference_loss_triton(*arguments), strict=True):
        assert torch.equal(some, all_of_them[:B])


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
def test_emulated(arch):
    four_bit.activate(arch)
    _check_float32(preference_loss_triton, 300)


@pytest.mark.gpu
def test_on_a_gpu():
    _check_float32(lambda *arguments: [t.cpu() for t in _op(arguments, torch.float32, device="cuda")], 1000)


@pytest.mark.parametrize(("name", "divergence"), CASES)
@pytest.mark.parametrize("ratio", (1e4, -1e4))
def test_extreme_ratios_stay_finite(name, divergence, ratio):
    lengths, weights = [torch.ones(2), torch.ones(2)], torch.ones(2)
    for chosen, rejected in ((ratio, 0.0), (0.0, ratio), (ratio, -ratio)):
        logps = [torch.full((2,), value) for value in (chosen, rejected, 0.0, 0.0)]
        for tensor in _ours(name, divergence, logps, lengths, weights):
            assert torch.isfinite(tensor).all()


@given(st.lists(st.tuples(*[st.floats(-1e4, 0.0, width=32)] * 4), min_size=1, max_size=6), st.floats(0.01, 2.0))
def test_dpo_prefers_what_the_policy_raised(rows, beta):
    """The loss falls below log 2 exactly where the policy's margin exceeds the reference's, and pushes it further."""
    logps = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    losses, _, _, d_chosen, d_rejected = _ours("hinge", "reverse_kl", logps, [torch.ones(len(rows))] * 2, None, beta)
    margin = (logps[0] - logps[2]) - (logps[1] - logps[3])
    assert torch.equal(losses == 0, beta * margin >= 1)
    losses, _, _ = dpo_loss(*logps, beta)
    assert (losses[margin >= 0] <= math.log(2)).all() and (losses[margin <= 0] >= math.log(2)).all()
    assert (d_chosen <= 0).all() and (d_rejected >= 0).all()


def test_a_reference_of_none_is_zero():
    logps, _, _ = _batch(5)
    zero = torch.zeros(5)
    for ours, theirs in zip(preference_loss(*logps[:2], beta=0.2), preference_loss(*logps[:2], zero, zero, 0.2), strict=True):
        assert torch.equal(ours, theirs)


def test_alphapo_is_simpo_with_the_alpha_divergence():
    """Rewards beta (1 - p^-a) / a of log-probabilities per token, with a = 0.25 (arXiv:2501.03884)."""
    logps, lengths, _ = _batch(5, torch.float64)
    options = {"alpha": 0.75, "f_divergence": "alpha_divergence", "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    losses, _, _ = preference_loss(*logps[:2], beta=2.0, loss_type="simpo", **options)
    rewards = [(1 - (-0.25 * p / n).exp()) / 0.25 for p, n in zip(logps[:2], lengths, strict=True)]
    expected = -torch.nn.functional.logsigmoid(2.0 * (rewards[0] - rewards[1]) - 0.5)
    assert torch.allclose(losses, expected, rtol=64 * torch.finfo(torch.float64).eps)


def _kto(logps, labels, kl, dtype=torch.float64):
    """losses, rewards and the gradient of the losses' sum; desirable completions weigh 1.5, undesirable 0.5."""
    policy = logps[0].to(dtype).requires_grad_()
    point = None if kl is None else torch.tensor(kl, dtype=dtype)
    losses, rewards = kto_loss(
        policy, logps[1].to(dtype), labels, point, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), rewards, gradient


@pytest.mark.parametrize("kl", (2.5, 0.0, -1.0, None))
def test_kto_is_the_oracle_s(kl):
    (policy, ref, *_), _, _ = _batch(9, torch.float64, spread=3.0)
    labels = torch.arange(9) % 3 == 0
    exact = oracle.kto_loss(policy.tolist(), ref.tolist(), labels.tolist(), kl or 0.0, 0.3, 1.5, 0.5)
    for ours, right in zip(_kto((policy, ref), labels, kl), exact, strict=True):
        bound = 64 * torch.finfo(torch.float64).eps
        assert torch.allclose(ours, torch.tensor(right, dtype=torch.float64), rtol=bound, atol=bound)


def test_kto_s_point_of_comparison_takes_no_gradient_and_extremes_stay_finite():
    labels, ref = torch.tensor([True, False, True, False]), torch.zeros(4)
    policy, kl = torch.tensor([1e4, 1e4, -1e4, -1e4]).requires_grad_(), torch.tensor(1.0, requires_grad=True)
    losses, rewards = kto_loss(policy, ref, labels, kl)
    losses.sum().backward()
    assert kl.grad is None and torch.isfinite(policy.grad).all() and not rewards.requires_grad
    assert losses.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_kto_refusals():
    one, labels = torch.zeros(2), torch.tensor([True, False])
    for changes, message in (
        ({"beta": 0.0}, "expected a positive number"),
        ({"ref_logps": torch.zeros(3)}, "ref_logps has shape"),
        ({"desirable_weight": -1.0}, "the weights are -1.0 and 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            kto_loss(**{"policy_logps": one, "ref_logps": one, "labels": labels} | changes)
    with pytest.raises(TypeError, match=r"labels are torch\.int64; expected bool"):
        kto_loss(one, one, labels.long())


def test_opcheck_and_compile():
    for name in ("sigmoid", "ipo", "orpo", "kto"):
        logps, lengths, weights = _batch(6)
        arguments = list(_written_apart(name, "reverse_kl", logps, lengths, weights))
        torch.library.opcheck(torch.ops.posttrain.preference_loss, tuple(arguments))
        arguments[:2] = (t.clone().requires_grad_() for t in logps[:2])
        torch.library.opcheck(torch.ops.posttrain.preference_loss, tuple(arguments))
    logps, _, _ = _batch(6)
    compiled = torch.compile(lambda *x: preference_loss(*x, loss_type="apo_zero"), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*logps), preference_loss(*logps, loss_type="apo_zero"), strict=True):
        assert torch.equal(ours, theirs)


def test_only_losses_carry_gradients_and_references_take_none():
    logps, _, _ = _batch(4)
    given = [t.clone().requires_grad_() for t in logps]
    losses, chosen, rejected = preference_loss(*given)
    assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    losses.sum().backward()
    assert given[0].grad is not None and given[2].grad is None and given[3].grad is None


def test_refusals():
    logps, lengths, _ = _batch(4)
    for options, message in (
        ({"loss_type": "dpo"}, "expected one of sigmoid"),
        ({"loss_type": "kto"}, "use kto_loss"),
        ({"f_divergence": "tv"}, "expected one of reverse_kl"),
        ({"beta": 0.0}, "expected a positive number"),
        ({"beta": -0.1}, "expected a positive number"),
        ({"beta": float("nan")}, "expected a positive number"),
        ({"label_smoothing": 0.5}, "label_smoothing < 0.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "has no label smoothing"),
        ({"loss_type": "exo_pair"}, "label_smoothing < 1.0"),
        ({"loss_type": "apo_zero", "f_divergence": "forward_kl"}, "not defined with"),
        ({"f_divergence": "alpha_divergence", "alpha": 1.0}, "use f_divergence='reverse_kl'"),
        ({"f_divergence": "alpha_divergence", "alpha": float("nan")}, "alpha is nan; expected a finite number"),
        ({"loss_type": "simpo", "simpo_gamma": float("nan")}, "simpo_gamma is nan; expected a finite margin"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau is 0.0; expected a positive number"),
        ({"loss_type": "ipo"}, "give chosen_lengths"),
        ({"loss_type": "orpo", "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}, "has no reference model"),
        ({"weights": torch.ones(3)}, "weights has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            preference_loss(*logps, **options)
    with pytest.raises(ValueError, match="give both, or neither"):
        preference_loss(*logps[:3])
    with pytest.raises(TypeError, match="sum tokens in it"):
        preference_loss(*(t.bfloat16() for t in logps))


# Its DPO trainer has no SimPO and no ORPO, and its DiscoPOP is 0 times infinity where exponential scores are far apart.
OVERFLOWS = ("discopop", "forward_kl"), ("discopop", "alpha_divergence")
TRL = [case for case in CASES if case[0] not in ("simpo", "orpo") and case not in OVERFLOWS]


def _trl_loss(trainer, name, divergence, smoothing, per_token, mask, ref):
    """TRL's own loss code on these log-probabilities; everything around it (a model, an accelerator) is a stand-in."""
    gather = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=gather, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type=divergence, f_alpha_divergence_coef=0.4, loss_types=[name], loss_weights=[1.0], beta=0.3,
        label_smoothing=smoothing, args=SimpleNamespace(discopop_tau=0.05), use_weighting=False, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    nothing = torch.zeros(per_token.shape)
    outputs = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), loss=None)
    completion = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
    inputs = {
        "input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion), "completion_mask": completion,
        "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1],
    }  # fmt: skip
    return trainer._compute_loss(stand_in, lambda **_: outputs, inputs, False), stand_in._metrics["train"]


@pytest.mark.peers
@pytest.mark.parametrize(("name", "divergence"), TRL)
def test_trl_agrees(name, divergence):
    """The mean losses of 8 batches, both in float32, against float64."""
    trainer = pytest.importorskip("trl").DPOTrainer
    smoothing = 0.0 if name in ("sigmoid", "sigmoid_norm") else _smoothing(name)  # TRL has none there
    B, T = 6, 9
    ours, theirs, exact = [], [], []
    for _ in range(8):
        mask = torch.arange(T) < torch.randint(1, T, (2 * B, 1))
        per_token, lengths = -2 * torch.rand(2 * B, T) * mask, mask.sum(1)
        ref = [-10 * torch.rand(B) for _ in range(2)]
        loss, metrics = _trl_loss(trainer, name, divergence, smoothing, per_token, mask, ref)
        theirs.append(loss)
        options = {"f_divergence": divergence, "alpha": 0.4, "chosen_lengths": lengths[:B], "rejected_lengths": lengths[B:]}
        for dtype, means in ((torch.float32, ours), (torch.float64, exact)):
            chosen, rejected = per_token.sum(1).to(dtype).chunk(2)
            refs = [r.to(dtype) for r in ref] if LOSSES[name].reference else (None, None)
            losses, rewards, _ = preference_loss(chosen, rejected, *refs, 0.3, name, smoothing, **options)
            means.append(losses.mean())
        if LOSSES[name].reference:  # of float64 here: TRL's float32 mean is within its B roundings
            bound = B * torch.finfo(torch.float32).eps * rewards.abs().max().item()
            assert metrics["rewards/chosen"] == [pytest.approx(rewards.mean().item(), abs=bound)]
    assert_as_accurate(torch.stack(ours), torch.stack(theirs), torch.stack(exact))


def test_a_second_derivative_is_an_error_not_a_part_of_one():
    """The losses' own curvature is not kept: what would be left is that of whatever stands behind them."""
    chosen, rejected = torch.randn(4, requires_grad=True), torch.randn(4)
    losses, _, _ = preference_loss(chosen, rejected, torch.zeros(4), torch.zeros(4))
    (gradient,) = torch.autograd.grad(losses.square().sum(), chosen, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
