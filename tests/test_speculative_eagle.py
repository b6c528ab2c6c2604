"""EAGLE: training's unrolled steps by hand, and that drafting with a cache, a tree and rollbacks is the same computation."""

from __future__ import annotations

import copy

import pytest
import torch
from draft_cases import PROMPTS, assert_distributed_as_the_target, examples, small_target
from tolerance import assert_as_accurate

from posttrain.model import generate
from posttrain.speculative import engine
from posttrain.speculative.draft_data import collate, compute_items
from posttrain.speculative.eagle import Eagle
from posttrain.speculative.eagle_head import HORIZON, EagleHead, accuracy, feature_layers, loss_sum, set_scale
from posttrain.speculative.tree import FixedTree, GrowingTree

TREE = FixedTree.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 1), (0, 0, 0), (0, 1, 0), (0, 1, 1)])
GROWN = {"top_k": 3, "depth": 3, "total": 8}


def head_of(model, version=1, ids=None):
    """A head with weights of its own in every part."""
    head = EagleHead(model, torch.arange(model.config.vocab_size) if ids is None else torch.tensor(ids), version)
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * spread.clamp(-4, 4) if "norm" in name or name == "scale" else 0.2 * spread)
    return head.to(model.model.embed_tokens.weight.dtype).requires_grad_(False).eval()


def target_features(model, head, tokens):
    """(T, F) of a text, as the head reads them."""
    states = dict.fromkeys(head.layers or ())
    hidden = model.hidden(torch.tensor([tokens]), states=states)
    return torch.cat([states[layer] for layer in head.layers], -1)[0] if head.layers else hidden[0]


def logprobs_after(model, head, text, path):
    """The draft's for what follows `path` behind `text`, without cache or tree: training's own forward pass."""
    features = target_features(model, head, text[:-1])
    known = torch.cat((features, features.new_zeros(len(path) + 1, features.shape[1])))
    steps = head(known[None], torch.tensor([[*text, *path]]), len(path) + 1)
    return (steps[-1][1][0, len(text) - 2] @ head.head.t()).log_softmax(-1)


class Watched(Eagle):
    """Keeps what it proposed, and behind what text."""

    def propose(self, requests, limit):
        proposal = super().propose(requests, limit)
        self.seen.append(([list(text) for text in requests.tokens], proposal, min(limit, max(requests.cap))))
        return proposal


@pytest.mark.parametrize(("version", "ids"), [(1, None), (3, [0, 1, 3, 5])])
def test_a_fixed_tree_is_what_training_s_steps_say(version, ids):
    """After any acceptances, of rows of different lengths: the cache holds the target's features, not the draft's."""
    model = small_target(torch.float64)
    head = head_of(model, version, ids)
    drafter = Watched(head, TREE)
    drafter.seen = []
    outputs, report = engine.generate(model, PROMPTS, 7, drafter, draft_length=3, adaptive=False)
    assert outputs == generate(model, PROMPTS, 7) and report.accepted > 2
    with torch.inference_mode():
        for texts, proposal, _ in drafter.seen:
            for row, text in enumerate(texts):
                paths = {-1: []}
                best: dict[int, list[int]] = {}
                for node in range(int(proposal.num[row])):
                    up = TREE.parents[node]
                    if up not in best:
                        order = logprobs_after(model, head, text, paths[up]).argsort(descending=True)
                        best[up] = head.draft_ids[order].tolist()
                    assert proposal.tokens[row, node] == best[up][TREE.ranks[node]]
                    paths[node] = [*paths[up], best[up][TREE.ranks[node]]]


@pytest.mark.parametrize("version", [1, 3])
def test_a_grown_tree_is_what_training_s_steps_say(version):
    model = small_target(torch.float64)
    head = head_of(model, version)
    drafter = Watched(head, **GROWN)
    drafter.seen = []
    outputs, report = engine.generate(model, PROMPTS, 7, drafter, draft_length=3, adaptive=False)
    assert outputs == generate(model, PROMPTS, 7) and report.accepted > 2
    with torch.inference_mode():
        for texts, proposal, depth in drafter.seen:
            for row, text in enumerate(texts):
                tree = GrowingTree(logprobs_after(model, head, text, [])[None], GROWN["top_k"])
                paths = [[token] for token in tree.tokens[0].tolist()]
                for _ in range(depth - 1):
                    tree.grow(torch.stack([logprobs_after(model, head, text, path) for path in paths])[None])
                    above = tree.parent_in_beam[0].tolist()
                    paths = [[*paths[a], token] for a, token in zip(above, tree.tokens[0].tolist(), strict=True)]
                tokens, parents = tree.select(GROWN["total"])
                used = int(proposal.num[row])
                assert proposal.tokens[row, :used].tolist() == tokens[0, :used].tolist()
                assert proposal.parents[row, :used].tolist() == parents[0, :used].tolist()


def test_greedy_tokens_are_plain_decoding_s_with_stops_and_an_adaptive_length():
    model = small_target()
    for drafter in (Eagle(head_of(model, 1), TREE), Eagle(head_of(model, 3, [0, 1, 3, 5]), **{**GROWN, "top_k": 2})):
        expected = generate(model, PROMPTS, 14, stop_ids={2})
        assert engine.generate(model, PROMPTS, 14, drafter, stop_ids={2})[0] == expected
        assert engine.generate(model, PROMPTS, 14, drafter, stop_ids={2}, draft_length=2, adaptive=False)[0] == expected


def test_sampled_sequences_are_distributed_as_the_target_s():
    model = small_target(vocab_size=3, initializer_range=0.2)
    drafter = Eagle(head_of(model), **{**GROWN, "top_k": 2})
    assert_distributed_as_the_target(model, drafter)


def test_the_first_step_by_hand():
    """fc of the next token's embedding and the feature; attention without an input norm; MLP; no final norm."""
    model = small_target(torch.float64)
    head = head_of(model, 1)
    f, tokens = torch.randn(1, 5, 32, dtype=torch.float64), torch.tensor([[1, 2, 3, 4, 5]])
    x = head.fc(torch.cat((model.model.embed_tokens.weight[[2, 3, 4, 5, 0]], f[0] / head.scale), -1))[None]
    q, k, v = (getattr(head.attention, name)(x).view(1, 5, -1, 8).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))

    def turned(y):
        cos, sin = (part.transpose(1, 2) for part in model._rope.at(0, 5, y.device, y.dtype))
        return y * cos + y.roll(4, -1) * sin

    scores = turned(q) @ turned(k.repeat_interleave(2, 1)).transpose(2, 3) / 8**0.5
    p = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    h = x + head.attention.o_proj((p @ v.repeat_interleave(2, 1)).transpose(1, 2).reshape(1, 5, 32))
    state, hidden = head(f, tokens, 1)[0]
    expected = h + head.mlp(head.post_attention_norm(h))
    assert torch.equal(hidden, state * head.scale)
    eps = torch.finfo(torch.float64).eps
    assert (state - expected).abs().max() < 64 * eps * expected.abs().max()


@pytest.mark.parametrize("version", [1, 3])
def test_loss_by_hand(version):
    """Sum over steps of 0.8^s (SmoothL1 + 0.1 KL), or of the KL alone, where the predicted token has a label."""
    model = small_target()
    head = head_of(model, version, [0, 1, 3, 5])
    batch = collate(compute_items(model, examples(6, 5), head.layers), HORIZON)

    def loops(module, b):
        total = torch.zeros((), dtype=b.hidden.dtype)
        for s, (state, hidden) in enumerate(module(b.features, b.input_ids, 2)):
            for row, labels in enumerate(b.labels):
                for t in range(len(labels) - 2 - s):
                    if labels[t + 2 + s] == -100:
                        continue
                    wanted = b.hidden[row, t + 1 + s]
                    log_p, log_q = ((module.head @ h).log_softmax(-1) for h in (wanted, hidden[row, t]))
                    kl = (log_p.exp() * (log_p - log_q)).sum()
                    d = (state[row, t] - (wanted if module.scale is None else wanted / module.scale)).abs()
                    feature = torch.where(d < 1, d * d / 2, d - 0.5).mean()
                    total += 0.8**s * (feature + 0.1 * kl if version == 1 else kl)
        return total

    with torch.no_grad():
        wide = copy.deepcopy(head).double()
        exact_batch = type(batch)(
            batch.input_ids, batch.labels, batch.hidden.double(), batch.features.double(), batch.num_tokens, batch.horizon
        )
        assert_as_accurate(loss_sum(head, batch, 2)[0], loops(head, batch), loops(wide, exact_batch))


def test_accuracy_counts_what_follows_right_drafts():
    model = small_target()
    head = head_of(model, 1, [0, 1, 3, 5])
    batch = collate(compute_items(model, examples(6, 3)), HORIZON)
    measured = accuracy(head, [batch], 2)
    for s, (_, hidden) in enumerate(head(batch.features, batch.input_ids, 2)):
        hits, count = [0] * 4, 0
        for row, labels in enumerate(batch.labels):
            for t in range(len(labels) - 2 - s):
                if labels[t + 2 + s] != -100:
                    said = head.draft_ids[(head.head @ hidden[row, t]).argsort(descending=True)].tolist()
                    count += 1
                    if int(labels[t + 2 + s]) in said:
                        hits[said.index(int(labels[t + 2 + s]))] += 1
        assert torch.equal(torch.tensor(measured[s][:4]), torch.tensor(hits) / count)


def test_starting_weights_pass_features_on():
    model = small_target()
    head = EagleHead(model, torch.arange(6), 1).initialize(model, 0)
    again, other = (EagleHead(model, torch.arange(6), 1).initialize(model, seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    assert not torch.equal(head.fc.weight, other.fc.weight)
    assert torch.equal(head.mlp.up_proj.weight, model.model.layers[-1].mlp.up_proj.weight)
    assert head.fc.weight[:, 32:].diagonal().mean() > 0.8 > 0.2 > head.fc.weight[:, :32].diagonal().mean()


def test_features_are_measured_in_their_own_size():
    model = small_target()
    items = compute_items(model, examples(6, 3))
    head = EagleHead(model, torch.arange(6), 1)
    set_scale(head, items)
    every = torch.cat([item.features for item in items])
    exact = every.double().square().mean(0).sqrt()
    assert_as_accurate(head.scale, every.square().mean(0).sqrt(), exact)


def test_feature_layers():
    assert feature_layers(30) == (2, 15, 27) and feature_layers(4) == (2, 2, 1) and feature_layers(1) == (0, 0, 0)


def test_wrong_settings():
    model = small_target()
    with pytest.raises(ValueError, match="version is 2"):
        EagleHead(model, torch.arange(6), 2)
    with pytest.raises(ValueError, match="top_k is 7"):
        Eagle(head_of(model), top_k=7)
    with pytest.raises(ValueError, match="candidate 2 of a draft vocabulary of 2"):
        Eagle(head_of(model, 1, [0, 1]), TREE)
