"""The decoder against transformers, against itself in float64, and its masks, cache and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import CASES, hf_config, random_model
from tolerance import assert_as_accurate

from posttrain.model import KVCache


def transformers_model(name: str, state: dict[str, torch.Tensor]):
    """The same model in transformers, through its own reading of the config."""
    transformers = pytest.importorskip("transformers")
    architecture = CASES[name][0]
    config = copy.deepcopy(hf_config(name))
    del config["architectures"]
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**config)
    config._attn_implementation = "sdpa"
    model = getattr(transformers, architecture)(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    model = random_model(name)
    peer = transformers_model(name, model.state_dict())
    input_ids = torch.randint(0, 97, (2, 24))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_ids)
        ours, theirs = model(input_ids), peer(input_ids).logits
    assert_as_accurate(ours, theirs, exact)
    assert_as_accurate(theirs, ours, exact)  # and so the float64 model is the same model as theirs


@pytest.mark.peers
@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding", "qwen3"])
def test_bf16_logits_are_as_accurate_as_transformers(name):
    model = random_model(name, torch.bfloat16)
    peer = transformers_model(name, model.state_dict()).bfloat16()
    input_ids = torch.randint(0, 97, (4, 24))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_ids)
        assert_as_accurate(model(input_ids), peer(input_ids).logits, exact)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding"])
def test_left_padding_equals_transformers(name):
    model = random_model(name)
    peer = transformers_model(name, model.state_dict())
    input_ids = torch.randint(0, 97, (2, 20))
    attention_mask = torch.ones(2, 20, dtype=torch.bool)
    attention_mask[1, :8] = False
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_ids, attention_mask=attention_mask)
        ours = model(input_ids, attention_mask=attention_mask)
        theirs = peer(input_ids, attention_mask=attention_mask.long(), position_ids=position_ids).logits
    assert_as_accurate(ours[attention_mask], theirs[attention_mask], exact[attention_mask])


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama_dynamic"])
def test_cached_steps_equal_one_pass(name):
    """A prompt, one token, a few at once, and again after going back: every logit as accurate as without a cache."""
    model = random_model(name)
    input_ids = torch.randint(0, 97, (2, 24))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_ids)
        whole = model(input_ids)
        cache = KVCache(model.config, 2, 4, torch.float32)
        parts = [model(input_ids[:, a:b], cache=cache) for a, b in ((0, 10), (10, 11), (11, 16), (16, 17))]
        assert_as_accurate(torch.cat(parts, 1), whole[:, :17], exact[:, :17])
        cache.length = 12
        again = model(input_ids[:, 12:], cache=cache)
        assert_as_accurate(again, whole[:, 12:], exact[:, 12:])
    assert cache.length == 24


@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding", "qwen3"])
def test_packed_segments_equal_separate_sequences(name):
    model = random_model(name)
    lengths = (5, 11, 3)
    sequences = [torch.randint(0, 97, (1, n)) for n in lengths]
    padding = 4
    input_ids = torch.cat([*sequences, torch.zeros(1, padding, dtype=torch.int64)], 1)
    segment_ids = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), torch.tensor([*lengths, padding]))[None]
    position_ids = torch.cat([torch.arange(n) for n in (*lengths, padding)])[None]
    with torch.no_grad():
        packed = model(input_ids, position_ids=position_ids, segment_ids=segment_ids)
        alone = torch.cat([model(s) for s in sequences], 1)
        exact = torch.cat([copy.deepcopy(model).double()(s) for s in sequences], 1)
    assert torch.isfinite(packed).all()
    assert_as_accurate(packed[:, : sum(lengths)], alone, exact)


def test_left_padding_in_the_cache_equals_each_row_alone():
    model = random_model("mistral_sliding")
    rows = [torch.randint(0, 97, (1, n)) for n in (12, 5)]
    new = torch.randint(0, 97, (2, 3))
    input_ids = torch.zeros(2, 12, dtype=torch.int64)
    input_ids[0], input_ids[1, 7:] = rows[0], rows[1]
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :7] = False
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        cache = KVCache(model.config, 2, 12, torch.float32)
        model(input_ids, attention_mask=mask, cache=cache)
        steps = torch.cat([model(new[:, i : i + 1], cache=cache) for i in range(3)], 1)
        cache.length = 13
        both = model(new[:, 1:], cache=cache)
        for i, row in enumerate(rows):
            whole = torch.cat((row, new[i : i + 1]), 1)
            alone, exact = model(whole)[0, -3:], wide(whole)[0, -3:]
            assert_as_accurate(steps[i], alone, exact)
            assert_as_accurate(both[i], alone[1:], exact[1:])


PARENTS = [-1, 0, 0, 1, 1, 4, 2]  # of a tree's nodes; the root comes first


def ancestors(node: int) -> list[int]:
    return [] if node < 0 else [*ancestors(PARENTS[node]), node]


@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding", "qwen2_sliding"])
def test_a_tree_in_one_pass_equals_each_of_its_paths(name):
    """After a batch with padding and a hole; and so does what follows once a path of each row's is kept."""
    model = random_model(name)
    wide = copy.deepcopy(model).double()
    rows, nodes, new = [torch.randint(0, 97, (n,)) for n in (11, 6)], torch.randint(0, 97, (2, 7)), torch.randint(0, 97, (2, 1))
    paths = [ancestors(node) for node in range(7)]
    tree_mask = torch.tensor([[column in path for column in range(7)] for path in paths])
    depth = torch.tensor([len(path) - 1 for path in paths])
    input_ids, mask = torch.zeros(2, 11, dtype=torch.int64), torch.ones(2, 11, dtype=torch.bool)
    input_ids[0], input_ids[1, 5:], mask[1, :5] = rows[0], rows[1], False
    with torch.no_grad():
        cache = KVCache(model.config, 2, 4, torch.float32)
        model(input_ids[:, :9], attention_mask=mask[:, :9], cache=cache)
        model(input_ids[:, 9:], cache=cache)
        cache.keep(9, torch.tensor([[0, 1], [0, -1]]))
        model(input_ids[:, -1:], attention_mask=torch.tensor([[False], [True]]), cache=cache)  # a hole in either row
        positions = torch.tensor([[11], [6]]) + depth
        hidden = model.hidden(nodes, position_ids=positions, cache=cache, tree_mask=tree_mask)
        each = model.hidden(nodes[:1], position_ids=depth[None], tree_mask=tree_mask.expand(1, 7, 7))
        outputs, sequences = [*hidden.flatten(0, 1), *each[0]], []
        sequences += [torch.cat((row, nodes[i, path])) for i, row in enumerate(rows) for path in paths]
        sequences += [nodes[0, path] for path in paths]
        kept = [paths[5], paths[2]]  # four nodes and two
        cache.keep(12, torch.tensor([path + [-1] * (4 - len(path)) for path in kept]))
        for compacted in (False, True):
            if compacted:
                cache.compact()
                assert cache.length == 15 and not cache.valid[1, :7].any() and cache.valid[1, 7:15].all()
            length = cache.length
            after = model.hidden(new, cache=cache)
            outputs += after[:, 0]
            sequences += [torch.cat((row, nodes[i, path], new[i])) for i, (row, path) in enumerate(zip(rows, kept, strict=True))]
            cache.length = length
        alone, exact = (torch.stack([each.hidden(row[None])[0, -1] for row in sequences]) for each in (model, wide))
        assert_as_accurate(torch.stack(outputs), alone, exact)


def test_states_are_what_enters_the_layers():
    model = random_model()
    input_ids = torch.randint(0, 97, (2, 5))
    states: dict[int, torch.Tensor | None] = {0: None, 2: None}
    with torch.no_grad():
        hidden = model.hidden(input_ids, states=states)
        assert torch.equal(states[0], model.model.embed_tokens(input_ids)) and states.keys() == {0, 2}
        rope = model._rope.at(0, 5, hidden.device, hidden.dtype)
        assert torch.equal(model.model.norm(model.model.layers[2](states[2], rope, None, None)), hidden)
    with pytest.raises(ValueError, match="goes with position_ids"):
        model.hidden(input_ids, tree_mask=torch.ones(5, 5, dtype=torch.bool))


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_activation_checkpointing_changes_no_gradient(name):
    model = random_model(name).train()
    input_ids = torch.randint(0, 97, (2, 16))
    gradients = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        model(input_ids).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for key in gradients[0]:
        assert torch.equal(gradients[0][key], gradients[1][key]), key


@pytest.mark.peers
@pytest.mark.parametrize("name", ["smollm2", "qwen2_sliding", "qwen3"])
def test_gradients_are_as_accurate_as_transformers(name):
    model = random_model(name).train()
    peer = transformers_model(name, model.state_dict()).train()
    wide = copy.deepcopy(model).double()
    input_ids = torch.randint(0, 97, (2, 16))
    for any_model in (model, peer, wide):
        output = any_model(input_ids)
        getattr(output, "logits", output).log_softmax(-1)[..., 5].sum().backward()
    theirs, exact = dict(peer.named_parameters()), dict(wide.named_parameters())
    names = list(dict(model.named_parameters()))
    gradients = [
        torch.cat([named[key].grad.flatten() for key in names]) for named in (dict(model.named_parameters()), theirs, exact)
    ]
    assert_as_accurate(*gradients)


def saved_floats(model, input_ids) -> float:
    """Float32 values per token that the forward pass keeps for the backward one, parameters excepted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(input_ids)  # held, so that no storage is freed and counted as another's
    return sum(saved.values()) / 4 / hidden.shape[:2].numel()


def test_training_saves_each_input_once():
    input_ids = torch.randint(0, 97, (2, 32))
    one, two = (saved_floats(random_model(num_hidden_layers=n).train(), input_ids) for n in (1, 2))
    D, F, norms = 64, 160, 2
    # Of hidden_size: the two norms' inputs, q, k and v (half each, two heads of four), attention's output, and the
    # inputs of q/k/v and of gate/up. Of intermediate_size: gate, up, and down's input. A float a token: each norm's
    # r.
    assert two - one == 7 * D + 3 * F + norms


def test_hidden_and_head_are_forward():
    model = random_model("llama3")
    input_ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        hidden = model.hidden(input_ids)
        assert hidden.shape == (2, 9, 64)
        assert torch.equal(model.head(hidden), model(input_ids))


def test_wrong_use_of_the_cache_is_an_error():
    model = random_model()
    cache = KVCache(model.config, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="1 rows and the cache 2"):
        model(torch.ones(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="segment_ids"):
        model(torch.ones(2, 3, dtype=torch.int64), segment_ids=torch.zeros(2, 3), cache=cache)
