"""TRL's DPOTrainer on the same model, adapter and pairs: loss, gradient and what is shown (extra `peers`)."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model
from preference_run import pairs
from tolerance import assert_as_accurate

from posttrain.adapters import LoraConfig, adapter_parameters, attach, load_adapter, save_adapter
from posttrain.model import load, save
from posttrain.preference.paired import PreferenceConfig, collate_pairs, pair_loss

pytestmark = pytest.mark.peers
CONFIGS = [
    {},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["ipo"]},
    {"ld_alpha": 0.4},
    {"use_weighting": True, "f_divergence_type": "forward_kl"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model and an adapter that both read."""
    path = tmp_path_factory.mktemp("trl")
    torch.manual_seed(0)
    model = random_model(num_hidden_layers=2)
    save(model, path / "model")
    attach(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    save_adapter(model, path / "adapter")
    return path


def theirs(folder, some, options):
    """(loss, {key: gradient}, metrics) of TRL's own loss on its own collator's batch."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    config = trl.DPOConfig(
        output_dir=str(folder / "out"), bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False, **options
    )  # fmt: skip
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 3, "b": 4, "c": 5, "<eos>": 2}, unk_token="<eos>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])  # what it asks for; not used
    trainer = trl.DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    model.delete_adapter("ref")  # a copy of the adapter as it came: here the base is the reference
    model.train()
    batch = trainer.data_collator([{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in some])
    loss = trainer._compute_loss(model, batch, False)
    loss.backward()
    gradients = {n.replace(".default.", "."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients, {name: values[0] for name, values in trainer._metrics["train"].items()}


def ours(folder, some, options, dtype):
    model = load(folder / "model", dtype="fp32").to(dtype)
    load_adapter(model, folder / "adapter", dtype=dtype)
    batch = collate_pairs([(pair, None) for pair in some])
    loss, told = pair_loss(model.train(), batch, PreferenceConfig(**options))
    loss = loss / batch.normalizer
    loss.backward()
    return (
        loss.detach(),
        {k: p.grad for k, p in adapter_parameters(model).items()},
        {k: (s / n).item() for k, (s, n) in told.items()},
    )


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_loss_gradient_and_metrics_are_trl_s(folder, options):
    some = pairs(6)
    their_loss, their_gradients, their_metrics = theirs(folder, some, options)
    loss, gradients, metrics = ours(folder, some, options, torch.float32)
    exact_loss, exact_gradients, exact_metrics = ours(folder, some, options, torch.float64)
    assert gradients.keys() == their_gradients.keys()
    keys = sorted(gradients)
    flat, their_flat, exact_flat = (
        torch.cat([g[k].flatten() for k in keys]) for g in (gradients, their_gradients, exact_gradients)
    )
    assert_as_accurate(flat, their_flat, exact_flat)
    # The other way round too: theirs is the same function, to what float32 leaves of a sum of a hundred terms.
    assert (their_flat - exact_flat).norm() <= 100 * torch.finfo(torch.float32).eps * exact_flat.norm()
    assert their_loss.item() == pytest.approx(exact_loss.item(), rel=100 * torch.finfo(torch.float32).eps)
    for name in metrics.keys() & their_metrics.keys():
        bound = 100 * torch.finfo(torch.float32).eps * max(abs(exact_metrics["logps/chosen"]), abs(exact_metrics["logps/rejected"]))
        assert metrics[name] == pytest.approx(their_metrics[name], abs=bound)
    assert len(metrics.keys() & their_metrics.keys()) == 7
