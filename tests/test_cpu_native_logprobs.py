"""Log-probabilities through a head without its logits, in AMX tiles: against float64 at tails of every dimension, over several
passes of words and of rows, in 4 bits, at the edges of the numbers, and the same bits with any number of threads."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_accurate

from posttrain.kernels import linear_logprobs, quantize_weight

native = pytest.importorskip("posttrain.kernels.cpu.native", reason="the native extension was not built")
native_logprobs = pytest.importorskip("posttrain.kernels.cpu.native_logprobs")
pytestmark = pytest.mark.skipif(native.ISA != "amx", reason="this machine has no AMX")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Few rows too, which are faster in chunks."""
    monkeypatch.setattr(native_logprobs, "faster_than_chunks", lambda N, H: True)


def case(N, H, V):
    generator = torch.Generator().manual_seed(N + H + V)
    hidden = torch.randn(N, H, generator=generator).to(BF16)
    weight = (3 * torch.randn(V, H, generator=generator) / H**0.5).to(BF16)
    labels = torch.randint(V, (N,), generator=generator)
    labels[N // 2 : N // 2 + 1] = -100
    return hidden, weight, labels, torch.randn(V, generator=generator).to(BF16)


def fused(hidden, weight, labels, bias=None):
    """log p, the direction and the entropies."""
    hidden = hidden.clone().requires_grad_()
    logprobs, entropies = linear_logprobs(hidden, weight, labels, bias, return_entropy=True)
    return logprobs.detach(), torch.autograd.grad(logprobs.sum(), hidden)[0], entropies


def plain(hidden, weight, labels, bias=None):
    """The obvious expression, softmax in float32 or float64."""
    hidden = hidden.clone().requires_grad_()
    z = torch.nn.functional.linear(hidden, weight, bias)
    log_p = torch.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)), 1)
    keep = labels != -100
    logprobs = log_p.gather(1, labels.where(keep, 0)[:, None])[:, 0].where(keep, 0)
    entropies = -(log_p.exp() * log_p).sum(1).where(keep, 0)
    return logprobs.detach(), torch.autograd.grad(logprobs.sum(), hidden)[0], entropies.detach()


def check(hidden, weight, labels, bias, head=None):
    ours = fused(hidden, weight if head is None else head, labels, bias)
    exact = plain(hidden.double(), weight.double(), labels, None if bias is None else bias.double())
    for a, b, right in zip(ours, plain(hidden, weight, labels, bias), exact, strict=True):
        assert_as_accurate(a, b, right)


# whole tiles; tails of one; several pieces of H; several passes of words; several passes of rows
SHAPES = ((64, 32, 32), (1, 1, 2), (65, 33, 31), (100, 576, 200), (33, 1040, 65), (70, 64, 7000), (2100, 2048, 40))


@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
def test_against_float64(N, H, V, with_bias):
    hidden, weight, labels, bias = case(N, H, V)
    check(hidden, weight, labels, bias if with_bias else None)


@pytest.mark.parametrize(("kind", "block_size", "nested"), [("nf4", 64, True), ("fp4", 32, False), ("nf4", 256, True)])
def test_a_head_in_4_bits(kind, block_size, nested):
    for N, H, V in ((65, 33, 31), (40, 640, 300), (33, 64, 7000)):
        hidden, weight, labels, bias = case(N, H, V)
        head = quantize_weight(weight, kind, block_size, nested)
        check(hidden, head.dequantize(), labels, bias, head)


def test_logits_are_not_rounded_to_bfloat16():
    """Which chunks of them are: this is what tells the two ways apart."""
    hidden, weight, labels, _ = case(40, 64, 500)
    exact = plain(hidden.double(), weight.double(), labels)[0]
    error = (fused(hidden, weight, labels)[0] - exact).abs().max()
    assert error <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_a_certain_label_has_an_exact_direction():
    """1 - p is the others' sum over all: as a difference it would be lost from p = 1 - 1e-7 on."""
    hidden, weight, _, _ = case(64, 32, 90)
    labels = (hidden.double() @ weight.double().t()).argmax(1)
    for scale in (1, 4, 16):
        p = torch.softmax(scale * hidden.double() @ weight.double().t(), 1).scatter_(1, labels[:, None], 0)
        exact = p.sum(1, keepdim=True) * weight.double()[labels] - p @ weight.double()
        error = (fused(scale * hidden, weight, labels)[1] - exact).norm(dim=1)
        assert (error <= 2**-7 * exact.norm(dim=1)).all()  # bfloat16: the exponentials' and the result's rounding


def test_what_is_not_a_number_stays_in_its_row():
    hidden, weight, labels, _ = case(70, 48, 100)
    expected = fused(hidden, weight, labels)
    hidden[3, 5], hidden[40] = float("nan"), float("inf")
    for ours, before in zip(fused(hidden, weight, labels), expected, strict=True):
        assert ours[[3, 40]].isnan().flatten(1).all() if ours.dim() == 2 else ours[[3, 40]].isnan().all()
        others = torch.ones(70, dtype=torch.bool).index_fill_(0, torch.tensor([3, 40]), False)
        assert torch.equal(ours[others], before[others])


def test_words_that_a_bias_rules_out():
    hidden, weight, labels, bias = case(50, 32, 200)
    bias[:150], labels = float("-inf"), labels % 50 + 150
    ours, few = fused(hidden, weight, labels, bias), fused(hidden, weight[150:], labels - 150, bias[150:])
    for a, b in zip(ours, few, strict=True):
        torch.testing.assert_close(a, b)
    assert fused(hidden, weight, labels * 0, bias)[0].eq(float("-inf")).all()


def test_results_do_not_depend_on_the_number_of_threads():
    arguments = case(333, 96, 3000)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fused(*arguments))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_has_the_same_bits_in_any_batch():
    hidden, weight, labels, bias = case(200, 64, 4000)
    whole = fused(hidden, weight, labels, bias)
    for a, b in zip(whole, fused(hidden[70:103], weight, labels[70:103], bias), strict=True):
        assert torch.equal(a[70:103], b)


def test_when_it_is_chosen(monkeypatch):
    monkeypatch.undo()
    rule = native_logprobs.faster_than_chunks
    assert rule(129, 576) and rule(2048, 2048)
    assert not rule(128, 576) and not rule(4096, 4096) and not rule(1000, 0)
    hidden, weight, labels, _ = case(200, 32, 50)
    base = (weight, None, None, None, 0, 0, "none")
    assert native_logprobs.fused_logprobs(hidden, base, 50, None, labels, -100, True, False) is not None
    assert native_logprobs.fused_logprobs(hidden.float(), base, 50, None, labels, -100, True, False) is None
    assert native_logprobs.fused_logprobs(hidden[:100], base, 50, None, labels[:100], -100, True, False) is None
