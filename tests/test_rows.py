"""Small operands of any strides: a kernel that takes no stride for them must not read what lies between or behind.

Every launcher that is given a vector by a caller: a bias, labels, an adapter's scaling, a request's seed. `spread` and `expanded`
hold the same values as a tensor of one element behind the other; what lies between them are other values.
"""

from __future__ import annotations

import pytest
import torch

from posttrain.kernels import double_quantize, quantize_weight
from posttrain.kernels._multi_lora import multi_lora_add_triton
from posttrain.kernels._segments import segment_rows_triton
from posttrain.kernels.double_quant import double_dequantize_triton
from posttrain.kernels.logit_filter import logit_filter_triton
from posttrain.kernels.logit_rows import logit_rows_triton
from posttrain.kernels.lora_linear_up import lora_linear_up_triton
from posttrain.kernels.nf4 import dequantize_4bit_triton
from posttrain.kernels.quantized_linear_decode import quantized_linear_decode_triton
from posttrain.kernels.quantized_linear_gemm import quantized_linear_gemm_triton
from posttrain.kernels.spec_verify_gpu import verify_draft_tokens_triton
from posttrain.kernels.spec_verify_tree_gpu import verify_draft_tree_triton

B, N, V = 3, 6, 20


def spread(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same values, two apart, ones between them."""
    if tensor is None or tensor.dim() == 0:
        return tensor
    apart = torch.ones(*tensor.shape, 2, dtype=tensor.dtype)
    apart[..., 0] = tensor
    return apart[..., 0]


def _stored(N: int) -> tuple:
    """A weight (N, 64), its nested blocks shorter than usual, so that there are several."""
    w = quantize_weight(torch.randn(N, 64), block_size=32, double_quant=False)
    return (w.packed, *double_quantize(w.absmax, 8))


def _linear(kernel):
    packed, absmax, nested, offset, nested_block = _stored(N)
    x, options = torch.randn(2, 64), (N, 64, 32, "nf4")
    return lambda packed, absmax, nested, bias: kernel(x, packed, absmax, nested, offset, nested_block, bias, *options), (
        packed, absmax, nested, torch.randn(N),
    )  # fmt: skip


def _dequantize():
    packed, absmax, nested, offset, nested_block = _stored(N)
    return lambda p, a, n: dequantize_4bit_triton(p, a, n, offset, nested_block, (N, 64), torch.float32, 32, "nf4"), (
        packed, absmax, nested,
    )  # fmt: skip


def _double_dequantize():
    _, codes, nested, offset, nested_block = _stored(N)
    return lambda codes, nested: double_dequantize_triton(codes, nested, offset, nested_block), (codes, nested)


def _up():
    s, b = torch.randn(2, 4), torch.randn(N, 4)
    return lambda bias: lora_linear_up_triton(s, b, 1.0, bias), (torch.randn(N),)


def _logit_rows():
    logits = torch.randn(B, V)
    return lambda labels: logit_rows_triton(logits.clone(), labels, -100, False, True), (torch.tensor([3, 7, 19]),)


def _multi_lora():
    x, A, B_, ids = torch.randn(B, 8), torch.randn(2, 4, 8), torch.randn(2, N, 4), torch.tensor([1, 0, 1])

    def run(scaling, ranks):
        y = torch.zeros(B, N)
        multi_lora_add_triton(y, x, A, B_, scaling, ranks, *segment_rows_triton(ids, 2, B))
        return y

    return run, (torch.tensor([2.0, 3.0]), torch.tensor([2, 4], dtype=torch.int32))


PARAMETERS = torch.tensor([[0.7, 5, 1.0], [1.0, 0, 0.9], [1.3, 0, 1.0]], dtype=torch.float64)


def _logit_filter():
    logits = torch.randn(B, V)
    return lambda parameters: logit_filter_triton(logits, 1.0, 0, 1.0, parameters), (PARAMETERS,)


def _verify(tree: bool, passed: bool):
    target, draft = torch.randn(B, 3, V), torch.randn(B, 3, V)
    tokens, num = torch.randint(0, V, (B, 2)), torch.tensor([2, 0, 2])
    noise = (torch.rand(B, 2), torch.randn(B, V), None, None) if passed else (None, None, torch.arange(B) + 5, torch.arange(B) + 9)

    def run(tokens, num, parameters, uniforms, gumbel, seeds, offsets):
        setting = (1.0, 0, 1.0, parameters)
        if tree:
            shape = (True, 2, uniforms, gumbel, 0, seeds, offsets)
            return verify_draft_tree_triton(tokens, torch.tensor([-1, 0]), target, draft, num, *setting, *shape)
        return verify_draft_tokens_triton(tokens, draft[:, :2], target, num, *setting, uniforms, gumbel, 0, seeds, offsets)

    return run, (tokens, num, PARAMETERS, *noise)


LAUNCHERS = {
    "decode": lambda: _linear(quantized_linear_decode_triton),
    "gemm": lambda: _linear(quantized_linear_gemm_triton),
    "dequantize": _dequantize,
    "double_dequantize": _double_dequantize,
    "lora_up": _up,
    "logit_rows": _logit_rows,
    "multi_lora": _multi_lora,
    "logit_filter": _logit_filter,
    "verify": lambda: _verify(False, False),
    "verify_passed": lambda: _verify(False, True),
    "verify_tree": lambda: _verify(True, False),
    "verify_tree_passed": lambda: _verify(True, True),
}


def _results(run, given) -> list[torch.Tensor]:
    found = run(*given)
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.interpret
@pytest.mark.parametrize("name", LAUNCHERS)
def test_interpreted_operands_of_any_stride(name):
    run, given = LAUNCHERS[name]()
    apart = [spread(tensor) for tensor in given]
    assert all(t is None or not t.is_contiguous() for t in apart)
    for ours, right in zip(_results(run, apart), _results(run, given), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.interpret
def test_interpreted_one_value_for_all():
    """`expand` holds one value: nothing lies behind it to be read."""
    run, (scaling, ranks) = _multi_lora()
    given = torch.tensor(2.0), torch.tensor(4, dtype=torch.int32)
    assert torch.equal(run(*(t.expand(2) for t in given)), run(*(t.repeat(2) for t in given)))
    run, given = _verify(False, False)
    given = (given[0], torch.tensor(2).expand(B), *given[2:])
    repeated = (given[0], torch.tensor([2, 2, 2]), *given[2:])
    assert all(torch.equal(a, b) for a, b in zip(_results(run, given), _results(run, repeated), strict=True))
