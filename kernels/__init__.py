"""Operations: tensors in, tensors out. Importing this imports torch; triton only where it is installed."""
from .double_quant import DoubleQuantized, double_dequantize, double_quantize
from .lora_linear import lora_linear, lora_linear_group
from .nf4 import dequantize_fp4, dequantize_nf4, quantize_fp4, quantize_nf4
from .quantized_linear import quantized_linear
from .quantized_weight import QuantizedWeight, quantize_weight

__all__ = [
    "DoubleQuantized",
    "QuantizedWeight",
    "dequantize_fp4",
    "dequantize_nf4",
    "double_dequantize",
    "double_quantize",
    "lora_linear",
    "lora_linear_group",
    "quantize_fp4",
    "quantize_nf4",
    "quantize_weight",
    "quantized_linear",
]
