"""What a GRPO update computes: log-probabilities and entropies of the completions of a few prompts, and the adapter's gradient of
their weighted sum; SmolLM2-135M's shape, LoRA r=8 on all linear layers, bf16.

    python benchmarks/bench_rl.py [--rounds 5]

Beside our own packed rows, in which each completion brings its prompt, and beside transformers + PEFT with one padded row a
completion and logits of the completion's tokens alone, which is how TRL 1.16 batches them (its fused head is not used here).
First the log-probabilities must agree: against float32 on the same weights ours may err at most twice as much as the peer's.
Without the real model in the cache (`posttrain fetch smollm2-135m`) the weights are random ones of its shape.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from posttrain.adapters import LoraConfig, adapter_parameters, attach, load_adapter, save_adapter
from posttrain.completion_batch import collate_completions
from posttrain.model import CausalLM, ModelConfig, load, save
from posttrain.rl.rollouts import policy
from posttrain.rl.shared_prompts import collate
from posttrain.token_logprobs import completion_logprobs

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench
from bench_sft import SMOLLM2, cached_model

# (prompts, tokens of a prompt, completions of each, tokens of a completion): the sentiment task's, and a longer answer's
SHAPES = ((8, 43, 8, 2), (1, 128, 8, 64))


def sequences(prompts: int, P: int, G: int, C: int) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 49_000, (prompts, P + G * C), generator=generator).tolist()
    return [(row[:P], row[P + g * C : P + (g + 1) * C]) for row in ids for g in range(G)]


def shared(model: CausalLM, given: list) -> Tensor:
    return policy(model, collate(given))[0]


def packed(model: CausalLM, given: list) -> Tensor:
    batch = collate_completions(given)
    logps, _ = completion_logprobs(model, batch, return_entropy=True)
    return batch.padded(logps).flatten()  # completions here have one length


def theirs(model, given: list) -> Tensor:
    ids = torch.tensor([prompt + completion for prompt, completion in given])
    C = len(given[0][1])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=C + 1).logits[:, :-1]
    whole = logits.float().log_softmax(-1)
    with torch.no_grad():
        _ = -(whole.exp() * whole).sum(-1)
    return whole.gather(2, ids[:, -C:, None]).flatten()


def update(logprobs, model, parameters: list, given: list, weights: Tensor) -> None:
    for parameter in parameters:
        parameter.grad = None
    (logprobs(model, given) * weights).sum().backward()


def peer(folder: Path, adapter: Path):
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def main() -> None:
    options = _bench.arguments(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder, adapter = cached_model(), Path(temporary) / "adapter"
        if folder is None:
            folder = Path(temporary) / "model"
            torch.manual_seed(0)
            save(CausalLM(ModelConfig.from_hf(SMOLLM2)).bfloat16(), folder)
        ours = load(folder, dtype="bf16")
        torch.manual_seed(0)
        attach(ours, LoraConfig(r=8, lora_alpha=16))
        with torch.no_grad():
            for key, parameter in adapter_parameters(ours).items():
                if "lora_B" in key:
                    parameter.normal_(0, 0.01)
        save_adapter(ours, adapter)
        wide = load(folder, dtype="fp32")
        load_adapter(wide, adapter)
        other = peer(folder, adapter) if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers") else None
        trained = list(adapter_parameters(ours).values())
        rows = []
        for shape in SHAPES:
            rows.append(compare(shape, ours, trained, wide, other, options))
        _bench.save("rl", rows, options, {"model": "real" if cached_model() else "random"})


def compare(shape: tuple[int, ...], ours: CausalLM, trained: list, wide: CausalLM, other, options) -> dict:
    given = sequences(*shape)
    weights = torch.randn(len(given) * shape[3])
    with torch.no_grad():
        exact = packed(wide, given)
        found = {"posttrain": shared(ours, given), "packed rows": packed(ours, given)}
        if other is not None:
            found["transformers + PEFT"] = theirs(other, given)
    errors = {name: (logps - exact).square().mean().sqrt().item() for name, logps in found.items()}
    print("error of log-probabilities:", ", ".join(f"{name} {error:.2e}" for name, error in errors.items()))
    assert errors["posttrain"] <= 2 * errors.get("transformers + PEFT", errors["packed rows"]), "less accurate than the peer"
    candidates = {
        "posttrain": lambda: update(shared, ours, trained, given, weights),
        "packed rows": lambda: update(packed, ours, trained, given, weights),
        "transformers + PEFT": None,
    }
    if other is not None:
        theirs_trained = [p for p in other.parameters() if p.requires_grad]
        candidates["transformers + PEFT"] = lambda: update(theirs, other, theirs_trained, given, weights)
    prompts, P, G, C = shape
    batch = collate(given)
    title = f"{prompts} prompts of {P}, {G} x {C} each"
    print(f"{title}: {batch.num_tokens} tokens in rows, {len(given) * (P + C)} with a prompt a completion")
    times = _bench.in_turn(candidates, options)
    return _bench.row(title, times, 2 * sum(p.numel() for p in ours.parameters()), _bench.bandwidth(options))


if __name__ == "__main__":
    main()
