"""Speculative verification of trees: engines against the oracle, chains as trees, the emitted distribution, and the attention."""

from __future__ import annotations

import math
import random

import four_bit
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spec_cases import DTYPES, chi_square, draw, noise, probabilities, ragged_case

from posttrain.kernels import tree_attention, verify_draft_tokens, verify_draft_tree
from posttrain.kernels.cpu import pytorch_spec_verify as engine
from posttrain.kernels.spec_verify_tree_gpu import tree_attention_triton, verify_draft_tree_triton
from posttrain.reference import spec_verify as oracle


def _tree(seed: int, dtype=torch.float64, V: int | None = None):
    """(tokens, parents, target, draft | None, num) and a setting: up to 7 nodes, words that come twice, ids that are none."""
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    B, N, V = r.choice((1, 3)), r.randint(0, 7), V or r.choice((1, 3, 8, 40))
    narrow = max(1, V - r.choice((0, 0, 2)))
    parents = torch.tensor([[r.randint(-1, i - 1) for i in range(N)] for _ in range(B)], dtype=torch.int64).view(B, N)
    target = torch.randn(B, N + 1, V, generator=generator).to(dtype)
    draft = (target[..., :narrow].double() + torch.randn(B, N + 1, narrow, generator=generator)).to(dtype)
    rows = target if r.random() < 0.3 else draft
    rows = rows.gather(1, (parents + 1)[..., None].expand(B, N, rows.shape[2]))
    setting = (r.choice((0.0, 0.7, 1.0)), r.choice((0, 0, 4)), r.choice((1.0, 0.9)))
    tokens = draw(rows, generator=generator) if N else torch.zeros(B, 0, dtype=torch.int64)
    tokens[torch.rand(B, N, generator=generator) < 0.1] = -1
    num = torch.randint(0, N + 1, (B,), generator=generator)
    return (tokens, parents, target, draft if r.random() < 0.6 else None, num), setting, r.random() < 0.5


def _by_oracle(given, setting, with_replacement, uniforms, gumbel):
    tokens, parents, target, draft, num = given
    B, N = tokens.shape
    out, path = torch.full((B, N + 1), -1), torch.full((B, N), -1)
    for b in range(B):
        n, rows = int(num[b]), None if draft is None else draft[b].double().numpy()
        emitted, nodes = oracle.verify_tree(
            tokens[b, :n].tolist(), parents[b, :n].tolist(), target[b].double().numpy(), rows, *setting, uniforms[b].tolist(),
            gumbel[b].tolist(), with_replacement,
        )  # fmt: skip
        out[b, : len(emitted)], path[b, : len(nodes)] = torch.tensor(emitted), torch.tensor(nodes, dtype=torch.int64)
    return out, (path >= 0).sum(1), path


def test_by_hand():
    """Two children of the root, p = (4, 3, 2, 1) / 10. Chosen: word 0 is kept below 0.4, else word 1 below 0.3 / 0.6. Drawn from
    q = 1/4 each: word 3 below 0.4; then p becomes (3, 1, 0, 0) / 20 over its sum, (3/4, 1/4, 0, 0), and a word 1 is certain."""
    p, q = np.log([[0.4, 0.3, 0.2, 0.1]] * 3), np.zeros((3, 4))
    flat = [0.0] * 4

    def tried(children, draft, u, replaced=True):
        return oracle.verify_tree(children, [-1, -1], p, draft, 1.0, 0, 1.0, u, flat, replaced)

    assert tried([0, 1], None, [0.39, 0.9]) == ([0, 0], [0])
    assert tried([0, 1], None, [0.41, 0.49]) == ([1, 0], [1])
    assert tried([0, 1], None, [0.41, 0.51]) == ([2], [])
    assert tried([3, 1], q, [0.39, 0.9]) == ([3, 0], [0])
    assert tried([3, 1], q, [0.41, 0.99]) == ([1, 0], [1])
    assert tried([3, 2], q, [0.41, 0.0]) == ([0], [])
    # without replacement q is 1/3 each after word 3, and word 1 is kept below (1/4) / (1/3)
    assert tried([3, 1], q, [0.41, 0.74], False) == ([1, 0], [1])
    assert tried([3, 1], q, [0.41, 0.76], False) == ([0], [])


@pytest.mark.parametrize("seed", range(40))
def test_float64_is_the_oracle_s(seed):
    given, setting, replaced = _tree(seed)
    made = noise(*given[0].shape, given[2].shape[2])
    expected = _by_oracle(given, setting, replaced, **made)
    ours = verify_draft_tree(*given, *setting, with_replacement=replaced, **made)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@given(st.integers(0, 2**32), st.sampled_from(DTYPES))
def test_any_tree_in_any_dtype(seed, dtype):
    given, setting, replaced = _tree(seed, dtype)
    made = noise(*given[0].shape, given[2].shape[2], generator=torch.Generator().manual_seed(seed))
    expected = _by_oracle(given, setting, replaced, **made)
    ours = verify_draft_tree(*given, *setting, with_replacement=replaced, **made)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_a_chain_is_a_tree(seed):
    """With the same noise, passed or made, and whether children are drawn with replacement or not."""
    drafted, draft, target, num, setting = ragged_case(seed, torch.float32)
    K = drafted.shape[1]
    rows = None if draft is None else torch.cat([draft, draft[:, :1] if K else draft.new_zeros(len(draft), 1, draft.shape[2])], 1)
    chain = verify_draft_tokens(drafted, draft, target, num, *setting, seed=seed, offsets=3)
    for replaced in (True, False):
        tree = verify_draft_tree(
            drafted, torch.arange(K) - 1, target, rows, num, *setting, with_replacement=replaced, seed=seed, offsets=3
        )
        assert torch.equal(tree[0], chain[0]) and torch.equal(tree[1], chain[1])
        assert torch.equal(tree[2], torch.arange(K).where(torch.arange(K) < chain[1][:, None], -1))


def _first_tokens(kind: str, N: int, mistake: str | None = None):
    """Three children of the root: first tokens of N requests, and p."""
    generator = torch.Generator().manual_seed(7)
    target = 1.5 * torch.randn(6, generator=generator).double()
    draft = torch.randn(6, generator=generator).double() - (0.7 if kind == "chosen" else 1.5) * target
    if kind == "chosen":
        children = draft.topk(3).indices.expand(N, 3)
    elif kind == "drawn":
        children = draw(draft.expand(N, 3, 6), generator=generator)
    else:
        children = torch.multinomial(probabilities(draft).expand(N, 6), 3, generator=generator)
    replaced = (kind == "drawn") != (mistake == "the other replacement")
    rows = None if kind == "chosen" and mistake is None else draft.expand(N, 4, 6)
    made = noise(N, 3, 6, generator=generator)
    if mistake == "one u for all siblings":
        made["uniforms"] = made["uniforms"][:, :1].expand(N, 3)
    tokens, n, _ = verify_draft_tree(
        children, torch.full((3,), -1), target.expand(N, 4, 6), rows, torch.full((N,), 3), with_replacement=replaced, **made
    )
    return tokens[:, 0], n, probabilities(target)


@pytest.mark.parametrize("kind", ("chosen", "drawn", "drawn once"))
def test_the_first_token_is_the_target_s(kind):
    tokens, n, p = _first_tokens(kind, 3_000)
    statistic, limit = chi_square(tokens.bincount(minlength=6), len(tokens) * p)
    assert statistic < limit
    assert 0 < n.double().mean() < 1


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("drawn once", "the other replacement"),
        ("chosen", "q of children that were not drawn"),
        ("chosen", "one u for all siblings"),
    ],
)
def test_the_first_token_finds(kind, mistake):
    tokens, _, p = _first_tokens(kind, 3_000, mistake)
    statistic, limit = chi_square(tokens.bincount(minlength=6), len(tokens) * p)
    assert statistic > limit


def test_greedy_takes_the_longest_path_of_argmaxes():
    """Child 1 is the argmax of the root, node 3 of it; padding behind num is not looked at, though its word is the argmax 0."""
    target = torch.full((1, 6, 4), -1.0)
    for row, best in enumerate((2, 1, 3, 0, 0, 0)):
        target[0, row, best] = 1.0
    tokens, parents = torch.tensor([[1, 2, 0, 3, 0]]), torch.tensor([-1, -1, 0, 1, 3])
    emitted, n, path = verify_draft_tree(tokens, parents, target, None, torch.tensor([4]), 0.0)
    assert emitted.tolist() == [[2, 3, 0, -1, -1, -1]] and n.tolist() == [2] and path.tolist() == [[1, 3, -1, -1, -1]]
    emitted, n, path = verify_draft_tree(tokens, parents, target, None, torch.tensor([4]), 0.0, max_depth=1)
    assert emitted.tolist() == [[2, 3]] and n.tolist() == [1] and path.tolist() == [[1]]


@given(st.lists(st.integers(0, 100), max_size=12))
def test_attention(choices):
    parents = torch.tensor([choice % (i + 1) - 1 for i, choice in enumerate(choices)], dtype=torch.int64)
    mask, depth = tree_attention(parents)
    expected_mask, expected_depth = oracle.tree_attention(parents.tolist())
    assert torch.equal(mask, torch.from_numpy(expected_mask)) and torch.equal(depth, torch.from_numpy(expected_depth))
    both = tree_attention(torch.stack([parents, parents]))
    assert torch.equal(both[0][1], mask) and torch.equal(both[1][0], depth)


def test_errors():
    given = [torch.zeros(1, 2, dtype=torch.int64), torch.tensor([-1, 0]), torch.zeros(1, 3, 4), None, torch.tensor([2])]
    verify_draft_tree(*given)
    for at, value, message in (
        (1, torch.tensor([-1, 1]), "the parent of node 1 of request 0 is 1; expected -1"),
        (4, torch.tensor([3]), r"num_nodes is \[3\]; expected 0 to 2"),
        (3, torch.zeros(1, 2, 4), r"draft_logits are \(1, 2, 4\); expected \(1, 3, V'\)"),
        (2, torch.zeros(1, 2, 4), "a row more than drafts"),
        (2, torch.full((1, 3, 4), math.nan), "hold no finite number after 0 accepted"),
    ):
        with pytest.raises(ValueError, match=message):
            verify_draft_tree(*given[:at], value, *given[at + 1 :])
    with pytest.raises(TypeError, match="parents is torch.float32"):
        verify_draft_tree(given[0], torch.zeros(2), *given[2:])
    with pytest.raises(ValueError, match="parents are torch.float32"):
        tree_attention(torch.zeros(2))


def test_opcheck():
    given, _, _ = _tree(3, torch.float32)
    tokens, parents, target, draft, num = given
    made = noise(*tokens.shape, target.shape[2])
    torch.library.opcheck(
        torch.ops.posttrain.verify_draft_tree,
        (
            tokens,
            parents,
            target,
            draft,
            num,
            0.8,
            0,
            0.9,
            None,
            True,
            tokens.shape[1],
            made["uniforms"],
            made["gumbel"],
            0,
            None,
            None,
        ),
    )
    torch.library.opcheck(torch.ops.posttrain.tree_attention, (parents,))


# What runs on a GPU, against the PyTorch engine, which is the oracle's equal.


def _check(tree, kinds, setting, V: int, dtype: torch.dtype, passed: bool) -> None:
    generator = torch.Generator().manual_seed(V)
    parents = torch.tensor([-1, -1, -1, 0, 0, 1, 3])
    B, N = 4, len(parents)
    target = (2 * torch.randn(B, N + 1, V, generator=generator)).to(dtype)
    draft = (target.float() + torch.randn(B, N + 1, V, generator=generator))[..., : V - V // 8].to(dtype)
    num = torch.tensor([N, N, 3, 0])
    made = noise(B, N, V, torch.float32, generator)
    for kind in kinds:
        rows = (draft if kind != "chosen" else target)[:, parents + 1]
        tokens = draw(rows, generator=generator) if kind != "chosen" else (rows.float() + 1).argsort(2, descending=True)[..., 0]
        tokens[1, 0] = -1
        options = (None, kind == "drawn", N, *((made["uniforms"], made["gumbel"]) if passed else (None, None)), 5, None, None)
        given = (tokens, parents, target, None if kind == "chosen" else draft, num, *setting, *options)
        expected = engine.verify_draft_tree(*given)
        assert all(torch.equal(a, b) for a, b in zip(tree(*given), expected, strict=True)), kind


@pytest.mark.interpret
@pytest.mark.parametrize(("kind", "setting"), [("drawn", (1.0, 0, 1.0)), ("drawn once", (0.8, 20, 0.9)), ("chosen", (0.8, 0, 0.9))])
def test_interpreted(kind, setting):
    _check(verify_draft_tree_triton, (kind,), setting, 65, torch.float32, kind == "drawn")


@pytest.mark.interpret
def test_interpreted_words_left_after_a_sure_draft():
    """Without replacement, word 0 having all but 1e-9 of q: refused, it leaves word 1 all of q and of p (test_cpu_spec_verify)."""
    N, p, q = 16, torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, -20.7])
    given = torch.tensor([[0, 1]]).expand(N, 2), torch.tensor([[-1, -1]]).expand(N, 2), p.expand(N, 3, 2), q.expand(N, 3, 2)
    uniforms = torch.linspace(0, 1, 2 * N + 1)[1::2, None].expand(N, 2)
    options = (1.0, 0, 1.0, None, False, 1, uniforms, None, 5, None, None)
    tokens, num_accepted, _ = verify_draft_tree_triton(*given, torch.full((N,), 2), *options)
    assert (num_accepted == 1).all() and tokens[:, 0].tolist() == [0] * (N // 2) + [1] * (N // 2)


@pytest.mark.interpret
def test_attention_interpreted():
    parents = torch.tensor([[-1, 0, 0, 1], [-1, -1, 1, 2]])
    assert all(torch.equal(a, b) for a, b in zip(tree_attention_triton(parents), engine.tree_attention(parents), strict=True))


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("arch", "kind", "setting", "dtype"),
    [
        (80, "drawn", (1.0, 0, 1.0), torch.bfloat16), (90, "drawn once", (0.8, 20, 0.9), torch.bfloat16),
        (80, "chosen", (0.8, 20, 0.9), torch.float32), (90, "chosen", (0.0, 0, 1.0), torch.float16),
    ],
)  # fmt: skip
def test_emulated(arch, kind, setting, dtype):
    four_bit.activate(arch)
    _check(verify_draft_tree_triton, (kind,), setting, 3000, dtype, False)


@pytest.mark.emulated
def test_attention_emulated():
    four_bit.activate(80)
    test_attention_interpreted()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", ((1.0, 0, 1.0), (0.8, 20, 0.9), (0.0, 0, 1.0)))
def test_on_a_gpu(dtype, setting):
    def tree(*given):
        there = [t.cuda() if isinstance(t, torch.Tensor) else t for t in given]
        return [t.cpu() for t in torch.ops.posttrain.verify_draft_tree(*there)]

    _check(tree, ("drawn", "drawn once", "chosen"), setting, 20_000, dtype, False)
