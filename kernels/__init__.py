"""Operations: tensors in, tensors out. Importing this imports torch; triton only where it is installed."""

from .double_quant import DoubleQuantized, double_dequantize, double_quantize
from .linear_logprobs import linear_logprobs
from .logit_filter import logit_filter
from .lora_linear import lora_linear, lora_linear_group
from .multi_lora_linear import AdapterSegments, check_adapter_ids, multi_lora_linear, segment_rows
from .nf4 import dequantize_fp4, dequantize_nf4, quantize_fp4, quantize_nf4
from .preference_loss import dpo_loss, kto_loss, preference_loss
from .quantized_linear import quantized_linear
from .quantized_weight import QuantizedWeight, quantize_weight
from .rms_norm import rms_norm
from .rope import rope
from .spec_verify import verify_draft_tokens
from .spec_verify_tree import tree_attention, verify_draft_tree
from .swiglu import swiglu

__all__ = [
    "AdapterSegments",
    "DoubleQuantized",
    "QuantizedWeight",
    "check_adapter_ids",
    "dequantize_fp4",
    "dequantize_nf4",
    "double_dequantize",
    "double_quantize",
    "dpo_loss",
    "kto_loss",
    "linear_logprobs",
    "logit_filter",
    "lora_linear",
    "lora_linear_group",
    "multi_lora_linear",
    "preference_loss",
    "quantize_fp4",
    "quantize_nf4",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rope",
    "segment_rows",
    "swiglu",
    "tree_attention",
    "verify_draft_tokens",
    "verify_draft_tree",
]
