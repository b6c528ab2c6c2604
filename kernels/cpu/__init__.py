"""The CPU engine: native C where it was built, else PyTorch. Which one runs is fixed at import; `describe()` tells."""

from __future__ import annotations

from importlib.util import find_spec

import torch

if find_spec("._native", __package__) is not None:
    from . import native as engine
    from . import native_attention as attention_engine
    from . import native_linear as linear_engine
    from . import native_lora as lora_engine
    from .native import multi_lora_add
    from .native_logits import logit_rows
    from .native_logprobs import fused_logprobs
    from .native_rms_norm import rms_norm, rms_norm_backward
    from .native_rope import rope
    from .native_spec_verify import logit_filter, tree_attention, verify_draft_tokens, verify_draft_tree
    from .native_swiglu import swiglu, swiglu_backward
else:
    from . import pytorch as engine  # type: ignore[no-redef]
    from . import pytorch as linear_engine  # type: ignore[no-redef]
    from . import pytorch_lora as lora_engine  # type: ignore[no-redef]
    from .pytorch_logit_filter import logit_filter
    from .pytorch_logits import fused_logprobs, logit_rows
    from .pytorch_multi_lora import multi_lora_add
    from .pytorch_rms_norm import rms_norm, rms_norm_backward
    from .pytorch_rope import rope
    from .pytorch_spec_verify import tree_attention, verify_draft_tokens, verify_draft_tree
    from .pytorch_swiglu import swiglu, swiglu_backward

    attention_engine = None  # type: ignore[assignment]

quantize_4bit = engine.quantize_4bit
dequantize_4bit = engine.dequantize_4bit
double_quantize = engine.double_quantize
double_dequantize = engine.double_dequantize
dense_linear = linear_engine.dense_linear
linear_4bit = linear_engine.linear_4bit
linear_4bit_dx = linear_engine.linear_4bit_dx
lora_linear = lora_engine.lora_linear
lora_linear_backward = lora_engine.lora_linear_backward
lora_linear_group = lora_engine.lora_linear_group
lora_linear_group_backward = lora_engine.lora_linear_group_backward

__all__ = [
    "attention_engine",
    "dense_linear",
    "dequantize_4bit",
    "describe",
    "double_dequantize",
    "double_quantize",
    "fused_logprobs",
    "linear_4bit",
    "linear_4bit_dx",
    "logit_filter",
    "logit_rows",
    "lora_linear",
    "lora_linear_backward",
    "lora_linear_group",
    "lora_linear_group_backward",
    "multi_lora_add",
    "quantize_4bit",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
    "tree_attention",
    "verify_draft_tokens",
    "verify_draft_tree",
]


def describe() -> dict[str, str | int]:
    """Which CPU engine runs and why, for `posttrain doctor`: engine, isa, threads, why."""
    threads = torch.get_num_threads()
    if engine.__name__.endswith("pytorch"):
        why = "the native extension was not built: install a C compiler, then reinstall"
        return {"engine": "pytorch", "isa": "-", "threads": threads, "why": why}
    why = f"the best of this machine's {', '.join(engine.levels())}; {engine.THREADING}"
    return {"engine": "native", "isa": engine.ISA, "threads": threads, "why": why}
