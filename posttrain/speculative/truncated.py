"""A draft out of its own target: some of its layers, the embedding, the norm and the head, distilled from the whole.

The layers that are kept and the final norm train; embedding and head stay the target's (a fifth of SmolLM2-135M, which the draft
pays for whole). Loss over positions with a label: KL of the draft's next-token distribution from the target's. What is saved is an
ordinary Hugging Face folder with the target's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from posttrain.model.decoder import CausalLM
from posttrain.quantized import QuantizedLinear

from .draft_data import DraftBatch
from .soft_targets import linear_kl

HORIZON = 1


def spread_layers(num_layers: int, count: int) -> list[int]:
    """`count` layers at even distances, the first and the last among them (one alone: the first)."""
    if not 1 <= count < num_layers:
        raise ValueError(f"{count} layers of {num_layers} are to be kept; expected 1 to {num_layers - 1}")
    return [0] if count == 1 else [round(i * (num_layers - 1) / (count - 1)) for i in range(count)]


def truncate(target: CausalLM, layers: Sequence[int]) -> CausalLM:
    """A model of these layers of the target, in this order, with copies of its weights. ValueError for layers that it lacks."""
    count = target.config.num_hidden_layers
    if not layers or len(set(layers)) != len(layers) or not 0 <= min(layers) <= max(layers) < count:
        raise ValueError(f"layers are {list(layers)}; expected different ones from 0 to {count - 1}")
    if any(isinstance(module, QuantizedLinear) for module in target.modules()):
        raise ValueError("a draft is cut out of dense weights; load the target without quantize")
    types = target.config.layer_types
    config = replace(
        target.config,
        num_hidden_layers=len(layers),
        layer_types=None if types is None else tuple(types[layer] for layer in layers),
    )
    with torch.device("meta"):
        draft = CausalLM(config)
    state = target.state_dict()
    kept = {name: state[_source(name, layers)].clone() for name in draft.state_dict()}
    draft.load_state_dict(kept, assign=True)
    return draft.eval()


def _source(name: str, layers: Sequence[int]) -> str:
    """The target's name of a draft's tensor."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts[2] = str(layers[int(parts[2])])
    return ".".join(parts)


class Distilled(nn.Module):
    """A draft in training: `masters`, float32 copies of what trains, are cast to the draft's dtype at each step."""

    draft: CausalLM

    def __init__(self, draft: CausalLM):
        super().__init__()
        self.__dict__["draft"] = draft.requires_grad_(False)  # not a submodule: the masters alone are this module's parameters
        names = [name for name, _ in draft.named_parameters() if name.startswith(("model.layers.", "model.norm."))]
        parameters = dict(draft.named_parameters())
        self.masters = nn.ParameterDict({name.replace(".", "/"): parameters[name].detach().float() for name in names})

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by their names in the draft, in its dtype."""
        dtype = self.draft.model.embed_tokens.weight.dtype
        return {name.replace("/", "."): master.to(dtype) for name, master in self.masters.items()}

    def hidden(self, input_ids: Tensor) -> Tensor:
        """The draft's hidden states (B, T, D)."""
        return torch.func.functional_call(_Hidden(self.draft), {f"model.{k}": v for k, v in self.weights().items()}, (input_ids,))

    @torch.no_grad()
    def finish(self) -> CausalLM:
        """The draft with what was learned."""
        for name, weight in self.weights().items():
            self.draft.get_parameter(name).copy_(weight)
        self.draft.fingerprint = None
        return self.draft


class _Hidden(nn.Module):
    """A model whose forward is its `hidden`: what functional_call calls."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.hidden(input_ids)


def head_weight(model: CausalLM) -> Tensor:
    """(V, D), dense."""
    return (model.model.embed_tokens.weight if model.config.tie_word_embeddings else model.lm_head.weight).detach()


def loss_sum(module: Distilled, batch: DraftBatch) -> Tensor:
    """Sum of the KL over the positions that count."""
    learned, head = batch.learned(), head_weight(module.draft)
    return linear_kl(module.hidden(batch.input_ids)[learned], head, batch.hidden[learned], head).sum()


@torch.no_grad()
def agreement(draft: CausalLM, batches: list[DraftBatch]) -> dict[str, float]:
    """On held-out text: how often the draft's most probable token is the target's, and the mean over tokens of
    sum_x min(p(x), q(x)), the probability that a token sampled from the draft is accepted (Leviathan's alpha)."""
    same, overlap, count, head = 0.0, 0.0, 0, head_weight(draft)
    for batch in batches:
        learned = batch.learned()
        ours = draft.hidden(batch.input_ids)[learned]
        for mine, theirs in zip(ours.split(256), batch.hidden[learned].split(256), strict=True):
            q, p = (mine @ head.t()).float(), (theirs @ head.t()).float()
            same += (q.argmax(-1) == p.argmax(-1)).sum().item()
            overlap += torch.minimum(q.softmax(-1), p.softmax(-1)).sum().item()
            count += len(mine)
    return {"greedy_agreement": same / max(count, 1), "alpha": overlap / max(count, 1)}
