"""Medusa: what the heads are at the start, their labels and loss by hand, the tree they fill, and that nothing they say shows."""

from __future__ import annotations

import pytest
import torch
from draft_cases import PROMPTS, assert_distributed_as_the_target, examples, small_target
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.data import Example
from posttrain.model import generate
from posttrain.speculative import engine
from posttrain.speculative.draft_data import collate, compute_items
from posttrain.speculative.interface import Requests
from posttrain.speculative.medusa import Medusa, last_features
from posttrain.speculative.medusa_heads import HORIZON, MedusaHeads, accuracy, loss_sum
from posttrain.speculative.tree import FixedTree, chain

TREE = FixedTree.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)])


def heads_of(model, num_heads=3, ids=None, own_heads=False):
    """Heads that say something of their own each."""
    heads = MedusaHeads(model, num_heads, torch.arange(model.config.vocab_size) if ids is None else torch.tensor(ids), own_heads)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (heads.weight, heads.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return heads.to(model.model.embed_tokens.weight.dtype).eval()


@pytest.mark.parametrize("own_heads", [False, True])
def test_at_the_start_every_head_says_what_the_target_says(own_heads):
    model = small_target()
    hidden = torch.randn(5, 32)
    logits = MedusaHeads(model, 4, torch.tensor([1, 2, 5]), own_heads).logits(hidden)
    with torch.no_grad():
        plain = model.head(hidden)[:, [1, 2, 5]]
        exact = hidden.double() @ model.model.embed_tokens.weight.double()[[1, 2, 5]].t()
    for said in logits:
        assert_as_accurate(said, plain, exact)


def test_heads_do_not_share_their_weights():
    """Medusa's list of n times one block did."""
    model = small_target()
    heads = MedusaHeads(model, 3, torch.arange(6))
    batch = collate(compute_items(model, examples(6)), HORIZON)
    loss_sum(heads, batch)[0].backward()
    gradients = heads.weight.grad
    assert not torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[1], gradients[2])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_labels_by_hand():
    """Head k at t is to say token t + 2 + k, where that has a label and is in the draft vocabulary."""
    model = small_target()
    heads = MedusaHeads(model, 2, torch.tensor([0, 2, 4, 5]))  # places 0 1 2 3
    batch = collate(
        compute_items(model, [Example([3, 1, 2, 4, 5, 1], [-100, -100, 2, 4, 5, 1]), Example([1, 0, 5], [-100, 0, 5])]), 2
    )
    hidden, labels = heads.targets(batch)
    # row 0: t = 0 .. 3 predict tokens 2 .. 5 (2, 4, 5, 1: 1 is outside); row 1: t = 0 predicts 5
    assert labels.tolist() == [[1, 2, 3, -100, 3], [2, 3, -100, -100, -100]]
    assert batch.normalizer == 5 and torch.equal(hidden, torch.cat((batch.hidden[0, :4], batch.hidden[1, :1])))


@pytest.mark.parametrize("own_heads", [False, True])
def test_loss_is_the_paper_s_sum(own_heads):
    model = small_target()
    heads = heads_of(model, 2, [0, 2, 4, 5], own_heads)
    batch = collate(compute_items(model, examples(6)), HORIZON)

    def loops(dtype):
        weight, bias = heads.weight.detach().to(dtype), heads.bias.detach().to(dtype)
        rows = model.model.embed_tokens.weight.detach()[[0, 2, 4, 5]].to(dtype)
        total = torch.zeros((), dtype=dtype)
        for row, labels in enumerate(batch.labels):
            for t in range(len(labels)):
                for k in range(2):
                    label = int(labels[t + 2 + k]) if t + 2 + k < len(labels) else -100
                    if label not in (0, 2, 4, 5):
                        continue
                    h = batch.hidden[row, t].to(dtype)
                    turned = weight[k] @ h + bias[k]
                    logits = rows @ (h + turned * torch.sigmoid(turned))
                    total -= 0.8**k * logits.log_softmax(-1)[[0, 2, 4, 5].index(label)]
        return total

    loss, shown = loss_sum(heads, batch)
    assert_as_accurate(loss, loops(torch.float32), loops(torch.float64))
    assert shown["loss_1"][1] == sum(int(((x != -100) & (x != 1) & (x != 3)).sum()) for x in batch.labels[:, 2:])


def test_accuracy_by_hand():
    model = small_target()
    heads = heads_of(model, 2, [0, 2, 4, 5])
    batches = [collate([item], HORIZON) for item in compute_items(model, examples(6))]
    hits, count = [[0] * 4, [0] * 4], [0, 0]
    for batch in batches:
        for t in range(batch.num_tokens - 2):
            for k in range(2):
                if t + 2 + k >= batch.num_tokens:
                    continue
                order = heads.logits(batch.hidden[0, t : t + 1])[k, 0].argsort(descending=True)
                said = heads.draft_ids[order].tolist()
                count[k] += 1
                label = int(batch.labels[0, t + 2 + k])
                if label in said:
                    hits[k][said.index(label)] += 1
    measured = accuracy(heads, batches)
    assert torch.equal(torch.tensor(measured)[:, :4], torch.tensor(hits) / torch.tensor(count)[:, None])
    assert not torch.tensor(measured)[:, 4:].any()


def request(caps):
    rows = len(caps)
    return Requests([[1, 2]] * rows, caps, torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.int64))


def test_a_tree_is_filled_with_the_heads_candidates():
    model = small_target()
    heads = heads_of(model, 3, [0, 2, 4, 5])
    drafter = Medusa(heads, TREE)
    features = torch.randn(2, 3, 32)
    drafter.begin(2)
    drafter.observe(torch.tensor([[4, 1, -1], [-1, -1, 3]]), features)  # a shorter path behind, a prompt's padding in front
    proposal = drafter.propose(request([9, 2]), 9)
    for row, hidden in enumerate((features[0, 1], features[1, 2])):
        best = [heads.draft_ids[head.argsort(descending=True)].tolist() for head in heads.logits(hidden[None])[:, 0]]
        expected = [best[len(path) - 1][path[-1]] for path in TREE.paths]
        assert proposal.tokens[row].tolist() == (expected if row == 0 else [*expected[:6], -1, -1])
    assert proposal.parents.tolist() == TREE.parents and proposal.num.tolist() == [8, 6]
    assert drafter.propose(request([9, 9]), 1).tokens.shape == (2, 3)
    assert drafter.propose(request([0, 0]), 4).tokens.shape == (2, 0)
    drafter.select(torch.tensor([1]))
    assert torch.equal(drafter.propose(request([3]), 3).tokens[0, :3], proposal.tokens[1, :3])


def test_last_features():
    features = torch.arange(12.0).view(2, 3, 2)
    assert last_features(torch.tensor([[5, -1, -1], [-1, 0, 0]]), features).tolist() == [[0.0, 1.0], [10.0, 11.0]]


@settings(max_examples=3)
@given(st.integers(1, 6), st.booleans())
def test_greedy_tokens_are_plain_decoding_s(draft_length, vocabulary):
    model = small_target()
    drafter = Medusa(heads_of(model, 3, [0, 2, 4, 5] if vocabulary else None), TREE)
    expected = generate(model, PROMPTS, 20)
    outputs, report = engine.generate(model, PROMPTS, 20, drafter, draft_length=draft_length, adaptive=False)
    assert outputs == expected and report.accepted > 5


def test_greedy_tokens_with_stops_and_an_adaptive_length():
    model = small_target()
    drafter = Medusa(heads_of(model), TREE)
    for stop in ({2}, {0, 4}):
        expected = generate(model, PROMPTS, 20, stop_ids=stop)
        assert engine.generate(model, PROMPTS, 20, drafter, stop_ids=stop)[0] == expected


def test_sampled_sequences_are_distributed_as_the_target_s():
    model = small_target(vocab_size=3, initializer_range=0.2)
    tree = FixedTree.of([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    assert_distributed_as_the_target(model, Medusa(heads_of(model, 2, [0, 2]), tree))


def test_nothing_behind_a_leaf_is_accepted_where_the_target_says_token_0():
    """Medusa pads its paths with token 0: a leaf whose successor is 0 was then accepted further than drafted."""
    model = small_target()
    with torch.no_grad():  # logits: 1 for token 0, 0 for the others, whatever is read
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
    heads = MedusaHeads(model, 2, torch.arange(6))
    prompts = [[1, 2, 3], [4]]

    class AlwaysZero(Medusa):
        def propose(self, requests, limit):
            proposal = super().propose(requests, limit)
            return type(proposal)(proposal.tokens.clamp(max=0), proposal.num, None, proposal.parents)

    drafter = AlwaysZero(heads.eval(), FixedTree.of([(0,), (1,), (0, 0)]))
    expected = generate(model, prompts, 12)
    outputs, report = engine.generate(model, prompts, 12, drafter, adaptive=False)
    assert outputs == expected
    assert report.tokens_per_pass <= 3  # the root's successor, its child, and one more


def test_trees_that_do_not_fit():
    model = small_target()
    with pytest.raises(ValueError, match="4 deep and there are 3 heads"):
        Medusa(heads_of(model, 3), chain(4))
    with pytest.raises(ValueError, match="candidate 4 of a draft vocabulary of 4"):
        Medusa(heads_of(model, 3, [0, 2, 4, 5]), FixedTree.of([(i,) for i in range(5)]))
    with pytest.raises(ValueError, match="num_heads is 0"):
        MedusaHeads(model, 0, torch.arange(6))
