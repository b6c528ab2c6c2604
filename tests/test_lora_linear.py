"""lora_linear and lora_linear_group through the public functions, on the engine of this machine's CPU, against the oracle."""

from __future__ import annotations

import lora_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import SEED, case, check

from posttrain.kernels import lora_linear, lora_linear_group, quantize_weight, quantized_linear
from posttrain.reference import philox

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = ("none", "nf4")
HALF = torch.bfloat16


def run(c: lora_cases.Case) -> list[torch.Tensor]:
    """y and its gradients by lora_linear."""
    x, A, B, *bias = leaves = c.leaves()
    y = lora_linear(x, c.w, A, B, c.scaling, *bias, dropout=c.dropout, seed=SEED)
    return [y.detach(), *torch.autograd.grad(y, leaves, c.dy)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", (*WEIGHTS, "fp4"))
@pytest.mark.parametrize(
    ("lead", "N", "K", "r", "dropout"),
    [((1,), 200, 96, 8, 0.0), ((3, 17), 40, 65, 5, 0.0), ((130,), 96, 160, 16, 0.1), ((70,), 64, 127, 33, 0.5)],
)
def test_values_and_gradients(dtype, quant_type, lead, N, K, r, dropout):
    c = case(lead, N, K, r, dtype, quant_type, dropout=dropout)
    check(run(c), c)


@pytest.mark.parametrize("adapter", DTYPES)
def test_adapters_keep_their_dtype(adapter):
    c = case((40,), 64, 96, 8, torch.bfloat16, adapter=adapter, bias=False)
    check(run(c), c)


def _whole_numbers(c: lora_cases.Case, quant_type: str) -> lora_cases.Case:
    """Values on which every product and sum is exact: small whole numbers; in NF4 the weights -2, 0 and 2."""
    w = torch.randint(-1, 2, c.w.shape).float() * 2
    c.w = w if quant_type == "none" else quantize_weight(w, quant_type, 64, double_quant=False)
    for name in ("x", "lora_A", "lora_B", "dy"):
        setattr(c, name, torch.randint(-3, 4, getattr(c, name).shape).float())
    return c


@given(
    lead=st.lists(st.integers(0, 4), max_size=2).map(tuple), N=st.integers(1, 9), K=st.integers(1, 70), r=st.integers(1, 5),
    quant_type=st.sampled_from(WEIGHTS), dropout=st.sampled_from((0.0, 0.5)),
)  # fmt: skip
def test_any_shape(lead, N, K, r, quant_type, dropout):
    c = _whole_numbers(case(lead, N, K, r, torch.float32, quant_type, bias=False, dropout=dropout), quant_type)
    for ours, exact in zip(run(c), c.exact(), strict=True):
        assert torch.equal(ours.double(), exact)


def test_many_rows_of_whole_numbers():
    """Where the engine works in tiles: every row and column of them, with dropout."""
    c = _whole_numbers(case((300,), 70, 200, 9, torch.float32, dropout=0.5, bias=False), "nf4")
    for ours, exact in zip(run(c), c.exact(), strict=True):
        assert torch.equal(ours.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 12), (5, 7), (2, 3, 64)])
def test_dropout_is_the_oracle_bit_for_bit(dtype, shape):
    """With W = 0, A = B = 1 the layer is dropout itself, and its gradient drops the same elements."""
    K, dropout = shape[-1], 0.3
    x, eye = torch.randn(shape).to(dtype).requires_grad_(), torch.eye(K)
    y = lora_linear(x, torch.zeros(K, K, dtype=dtype), eye, eye, 1.0, dropout=dropout, seed=SEED)
    keep = torch.from_numpy(philox.keep(shape, dropout, SEED))
    factor = torch.tensor(1 / (1 - dropout), dtype=torch.float32)
    assert torch.equal(y, torch.where(keep, x.float() * factor, 0.0).to(dtype))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, torch.where(keep, factor, 0.0).to(dtype))


def test_a_seed_decides_and_without_one_torch_does():
    c = case((40,), 16, 64, 4, torch.float32, "none")
    arguments = (c.x, c.w, c.lora_A, c.lora_B, 1.0)
    torch.manual_seed(3)
    first, second = (lora_linear(*arguments, dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(lora_linear(*arguments, dropout=0.5), first) and not torch.equal(first, second)
    one, other = (lora_linear(*arguments, dropout=0.5, seed=seed) for seed in (1, 1 + 2**32))
    assert not torch.equal(one, other)  # the key's high word counts
    assert torch.equal(lora_linear(*arguments, dropout=0.0, seed=1), lora_linear(*arguments))


def test_gradcheck():
    """float64, which a dense weight takes on a CPU."""
    c = case((2, 3), 5, 6, 2, torch.float64, "none", dropout=0.4, adapter=torch.float64)
    weight = c.w.requires_grad_()

    def layer(x, weight, A, B, bias):
        return lora_linear(x, weight, A, B, 1.7, bias, dropout=c.dropout, seed=SEED)

    x, A, B, bias = c.leaves()
    assert torch.autograd.gradcheck(layer, (x, weight, A, B, bias))


@pytest.mark.parametrize("quant_type", WEIGHTS)
def test_saves_x_and_the_weight_and_writes_nothing(quant_type):
    c = case((70,), 32, 64, 4, torch.bfloat16, quant_type, dropout=0.1)
    x, A, B, bias = leaves = c.leaves()
    given_tensors = [*leaves, c.dy, *(t for t in c.base() if isinstance(t, torch.Tensor))]
    before, saved = [t.detach().clone() for t in given_tensors], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, c.w, A, B, 1.0, bias, dropout=0.1, seed=1)
    own = {t.data_ptr() for t in (x, A, B, *(t for t in c.base() if isinstance(t, torch.Tensor)))}
    assert {t.data_ptr() for t in saved} == own
    y.backward(c.dy, retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    y.backward(c.dy)  # accumulates
    for leaf, grad in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, grad + grad)
    assert all(torch.equal(t, old) for t, old in zip(given_tensors, before, strict=True))


def test_only_the_gradients_asked_for():
    c = case((4,), 6, 5, 2, torch.float32)
    for wanted in range(4):
        leaves = [t.detach() for t in c.leaves()]
        x, A, B, bias = leaves
        leaves[wanted].requires_grad_()
        lora_linear(x, c.w, A, B, c.scaling, bias).backward(c.dy)
        assert torch.equal(leaves[wanted].grad, run(c)[1 + wanted])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


def test_gradients_of_gradients_are_refused():
    c = case((4,), 6, 5, 2, torch.float32)
    x, A, B, bias = c.leaves()
    for y in (lora_linear(x, c.w, A, B, 1.0), lora_linear_group(x, [(c.w, A, B, 1.0, None)])[0]):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            dx.sum().backward()


def test_strided_x_equals_its_copy():
    c = case((1,), 9, 64, 3, torch.float32)
    base = torch.randn(64, 128)
    for x in (base[:, ::2], base[::3, 5:69], base[:, 64:].T, base[:1, :64].expand(4, 64), base.view(8, 8, 128)[:, ::2, :64]):
        strided, copy = (lora_linear(t, c.w, c.lora_A, c.lora_B, 1.0, dropout=0.5, seed=1) for t in (x, x.contiguous()))
        assert torch.equal(strided, copy)


# ---- groups


@pytest.mark.parametrize("quant_type", WEIGHTS)
@pytest.mark.parametrize("bias", ("all", "one", "none"))
@pytest.mark.parametrize("dropout", (0.0, 0.25))
def test_a_group_is_its_layers(quant_type, bias, dropout):
    cs = [case((70,), N, 96, r, torch.float32, quant_type, bias=bias != "none") for N, r in ((40, 4), (8, 4), (16, 7))]
    if bias == "one":
        cs[0].bias = cs[2].bias = None
    for c in cs:
        c.x, c.dropout = cs[0].x, dropout
        _whole_numbers(c, quant_type)
        c.x, c.bias = cs[0].x, None if c.bias is None else c.bias.round()
    x, layers = cs[0].x.clone().requires_grad_(), []
    for c in cs:
        _, A, B, *b = c.leaves()
        layers.append((c.w, A, B, c.scaling, b[0] if b else None))
    ys = lora_linear_group(x, layers, dropout=dropout, seed=SEED)
    torch.autograd.backward(ys, [c.dy for c in cs])
    alone = [run(c) for c in cs]
    assert all(torch.equal(y, one[0]) for y, one in zip(ys, alone, strict=True))
    assert torch.equal(x.grad, sum(one[1] for one in alone))
    for (_, A, B, _, b), one in zip(layers, alone, strict=True):
        grads = [t.grad for t in (A, B, b) if t is not None]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, one[2:], strict=True))


def test_an_unused_layer_of_a_group_gets_zero_gradients():
    c = case((4,), 6, 5, 2, torch.float32, bias=False)
    (x, A, B), (_, C, D) = c.leaves(), c.leaves()
    used, _ = lora_linear_group(x, [(c.w, A, B, c.scaling, None), (c.w, C, D, 1.0, None)])
    used.backward(c.dy)
    assert not C.grad.any() and not D.grad.any() and torch.equal(A.grad, run(c)[2])


def test_groups_of_none_and_of_different_kinds():
    x, A, B = torch.ones(2, 64), torch.ones(1, 64), torch.ones(3, 1)
    assert lora_linear_group(x, []) == []
    with pytest.raises(ValueError, match="different kinds"):
        lora_linear_group(x, [(torch.ones(3, 64), A, B, 1.0, None), (quantize_weight(torch.ones(3, 64)), A, B, 1.0, None)])


# ---- registration


@pytest.mark.parametrize("quant_type", WEIGHTS)
@pytest.mark.parametrize("bias", (True, False))
def test_opcheck(quant_type, bias):
    c = case((2, 3), 24, 65, 3, torch.float32, quant_type, bias=bias)
    x, A, B, *b = c.leaves()
    rest = (0.25, SEED, *c.format())
    torch.library.opcheck(torch.ops.posttrain.lora_linear, (x, *c.base(), A, B, 2.0, b[0] if b else None, *rest))
    plain = [t.detach() for t in (x, A, B)]
    backward = (c.dy, plain[0], *c.base(), *plain[1:], 2.0, *rest)
    torch.library.opcheck(torch.ops.posttrain.lora_linear_backward, (*backward, True, bias, True))
    lists = [[t, t] if t is not None else [] for t in c.base()[:4]]
    rest = (0.25, SEED, [24, 24], *c.format()[1:])
    torch.library.opcheck(torch.ops.posttrain.lora_linear_group, (x, *lists, c.base()[4], [A, A], [B, B], [2.0, 1.0], b * 2, *rest))
    backward = ([c.dy, c.dy], plain[0], *lists, c.base()[4], *([t, t] for t in plain[1:]), [2.0, 1.0], *rest)
    torch.library.opcheck(torch.ops.posttrain.lora_linear_group_backward, (*backward, True, True, bias))


@pytest.mark.parametrize("quant_type", WEIGHTS)
def test_compiles_whole(quant_type):
    c = case((4,), 24, 96, 3, torch.float32, quant_type)
    leaves = c.leaves()

    def step(x, A, B, bias):
        y = lora_linear(x.mul(2), c.w, A, B, 2.0, bias, dropout=0.25, seed=5)
        return sum(z.square().sum() for z in (y, *lora_linear_group(x, [(c.w, A, B, 2.0, bias), (c.w, A, B, 1.0, None)])))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("shape", ((6,), (2, 3), ()))
@pytest.mark.parametrize("quant_type", WEIGHTS)
def test_the_results_may_be_written_to(quant_type, shape):
    """As F.linear's, by a residual or an activation in place; of a group each result by itself."""
    c = case(shape, 24, 96, 3, torch.float32, quant_type)
    x, A, B, bias = c.leaves()

    def results():
        group = lora_linear_group(x, [(c.w, A, B, 2.0, bias), (c.w, A, B, 1.0, None)])
        return [lora_linear(x, c.w, A, B, 2.0, bias), *group, *([] if quant_type == "none" else [quantized_linear(x, c.w)])]

    for written, kept in zip(results(), results(), strict=True):
        expected = (kept + 1).relu()
        written += 1
        assert torch.equal(written.relu_(), expected)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (written, expected)))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "w is a list; expected a tensor", {"w": [1]}),
        (ValueError, r"shape \(320,\); a linear layer's is \(out, in\)", {"w": quantize_weight(torch.ones(320))}),
        (ValueError, r"do not fit a weight of 5 x 64: expected x \(..., 64\)", {"x": torch.ones(2, 63)}),
        (ValueError, "do not fit a weight", {"lora_A": torch.ones(3, 63)}),
        (ValueError, "do not fit a weight", {"lora_B": torch.ones(5, 4)}),
        (ValueError, "do not fit a weight", {"lora_A": torch.ones(64)}),
        (TypeError, "x is torch.float64; expected", {"x": torch.ones(2, 64, dtype=torch.double)}),
        (TypeError, "the weight is torch.float32 and x torch.bfloat16", {"w": torch.ones(5, 64), "x": torch.ones(2, 64).to(HALF)}),
        (TypeError, "lora_A is torch.int64", {"lora_A": torch.ones(3, 64, dtype=torch.long)}),
        (ValueError, "x is on meta, the weight on cpu", {"x": torch.ones(2, 64, device="meta")}),
        (ValueError, "lora_A on cpu and lora_B on meta; move them to one device", {"lora_B": torch.ones(5, 3, device="meta")}),
        (ValueError, r"bias is torch.float32 \(6,\) on cpu; expected torch.float32 \(5,\)", {"bias": torch.ones(6)}),
        (ValueError, "dropout is 1.0; expected 0 <= dropout < 1", {"dropout": 1.0}),
        (ValueError, r"seed is 9223372036854775808; expected a whole number from -2\^63", {"dropout": 0.5, "seed": 2**63}),
        (TypeError, "scaling is a tensor that requires its gradient", {"scaling": torch.tensor(2.0, requires_grad=True)}),
        (ValueError, "rank 0", {"lora_A": torch.ones(0, 64), "lora_B": torch.ones(5, 0)}),
    ],
)
def test_errors(error, match, change):
    arguments = {"x": torch.ones(2, 64), "w": quantize_weight(torch.ones(5, 64)), "scaling": 1.0}
    arguments |= {"lora_A": torch.ones(3, 64), "lora_B": torch.ones(5, 3)}
    with pytest.raises(error, match=match):
        lora_linear(**arguments | change)
