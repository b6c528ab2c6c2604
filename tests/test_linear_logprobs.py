"""Log-probabilities through a head: values and gradients against the oracle and float64, dense and 4-bit, chunks and refusals."""

from __future__ import annotations

import sys

import pytest
import torch
from tolerance import assert_as_accurate

from posttrain.kernels import linear_logprobs, quantize_weight
from posttrain.reference import linear_logprobs as oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _case(N, H, V, dtype, bias=True):
    generator = torch.Generator().manual_seed(N + H + V)
    hidden = torch.randn(N, H, generator=generator).to(dtype)
    weight = (3 * torch.randn(V, H, generator=generator) / H**0.5).to(dtype)
    labels = torch.randint(V, (N,), generator=generator)
    labels[2:3] = -100
    b = torch.randn(V, generator=generator).to(dtype) if bias else None
    return hidden, weight, labels, b, torch.randn(N, generator=generator)


def _run(function, hidden, weight, labels, bias, gradient, trained=False):
    """(log p, dhidden, and where the head is trained dweight and dbias)."""
    inputs = [hidden.clone().requires_grad_()]
    if trained:
        inputs += [t.clone().requires_grad_() for t in (weight, bias) if t is not None]
        weight, bias = inputs[1], (inputs[2] if bias is not None else None)
    logprobs = function(inputs[0], weight, labels, bias)
    return [logprobs.detach(), *torch.autograd.grad(logprobs, inputs, gradient.to(logprobs.dtype))]


def _plain(hidden, weight, labels, bias):
    """The obvious expression: logits whole, in hidden's dtype, log_softmax in float32 (float64 for that)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias).to(wide), 1)
    keep = labels != -100
    return log_p.gather(1, labels.where(keep, 0)[:, None])[:, 0].where(keep, 0)


@pytest.mark.parametrize("trained", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_the_oracle_in_float64(bias, trained):
    hidden, weight, labels, b, gradient = _case(7, 12, 37, torch.float64, bias)
    ours = _run(linear_logprobs, hidden, weight, labels, b, gradient, trained)
    plain = [t if t is None else t.numpy() for t in (hidden, weight, labels, b)]
    log_p, _, *gradients = oracle.linear_logprobs(*plain[:3], plain[3], gradient=gradient.numpy())
    for a, exact in zip(ours, [log_p, *gradients], strict=False):
        exact = torch.from_numpy(exact)
        assert ((a - exact).abs() <= 64 * torch.finfo(torch.float64).eps * (1 + exact.abs().max())).all()


def test_the_oracle_s_gradients_are_finite_differences():
    hidden, weight, labels, bias, gradient = (t.numpy() for t in _case(3, 4, 5, torch.float64))
    _, _, dhidden, dweight, dbias = oracle.linear_logprobs(hidden, weight, labels, bias, gradient=gradient)
    h = 1e-6
    for tensor, derivative in ((hidden, dhidden), (weight, dweight), (bias, dbias)):
        for place in range(tensor.size):
            ends = []
            for step in (h, -h):
                kept, tensor.flat[place] = tensor.flat[place], tensor.flat[place] + step
                ends.append(float(gradient @ oracle.linear_logprobs(hidden, weight, labels, bias)[0]))
                tensor.flat[place] = kept
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(derivative.flat[place], abs=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", (False, True))
@pytest.mark.parametrize(("N", "V"), [(1, 3), (9, 100), (600, 333)])
def test_as_accurate_as_whole_logits(dtype, trained, N, V, monkeypatch):
    """Also over several chunks, the last one short: 600 rows of at most 256."""
    import importlib

    module = importlib.import_module("posttrain.kernels.linear_logprobs")
    monkeypatch.setattr(module, "_SCRATCH", 1)
    assert module.chunk_rows(V) == 256
    hidden, weight, labels, bias, gradient = _case(N, 64, V, dtype)
    wide = [t.double() for t in (hidden, weight)], bias.double()
    exact = _run(_plain, *wide[0], labels, wide[1], gradient.double(), trained)
    plain = _run(_plain, hidden, weight, labels, bias, gradient, trained)
    for ours, theirs, right in zip(
        _run(linear_logprobs, hidden, weight, labels, bias, gradient, trained), plain, exact, strict=True
    ):
        assert_as_accurate(ours, theirs, right)


@pytest.mark.parametrize("double_quant", (False, True))
def test_a_head_in_4_bits(double_quant):
    hidden, weight, labels, bias, gradient = _case(20, 64, 96, torch.float32)
    head = quantize_weight(weight, double_quant=double_quant)
    dense = head.dequantize(torch.float32)
    exact = _run(_plain, hidden.double(), dense.double(), labels, bias.double(), gradient.double())
    plain = _run(_plain, hidden, dense, labels, bias, gradient)
    for ours, theirs, right in zip(_run(linear_logprobs, hidden, head, labels, bias, gradient), plain, exact, strict=True):
        assert_as_accurate(ours, theirs, right)


def test_entropy():
    hidden, weight, labels, bias, _ = _case(9, 12, 50, torch.float64)
    logprobs, entropy = linear_logprobs(hidden.requires_grad_(), weight, labels, bias, return_entropy=True)
    p = torch.softmax(hidden @ weight.t() + bias, 1)
    expected = torch.distributions.Categorical(probs=p).entropy().where(labels != -100, 0)
    assert torch.allclose(entropy, expected, rtol=64 * torch.finfo(torch.float64).eps)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_without_gradients_no_direction_is_computed():
    hidden, weight, labels, bias, _ = _case(4, 8, 16, torch.float32)
    base = (weight, None, None, None, 0)
    for direction in (False, True):
        *_, saved = torch.ops.posttrain.linear_logprobs(hidden, *base, labels, bias, -100, direction, False, 16, 8, 0, "none")
        assert saved.shape == (hidden.shape if direction else (0,))
    with torch.no_grad():
        assert not linear_logprobs(hidden.requires_grad_(), weight, labels, bias).requires_grad


@pytest.mark.parametrize(("N", "sizes"), [(1, [1]), (32, [32]), (33, [64]), (300, [128, 128, 64]), (256, [128, 128])])
def test_few_different_numbers_of_rows_are_multiplied(N, sizes, monkeypatch):
    """Each costs oneDNN memory for good; what fills a chunk shows in no result."""
    module = sys.modules["posttrain.kernels.linear_logprobs"]
    case = _case(N, 8, 50, torch.float64, True)
    expected = _run(_plain, *case, trained=True)
    seen: list[int] = []
    logits_of = module._logits
    monkeypatch.setattr(module, "chunk_rows", lambda V: 128)
    monkeypatch.setattr(module, "_logits", lambda rows, *rest: seen.append(len(rows)) or logits_of(rows, *rest))
    for ours, exact in zip(_run(linear_logprobs, *case, trained=True), expected, strict=True):
        torch.testing.assert_close(ours, exact)
    assert seen == 2 * sizes  # forward, and backward of a head that is trained


def test_empty_and_all_ignored():
    hidden, weight, _, bias, _ = _case(5, 8, 16, torch.float32)
    assert linear_logprobs(hidden[:0], weight, torch.empty(0, dtype=torch.int64), bias).shape == (0,)
    ignored = torch.full((5,), -100)
    logprobs, dhidden = _run(linear_logprobs, hidden, weight, ignored, bias, torch.ones(5))
    assert torch.equal(logprobs, torch.zeros(5)) and torch.equal(dhidden, torch.zeros(5, 8))


@pytest.mark.parametrize("trained", (False, True))
def test_opcheck_and_compile(trained):
    hidden, weight, labels, bias, _ = _case(4, 8, 16, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    arguments = (hidden, weight, None, None, None, 0, labels, bias, -100, not trained, True, 16, 8, 0, "none")
    torch.library.opcheck(torch.ops.posttrain.linear_logprobs, arguments)
    compiled = torch.compile(lambda *x: linear_logprobs(*x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight, labels, bias), linear_logprobs(hidden, weight, labels, bias))


def test_refusals():
    hidden, weight, labels, bias, _ = _case(4, 8, 16, torch.float32)
    for arguments, message in (
        ((hidden[:, :7], weight, labels), "expected .N, H., .V, H."),
        ((hidden, weight, labels[:3]), "expected .N, H., .V, H."),
        ((hidden, weight, labels, bias[:5]), "bias .5,."),
        ((hidden, weight, labels + 16), "outside the vocabulary of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_logprobs(*arguments)
    for arguments, message in (
        ((hidden.bfloat16(), weight, labels), "cast one"),
        ((hidden.long(), weight, labels), "expected float32, float16 or bfloat16"),
        ((hidden, weight, labels.int()), "expected int64"),
    ):
        with pytest.raises(TypeError, match=message):
            linear_logprobs(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu(dtype):
    hidden, weight, labels, bias, gradient = _case(600, 64, 5000, dtype)
    exact = _run(_plain, hidden.double(), weight.double(), labels, bias.double(), gradient.double())
    plain = _run(_plain, hidden, weight, labels, bias, gradient)
    ours = _run(linear_logprobs, *(t.cuda() for t in (hidden, weight, labels, bias, gradient)))
    for a, theirs, right in zip(ours, plain, exact, strict=True):
        assert_as_accurate(a.cpu(), theirs, right)


@pytest.mark.parametrize("trained", (False, True))
def test_a_second_derivative_is_an_error_not_a_part_of_one(trained):
    hidden, weight, labels, bias, _ = _case(4, 8, 16, torch.float32)
    hidden.requires_grad_()
    logprobs = linear_logprobs(hidden, weight.requires_grad_(trained), labels, bias)
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
