"""The native engine's lora_linear: against float64 in every way it is computed, its dropout against the PyTorch engine's bits,
groups against their layers alone, and any number of threads."""

from __future__ import annotations

import random

import pytest
import torch

from posttrain.kernels import quantize_weight
from posttrain.kernels.cpu import pytorch_lora

native = pytest.importorskip("posttrain.kernels.cpu.native", reason="the native extension was not built")
native_lora = pytest.importorskip("posttrain.kernels.cpu.native_lora")
native_many = pytest.importorskip("posttrain.kernels.cpu.native_many")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (M, N, K, r): few rows; then, for the tiles of AMX, tails of 16 and 32 in every dimension, ranks around a tile and a step of 32,
# depths beyond one pass (K, N > 24 * 32), more rows than one thread packs at a time
# few rows: whole groups of 128 columns and not, more columns than one run of A (1024), more rows of B than 64 parts of 64 hold
FEW = [(1, 32, 64, 8), (3, 33, 65, 1), (64, 40, 320, 17), (2, 50, 1152, 33), (1, 4500, 64, 5), (20, 40, 96, 7)]
MANY = [(64, 32, 32, 8), (65, 33, 33, 3), (100, 192, 576, 16), (77, 64, 800, 33), (130, 801, 100, 64), (1100, 48, 64, 8)]


class Errors:
    """Squared relative distances from float64 of our results and of the PyTorch engine's, by what they are (y, dX, dA, dB), added
    up over many cases, since a few roundings may fall either way: ours may be at most twice as far."""

    def __init__(self):
        self.ours, self.plain = [0.0] * 4, [0.0] * 4

    def add(self, which: int, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
        assert got.dtype == plain.dtype and got.shape == exact.shape and got.isfinite().all()
        size = exact.square().sum().item() or 1.0
        self.ours[which] += (got.double() - exact).square().sum().item() / size
        self.plain[which] += (plain.double() - exact).square().sum().item() / size

    def check(self) -> None:
        for name, ours, plain in zip(("y", "dX", "dA", "dB"), self.ours, self.plain, strict=True):
            assert ours**0.5 <= 2 * plain**0.5, (name, ours, plain)


class Case:
    """Random operands of one layer, or of one more layer on another's x."""

    def __init__(self, M, N, K, r, dtype=torch.bfloat16, kind="none", dropout=0.0, x=None, adapter_dtype=torch.float32):
        self.M, self.N, self.K, self.dropout, self.seed, self.scaling = M, N, K, dropout, 2**40 + 7, 0.7
        self.x = torch.randn(M, K).to(dtype) if x is None else x
        w = (torch.randn(N, K) * K**-0.5).to(dtype)
        self.A, self.B = (torch.randn(r, K) * K**-0.5).to(adapter_dtype), torch.randn(N, r).to(adapter_dtype)
        self.bias, self.dy = torch.randn(N).to(dtype), torch.randn(M, N).to(dtype)
        if kind == "none":
            self.base, self.w = (w, None, None, None, 0, 0, kind), w
        else:
            packed = quantize_weight(w, kind, 64)
            self.base, self.w = (*packed.tensors(), 64, kind), packed.dequantize()

    def forward(self, engine):
        arguments = (self.A, self.B, self.scaling, self.bias, self.dropout, self.seed, self.N, self.K)
        return engine.lora_linear(self.x, *self.base[:5], *arguments, *self.base[5:])

    def backward(self, engine, *needs):
        arguments = (self.A, self.B, self.scaling, self.dropout, self.seed, self.N, self.K)
        return engine.lora_linear_backward(self.dy, self.x, *self.base[:5], *arguments, *self.base[5:], *needs)

    def exact(self):
        """(y, dX, dA, dB) in float64."""
        x, w, A, B, dy = (t.double() for t in (self.x, self.w, self.A, self.B, self.dy))
        kept = pytorch_lora.dropout(torch.ones_like(x), self.dropout, self.seed)
        dropped, V = x * kept, self.scaling * dy @ B
        y = x @ w.t() + self.bias.double() + self.scaling * (dropped @ A.t()) @ B.t()
        return y, dy @ w + kept * (V @ A), V.t() @ dropped, self.scaling * dy.t() @ (dropped @ A.t())

    def add_to(self, errors: Errors) -> None:
        got = (self.forward(native_lora), *self.backward(native_lora, True, True, True))
        plain = (self.forward(pytorch_lora), *self.backward(pytorch_lora, True, True, True))
        for which, results in enumerate(zip(got, plain, self.exact(), strict=True)):
            errors.add(which, *results)


@pytest.fixture
def our_base(request, monkeypatch):
    """Few shapes here have the rows at which the base product is ours too: with `request.param` all that have many."""
    if request.param:
        monkeypatch.setattr(native_many, "_PRODUCT_ROWS", 0)


@pytest.mark.parametrize("kind", ["none", "nf4", "fp4"])
@pytest.mark.parametrize(
    "shapes, our_base",
    [(FEW, False), (MANY, False), (MANY, True)],
    ids=["few rows", "many rows", "our base"],
    indirect=["our_base"],
)
def test_against_float64(shapes, our_base, kind):
    for dropout in (0.0, 0.3):
        errors = Errors()
        for shape in shapes:
            Case(*shape, kind=kind, dropout=dropout).add_to(errors)
        errors.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes(dtype):
    errors = Errors()
    for shape in (*FEW, (80, 33, 40, 5)):
        for adapter_dtype in DTYPES:
            Case(*shape, dtype=dtype, adapter_dtype=adapter_dtype, kind="nf4").add_to(errors)
    errors.check()


@pytest.mark.parametrize("engine", [native_lora, pytorch_lora])
def test_the_scaling_is_rounded_into_no_factor(engine):
    """Factors in half precision on a layer in float32, as PEFT trains them with autocast_adapter_dtype=False: beside what anybody
    would write."""
    for M in (3, 40, 70):
        for scaling in (1 / 3, 37.0):
            errors = Errors()
            case = Case(M, 48, 64, 8, dtype=torch.float32, adapter_dtype=torch.float16)
            case.scaling, case.A = scaling, case.A / 64
            x, w, A, B = (t.detach().clone().requires_grad_() for t in (case.x, case.w, case.A, case.B))
            y = x @ w.t() + case.bias + scaling * (x @ A.float().t()) @ B.float().t()
            plain = (y.detach(), *torch.autograd.grad(y, (x, A, B), case.dy))
            got = (case.forward(engine), *case.backward(engine, True, True, True))
            for which, results in enumerate(zip(got, plain, case.exact(), strict=True)):
                errors.add(which, *results)
            errors.check()


@pytest.fixture
def isa(request):
    native.set_isa(request.param)
    yield
    native.set_isa()


@pytest.mark.parametrize("isa", native.levels(), indirect=True)
def test_few_rows_on_every_instruction_set(isa):
    for dtype in (torch.float32, torch.bfloat16):
        errors, generator = Errors(), random.Random(1)
        for _ in range(12):
            M, N, r = (generator.randint(1, most) for most in (5, 200, 70))
            K = generator.choice([generator.randint(1, 300), 64 * generator.randint(1, 20)])
            adapter_dtype = generator.choice(DTYPES)
            Case(M, N, K, r, dtype=dtype, kind=generator.choice(["none", "nf4"]), adapter_dtype=adapter_dtype).add_to(errors)
        errors.check()


def test_any_shape(monkeypatch):
    errors, generator = Errors(), random.Random(0)
    for i in range(30):
        monkeypatch.setattr(native_many, "_PRODUCT_ROWS", i % 2 * 256)
        M, N, K, r = (generator.randint(1, most) for most in (140, 130, 130, 70))
        Case(M, N, K, r, kind=generator.choice(["none", "nf4"]), dropout=generator.choice([0.0, 0.5])).add_to(errors)
    errors.check()


def test_no_rows():
    y, (dx, dA, dB) = (case := Case(0, 5, 7, 3)).forward(native_lora), case.backward(native_lora, True, True, True)
    assert y.shape == (0, 5) and dx.shape == (0, 7) and not dA.any() and not dB.any()


@pytest.mark.parametrize("M, our_base", [(70, False), (70, True), (3, False)], indirect=["our_base"])
def test_only_what_is_needed(M, our_base):
    case = Case(M, 48, 64, 8)
    whole = case.backward(native_lora, True, True, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True), (True, True, False)):
        for needed, part, all_of_it in zip(needs, case.backward(native_lora, *needs), whole, strict=True):
            assert torch.equal(part, all_of_it) if needed else part.numel() == 0


def test_dropout_has_the_bits_of_the_pytorch_engine():
    for n in (0, 1, 63, 64, 65, 1000):
        for dtype in DTYPES:
            x = torch.randn(n).to(dtype)
            for p in (1e-3, 0.5, 0.999):
                for seed in (0, 5, 2**63 - 1):
                    assert torch.equal(native_lora._dropped(x, p, seed), pytorch_lora.dropout(x, p, seed))


def test_philox_is_the_published_one():
    """Random123's known answer for counter 0, key 0."""
    assert pytorch_lora.philox_words(4, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize(
    "M, kind, our_base",
    [(96, "none", False), (96, "none", True), (96, "nf4", True), (3, "none", False), (1, "nf4", False)],
    indirect=["our_base"],
)
def test_a_group_is_its_layers(M, kind, our_base):
    errors = Errors()
    # the ranks: in one step of 32, filling it, each layer beginning a step of its own, more layers than one product takes
    for ranks in ((8, 8, 8), (5, 16, 11), (8, 40, 33), (4, 4, 4, 4, 4)):
        for dropout in (0.0, 0.2):
            first = Case(M, 64, 96, ranks[0], kind=kind, dropout=dropout)
            cases = [first] + [Case(M, 32 * i + 33, 96, r, kind=kind, dropout=dropout, x=first.x) for i, r in enumerate(ranks[1:])]
            layers = [[getattr(c, name) for c in cases] for name in ("base", "A", "B", "scaling")]
            biases, dys, Ns = ([getattr(c, name) for c in cases] for name in ("bias", "dy", "N"))
            rest = (dropout, first.seed, Ns, 96)
            results = []
            for engine in (native_lora, pytorch_lora):
                ys = engine.lora_linear_group(first.x, *layers, biases, *rest)
                results.append((ys, *engine.lora_linear_group_backward(dys, first.x, *layers, *rest, True, True, True)))
            exact = [case.exact() for case in cases]
            ours, plain = results
            errors.add(1, ours[1], plain[1], sum(e[1] for e in exact))
            for which in (0, 2, 3):
                for i, e in enumerate(exact):
                    errors.add(which, ours[which][i], plain[which][i], e[which])
    errors.check()


@pytest.mark.parametrize("M, our_base", [(80, False), (80, True), (2, False)], indirect=["our_base"])
def test_strided_operands(M, our_base):
    case = Case(M, 48, 64, 8, kind="nf4")
    expected = (case.forward(native_lora), *case.backward(native_lora, True, True, True))
    for name in ("x", "dy", "A", "B"):
        setattr(case, name, getattr(case, name).t().contiguous().t())
    got = (case.forward(native_lora), *case.backward(native_lora, True, True, True))
    for ours, contiguous in zip(got, expected, strict=True):
        assert torch.equal(ours, contiguous)


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    for shape in ((1, 33, 64, 8), (2, 4500, 128, 40), (600, 513, 640, 8), (270, 65, 96, 8), (70, 96, 64, 40)):
        case, results = Case(*shape, kind="nf4", dropout=0.1), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((case.forward(native_lora), *case.backward(native_lora, True, True, True)))
        torch.set_num_threads(before)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape, our_base", [((70, 40, 33, 3), False), ((70, 40, 33, 3), True), ((2, 40, 64, 3), False)], indirect=["our_base"]
)
def test_what_is_poisoned_stays_in_its_row(shape, our_base):
    """Padding is of zeros: a NaN beside it or in another row must not come in through them."""
    case = Case(*shape, kind="none" if shape[2] % 64 else "nf4")
    case.x[1, -1] = float("nan")
    y = case.forward(native_lora)
    assert y[1].isnan().all() and y[:1].isfinite().all() and y[2:].isfinite().all()
