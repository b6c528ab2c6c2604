"""Rows with adapters of their own: the CPU's engine against the oracle and float64, each row against its adapter alone, errors."""

from __future__ import annotations

import four_bit
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from multi_lora_cases import MIXES, SHAPES, Case
from tolerance import assert_as_accurate

from posttrain.kernels import check_adapter_ids, multi_lora_linear, segment_rows
from posttrain.reference import multi_lora_linear as oracle

DTYPES = four_bit.DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantized", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, quantized, dtype):
    for ranked in (True, False):
        case = Case(*shape, dtype, quantized=quantized, ranked=ranked, bias=ranked)
        case.check(case.run())


def test_the_oracle_says_the_same():
    case = Case(6, 5, 7, 3, 4, torch.float64)
    case.A, case.B = case.A.nan_to_num(), case.B.nan_to_num()
    arrays = [t.numpy() for t in (case.x, case.w, case.A, case.B, case.scaling, case.ids, case.bias, case.ranks)]
    exact, _ = oracle.forward(*arrays)
    assert_as_accurate(case.expected()[0], case.expected()[0], exact)


@pytest.mark.parametrize("kind", MIXES)
def test_mixes(kind):
    for n in (1, 32, 256):
        case = Case(32, 48, 64, n, 8, torch.bfloat16, kind)
        case.check(case.run())


@given(
    M=st.integers(0, 40), N=st.integers(1, 20), K=st.integers(1, 40), n=st.integers(1, 6), r=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES), kind=st.sampled_from(MIXES), ranked=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_any_shape(M, N, K, n, r, dtype, kind, ranked, bias):
    case = Case(M, N, K, n, r, dtype, kind, ranked=ranked, bias=bias)
    case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantized", (False, True))
def test_each_row_equals_its_adapter_run_alone(dtype, quantized):
    """The same batch, all of it through one adapter: that adapter's rows are the mixed batch's, bit for bit."""
    case = Case(32, 80, 96, 8, 16, dtype, quantized=quantized)
    mixed = case.run()
    for i in range(-1, 8):
        alone = case.run(ids=torch.full((32,), i))
        assert torch.equal(mixed[case.ids == i], alone[case.ids == i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_low_rank_term_does_not_depend_on_the_batch(dtype):
    """With a base of zeros: any row alone, in any company and at any place is the same bits."""
    case = Case(37, 80, 200, 4, 16, dtype, "zipf", bias=False)
    case.w.zero_()
    whole, order = case.run(), torch.randperm(37)
    assert whole.any()
    assert torch.equal(case.run(order), whole[order])
    assert torch.equal(torch.cat([case.run(slice(m, m + 1)) for m in range(37)]), whole)


def test_rows_without_an_adapter_are_the_base():
    case = Case(9, 20, 64, 3, 4, torch.bfloat16)
    rows = case.ids < 0
    assert rows.any() and torch.equal(case.run()[rows], F.linear(case.x, case.w, case.bias)[rows])


def test_ids_of_sequences_hold_for_all_their_tokens():
    case = Case(24, 20, 64, 3, 4, torch.float32)
    x, ids = case.x.view(4, 2, 3, 64), torch.tensor([1, -1, 0, 2])
    rest = (case.w, case.A, case.B, case.scaling)
    each = multi_lora_linear(x, *rest, ids.repeat_interleave(6), case.bias, ranks=case.ranks)
    for shaped in (ids, ids[:, None].expand(4, 2), ids[:, None, None].expand(4, 2, 3), segment_rows(ids, 3, 24)):
        assert torch.equal(multi_lora_linear(x, *rest, shaped, case.bias, ranks=case.ranks), each)


def test_strided_inputs_equal_their_copies():
    case = Case(12, 20, 64, 3, 4, torch.bfloat16, ranked=False)
    rest = (case.scaling, case.ids)
    x, A, B = torch.randn(64, 24).bfloat16().T[::2], case.A.mT.contiguous().mT, case.B.mT.contiguous().mT
    assert not (x.is_contiguous() or A.is_contiguous() or B.is_contiguous())
    assert torch.equal(multi_lora_linear(x, case.w, A, B, *rest), multi_lora_linear(x.contiguous(), case.w, case.A, case.B, *rest))


def test_scalings_and_ranks_may_be_columns_of_a_table_or_one_value_for_all():
    case = Case(12, 20, 64, 3, 4, torch.bfloat16)
    whole = case.run()
    case.scaling, case.ranks = torch.stack([case.scaling, case.scaling.flip(0)], 1)[:, 0], torch.stack([case.ranks] * 2, 1)[:, 0]
    assert torch.equal(case.run(), whole)
    case.ranks, case.scaling = torch.tensor(2, dtype=torch.int32).expand(3), torch.tensor(1.5).expand(3)
    case.A, case.B = case.A.nan_to_num(), case.B.nan_to_num()
    whole = case.run()
    case.ranks, case.scaling = case.ranks.clone(), case.scaling.clone()
    assert torch.equal(case.run(), whole)


def test_nothing_to_do():
    case = Case(0, 5, 7, 2, 3, torch.float32)
    assert case.run().shape == (0, 5)
    none = multi_lora_linear(
        torch.ones(2, 7), case.w, torch.empty(0, 3, 7), torch.empty(0, 5, 3), torch.empty(0), torch.full((2,), -1)
    )
    assert torch.equal(none, F.linear(torch.ones(2, 7), case.w))


def test_inputs_are_left_alone():
    case = Case(8, 20, 64, 3, 4, torch.float32)
    before = [t.clone() for t in (case.x, case.A, case.B, case.w, case.bias, case.ids)]
    case.run()
    for old, new in zip(before, (case.x, case.A, case.B, case.w, case.bias, case.ids), strict=True):
        four_bit.assert_same(new, old)


@pytest.mark.parametrize("quantized", (False, True))
def test_opcheck(quantized):
    case = Case(3, 5, 64, 2, 4, torch.float32, quantized=quantized, ranked=False)
    base = case.w.tensors() if quantized else (case.w, None, None, None, 0)
    form = (64, "nf4") if quantized else (0, "none")
    arguments = (case.x, *base, case.A, case.B, case.scaling, None, case.ids, None, None, case.bias, 5, 64, *form)
    torch.library.opcheck(torch.ops.posttrain.multi_lora_linear, arguments)


def test_compiles_without_graph_breaks():
    case = Case(4, 6, 8, 2, 4, torch.float32, ranked=False)
    compiled = torch.compile(multi_lora_linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(case.x, case.w, case.A, case.B, case.scaling, case.ids), Case.run(_without_bias(case)))


def _without_bias(case: Case) -> Case:
    case.bias = None
    return case


# ---- errors


def test_a_gradient_is_refused_at_once():
    case = Case(4, 6, 8, 2, 4, torch.float32)
    case.A.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient.*torch.no_grad\(\).*lora_linear"):
        case.run()
    with torch.no_grad():
        case.run()


@pytest.mark.parametrize(("wrong", "known"), [(-2, r"to 3"), (4, r"to 3"), (2**40, r"to 3")])
def test_an_id_that_names_no_adapter_is_an_error(wrong, known):
    case = Case(5, 6, 8, 4, 4, torch.float32)
    case.ids[3] = wrong
    for check in (case.run, lambda: segment_rows(case.ids, 4), lambda: check_adapter_ids(case.ids, 4)):
        with pytest.raises(ValueError, match=rf"adapter_ids\[3\] is {wrong}; expected -1 \(the base alone\) {known}"):
            check()


@pytest.mark.parametrize("wrong", (-1, 5))
def test_a_rank_without_room_is_an_error(wrong):
    case = Case(5, 6, 8, 2, 4, torch.float32)
    case.ranks[1] = wrong
    with pytest.raises(ValueError, match=rf"ranks\[1\] is {wrong}; expected 0 to 4"):
        case.run()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(5, 7)}, ValueError, r"x \(5, 7\).*do not fit a weight of 6 x 8.*x \(\.\.\., 8\)"),
        ({"x": torch.ones(5, 8).double()}, TypeError, "x is torch.float64"),
        ({"w": torch.ones(6, 8).half()}, TypeError, "the weight is torch.float16.*expected torch.float32"),
        ({"w": [1]}, TypeError, "w is a list"),
        ({"w": torch.ones(6)}, ValueError, r"weight has shape \(6,\)"),
        ({"lora_A": torch.ones(4, 8)}, ValueError, r"lora_A \(4, 8\).*lora_A \(n, r, 8\)"),
        ({"lora_A": torch.ones(2, 4, 8).half()}, TypeError, "lora_A is torch.float16"),
        ({"lora_B": torch.ones(2, 6, 3)}, ValueError, r"lora_B \(2, 6, 3\).*lora_B \(n, 6, r\)"),
        ({"scaling": torch.ones(3)}, ValueError, r"scaling is torch.float32 \(3,\).*expected torch.float32 \(2,\)"),
        ({"scaling": torch.ones(2).half()}, TypeError, "scaling is torch.float16"),
        ({"ranks": torch.ones(2)}, TypeError, "ranks is torch.float32.*expected torch.int32"),
        ({"bias": torch.ones(5)}, ValueError, r"bias is torch.float32 \(5,\)"),
        ({"adapter_ids": torch.zeros(5)}, TypeError, "adapter_ids is torch.float32; expected int64"),
        ({"adapter_ids": torch.zeros(4).long()}, ValueError, r"adapter_ids has shape \(4,\).*\(5,\)"),
        ({"adapter_ids": segment_rows(torch.zeros(4).long(), 2)}, ValueError, "segments of 4 rows and 2 adapters, for x with 5"),
        ({"adapter_ids": segment_rows(torch.zeros(5).long(), 3)}, ValueError, "and 3 adapters, for x with 5 rows and 2 adapters"),
        ({"x": torch.ones(5, 8, device="meta")}, ValueError, "expected torch.float32.*on meta"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes, error, message):
    case = Case(5, 6, 8, 2, 4, torch.float32)
    arguments = {"x": case.x, "w": case.w, "lora_A": case.A, "lora_B": case.B, "scaling": case.scaling, "adapter_ids": case.ids}
    with pytest.raises(error, match=message):
        multi_lora_linear(**{**arguments, "bias": case.bias, "ranks": case.ranks, **changes})


def test_segments_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="3 adapter ids for 7 rows"):
        segment_rows(torch.zeros(3).long(), 2, 7)
    with pytest.raises(TypeError, match="adapter_ids is torch.int32"):
        segment_rows(torch.zeros(3).int(), 2)
