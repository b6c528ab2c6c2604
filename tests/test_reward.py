"""Reward models: the loss by hand, against the oracle and TRL; scores, training, resuming, PEFT's files, refusals."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from model_cases import hf_config, random_model
from rl_cases import assert_same, assert_slopes
from tolerance import assert_as_accurate

from posttrain.adapters import LoraConfig, adapter_parameters, attach, disabled, save_adapter, set_adapter
from posttrain.completion_batch import collate_completions
from posttrain.errors import PosttrainError
from posttrain.preference.data import Pair
from posttrain.reference import reward as oracle
from posttrain.reward import add_score_head, load_reward_model, reward_loss, score, score_accuracy, scores, train_reward_model
from posttrain.trainer import TrainConfig

CASES = [(None, 0.0), ([0.5, -1.0, 2.0], 0.0), ([0.5, -1.0, 2.0], 0.3)]
CHOSEN, REJECTED = [1.0, -2.0, 0.3], [0.5, 1.0, 0.3]


def test_by_hand():
    """Equal rewards: log 2, and each pulls by a half; centred at 3 + 1: 0.1 * 16 more, 0.8 each."""
    assert oracle.reward_loss([1.0], [1.0]) == (pytest.approx(math.log(2)), [-0.5], [0.5])
    assert oracle.reward_loss([3.0], [1.0], [2.0], 0.1) == (
        pytest.approx(math.log(2) + 1.6),
        [pytest.approx(0.3)],
        [pytest.approx(1.3)],
    )


@pytest.mark.parametrize(("margins", "centre"), CASES)
def test_the_oracle_s(margins, centre):
    exact, d_chosen, d_rejected = oracle.reward_loss(CHOSEN, REJECTED, margins, centre)
    assert_slopes(lambda x: oracle.reward_loss(x, REJECTED, margins, centre)[0], d_chosen, CHOSEN)
    assert_slopes(lambda x: oracle.reward_loss(CHOSEN, x, margins, centre)[0], d_rejected, REJECTED)
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED))
    ours = reward_loss(chosen, rejected, None if margins is None else torch.tensor(margins, dtype=torch.float64), centre).mean()
    assert_same(ours, exact)
    for mine, theirs in zip(torch.autograd.grad(ours, (chosen, rejected)), (d_chosen, d_rejected), strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("far", (1e4, -1e4))
def test_extremes_stay_finite(far):
    chosen = torch.tensor([far], requires_grad=True)
    loss = reward_loss(chosen, torch.zeros(1))
    loss.sum().backward()
    assert loss.item() == max(-far, 0.0) and chosen.grad.item() == (-1.0 if far < 0 else 0.0)


@pytest.mark.peers
@pytest.mark.parametrize(("margins", "centre"), CASES)
def test_trl_agrees(margins, centre):
    trainer = pytest.importorskip("trl").RewardTrainer
    gather = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t)
    chosen, rejected = torch.randn(64, 3), torch.randn(64, 3)
    extra = {} if margins is None else {"margin": torch.tensor(margins)}
    ours, theirs, exact = [], [], []
    for w, l in zip(chosen, rejected, strict=True):
        stand_in = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=gather, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
            args=SimpleNamespace(center_rewards_coefficient=centre or None), _tp_size=1,
        )  # fmt: skip
        logits = torch.cat([w, l])[:, None]
        inputs = {"attention_mask": torch.ones(6, 1, dtype=torch.int64), **extra}
        theirs.append(trainer.compute_loss(stand_in, lambda logits=logits, **_: SimpleNamespace(logits=logits), inputs))
        for dtype, losses in ((torch.float32, ours), (torch.float64, exact)):
            margin = None if margins is None else torch.tensor(margins, dtype=dtype)
            losses.append(reward_loss(w.to(dtype), l.to(dtype), margin, centre).mean())
        assert stand_in._metrics["train"]["accuracy"] == [pytest.approx((w > l).float().mean().item())]
    assert_as_accurate(torch.stack(ours), torch.stack(theirs), torch.stack(exact))


def _pairs(count=24, seed=0):
    """The chosen completion ends in 7, the rejected one in 8; prompts and the rest say nothing."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(10, 97, (length,), generator=generator).tolist()

    return [Pair(ids(1, 6), [*ids(0, 6), 7], [*ids(0, 6), 8]) for _ in range(count)]


def _config(folder, **changes):
    return TrainConfig(
        folder, **{"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 5, **changes}
    )


LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


def _trained(folder, model=None, **options):
    model = model or random_model(num_hidden_layers=1)
    steps = options.pop("steps", {})
    result = train_reward_model(model, _pairs(), _config(folder, **steps), LORA, quiet=True, **options)
    return model.eval(), result


def test_it_learns_what_was_preferred(tmp_path):
    model, result = _trained(tmp_path)
    found = score_accuracy(model, _pairs(40, seed=9))
    assert sum(found.correct) >= 36 and found.p_value < 1e-6  # of 40 unseen ones
    assert str(found).startswith(f"{sum(found.correct) / 40:.3f} [0.")
    entry = result.metrics[-1]
    assert {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"} <= entry.keys()
    assert entry["min_reward"] < entry["mean_reward"] < entry["max_reward"] and entry["margin"] > 0
    assert result.metrics[0]["loss"] > 2 * entry["loss"]


def test_a_score_is_that_of_the_completion_on_its_own():
    """Packed beside others or alone, to the rounding that another shape of product brings; in order, from the last token."""
    model = random_model(dtype=torch.float64)
    add_score_head(model)
    model.score.double()
    sequences = [(p.prompt, p.chosen) for p in _pairs(9)]
    with torch.no_grad():
        hidden = [model.hidden(torch.tensor([prompt + completion]))[0, -1] for prompt, completion in sequences]
        alone = torch.stack([model.score(h.float().double()) for h in hidden])[:, 0]
        model.score.float()
        ours = scores(model, collate_completions(sequences)).double()
        assert ((ours - alone).abs() <= 4 * torch.finfo(torch.float32).eps * alone.abs().max() * 64**0.5).all()
    assert torch.equal(score(model, sequences, batch_size=9).double(), ours)


def test_resumed_it_ends_in_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    def stop(entry):
        if entry["step"] == 8:
            raise Stop

    whole, _ = _trained(tmp_path / "a")
    with pytest.raises(Stop):
        _trained(tmp_path / "b", on_step=stop)
    again, _ = _trained(tmp_path / "b", resume=True)
    for key, parameter in adapter_parameters(whole).items():
        assert torch.equal(parameter, adapter_parameters(again)[key]), key
    assert "base_model.model.score.weight" in adapter_parameters(whole)
    with pytest.raises(PosttrainError, match=r"another run: held\.dtype was 'float32' and is 'bfloat16'"):
        _trained(tmp_path / "b", model=random_model(num_hidden_layers=1, dtype=torch.bfloat16), resume=True)


@torch.no_grad()
def test_one_base_carries_the_policy_and_the_reward_model(tmp_path):
    """Loaded beside a policy's adapter, it scores as it did alone, and the base and the policy are as they were."""
    with torch.enable_grad():
        model, _ = _trained(tmp_path)
    sequences = [(p.prompt, p.chosen) for p in _pairs(6)]
    before = score(model, sequences)
    torch.manual_seed(0)
    both = random_model(num_hidden_layers=1)
    ids = torch.arange(12)[None]
    plain = both(ids)
    attach(both, LoraConfig(r=2, init_lora_weights=False))
    policy = both(ids)
    load_reward_model(both, tmp_path)
    assert torch.equal(score(both, sequences), before)
    set_adapter(both, "default")
    assert torch.equal(both(ids), policy)
    with disabled(both):
        assert torch.equal(both(ids), plain)


def _peer(model):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**hf_config("smollm2"), num_labels=1, pad_token_id=0)
    peer = transformers.LlamaForSequenceClassification(config).eval()
    peer.load_state_dict(model.state_dict(), strict=False)
    return peer


def _peer_scores(peer, sequences):
    with torch.no_grad():
        return torch.stack([peer(torch.tensor([prompt + completion])).logits[0, 0] for prompt, completion in sequences])


@pytest.mark.peers
def test_peft_loads_ours_and_we_theirs(tmp_path):
    """Scores are equal to rounding: the same adapter in float64 is the measure."""
    peft = pytest.importorskip("peft")
    sequences = [(p.prompt, p.chosen) for p in _pairs(60)]
    model = random_model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    train_reward_model(model, _pairs(), _config(tmp_path / "ours", max_steps=4), LORA, quiet=True)
    peer = peft.PeftModel.from_pretrained(_peer(SimpleNamespace(state_dict=lambda: state)), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    theirs = _peer_scores(peer, sequences)
    assert_as_accurate(score(model.eval(), sequences), theirs, _peer_scores(peer.double(), sequences))

    made = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["v_proj"], init_lora_weights=False)
    peer = peft.get_peft_model(_peer(SimpleNamespace(state_dict=lambda: state)), made).eval()
    peer.save_pretrained(tmp_path / "theirs")
    fresh = random_model()
    fresh.load_state_dict(state)
    load_reward_model(fresh, tmp_path / "theirs", any_base=True)
    theirs = _peer_scores(peer, sequences)
    assert_as_accurate(score(fresh, sequences), theirs, _peer_scores(peer.double(), sequences))


def test_refusals(tmp_path):
    with pytest.raises(PosttrainError, match="holds no pairs"):
        train_reward_model(random_model(), [], _config(tmp_path))
    with pytest.raises(ValueError, match="center_rewards_coefficient is -1"):
        train_reward_model(random_model(), _pairs(), _config(tmp_path), center_rewards_coefficient=-1)
    model = random_model()
    attach(model, LORA)
    with pytest.raises(PosttrainError, match="has the adapter 'default' already"):
        train_reward_model(model, _pairs(), _config(tmp_path))
    save_adapter(model, tmp_path / "policy")
    model = random_model()
    with pytest.raises(PosttrainError, match="has no score head, so it is no reward model"):
        load_reward_model(model, tmp_path / "policy")
    assert not hasattr(model, "score")
    long = [Pair([5] * 60, [6] * 9, [7])]
    with pytest.raises(PosttrainError, match="69 tokens and the model's context 64"):
        train_reward_model(random_model(), long, _config(tmp_path))
    with pytest.raises(ValueError, match="pair 0 holds token ids from 5 to 97; the vocabulary has 0 to 96"):
        train_reward_model(random_model(), [Pair([5], [97], [7])], _config(tmp_path))
    with pytest.raises(ValueError, match="sequence 0 holds token ids from 5 to 97"):
        score(model, [([5], [97])])
