"""`posttrain sft --method`: each method's adapter unless said otherwise, and the rate it learns at.

The adapters' sizes are the papers' or PEFT's usual ones. Rates of lora and qlora are the quickstart's, which were chosen on
its validation split. The others' were tried on it with SmolLM2-135M, 40 steps of 2 x 256 tokens, mostly one rate each:

    adapter    1e-3                       NF4, 300 items    0.893    untrained 0.793
    ia3        1e-2                       bf16, 150 items   0.907    untrained 0.840
    prompt     3e-2                       bf16, 150 items   0.887
    prefix     3e-3, words, 100 steps     bf16, 200 items   0.890    untrained 0.805
               1e-3, a text, 100 steps    bf16, 300 items   0.880    untrained 0.817
               1e-3, another text         bf16, 200 items   0.845    untrained 0.805
               1e-2, a text               bf16, 150 items   0.800
               1e-2, from zeros           bf16, 150 items   0.753
               3e-2, from zeros           bf16, 150 items   0.767
    p-tuning   3e-4, 100 steps            bf16, 300 items   0.910    untrained 0.817
               1e-4, 100 steps            bf16, 300 items   0.870
               1e-3, 100 steps            bf16, 300 items   0.803
               1e-2                       bf16, 150 items   0.600, and 0.867 in another run
    full       3e-5                       fp32, 150 items   0.900    (measured in bf16)

So a prefix wants to begin as the keys and values of words ("sample_vocab"; of a text with `--init-text`) and more steps. P-tuning's
rate is prompt tuning's over what its encoder makes of it, some hundredfold at SmolLM2's width and more at a greater one:
docs/math/virtual_tokens.md, "The rate of P-tuning". dora's is lora's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .bottleneck import BottleneckConfig
from .ia3 import IA3Config
from .lora_config import LoraConfig
from .p_tuning import PromptEncoderConfig
from .prefix import PrefixTuningConfig
from .prompt import PromptTuningConfig


@dataclass(frozen=True)
class Recipe:
    """kind: the adapter's configuration, made with `defaults`; None trains the model's own weights. quantize: the base's
    format unless another is asked for."""

    kind: type | None
    learning_rate: float
    defaults: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    def adapter(self, **given: Any) -> Any:
        """The configuration with these fields instead of the defaults. ValueError for a field that the method lacks."""
        known = {f.name for f in fields(self.kind)} if self.kind is not None else set()
        if unknown := sorted(given.keys() - known):
            what = "the method trains the model's own weights" if self.kind is None else f"it takes {', '.join(sorted(known))}"
            raise ValueError(f"{', '.join(unknown)} is no setting of this method; {what}")
        return None if self.kind is None else self.kind(**{**self.defaults, **given})


_LORA = {"r": 8, "lora_alpha": 16}
RECIPES: dict[str, Recipe] = {
    "lora": Recipe(LoraConfig, 1e-3, _LORA),
    "qlora": Recipe(LoraConfig, 1e-3, _LORA, quantize="nf4"),
    "dora": Recipe(LoraConfig, 1e-3, _LORA | {"use_dora": True}),
    "adapter": Recipe(BottleneckConfig, 1e-3),
    "prefix": Recipe(PrefixTuningConfig, 3e-3, {"num_virtual_tokens": 20, "init_weights": "sample_vocab"}),
    "prompt": Recipe(PromptTuningConfig, 3e-2, {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p-tuning": Recipe(PromptEncoderConfig, 3e-4, {"num_virtual_tokens": 20}),
    "ia3": Recipe(IA3Config, 1e-2),
    "full": Recipe(None, 3e-5),
}
