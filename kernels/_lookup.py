"""What every kernel that reads 4-bit weights does: decode a block's absmax, and turn codes into values.

A 16-bit value takes no arithmetic per weight on NVIDIA. A block has only 16 different products value[code] * absmax, so
`product_table` forms them once (rounded once each, as the format demands) and keeps them in eight registers, low bytes
apart from high bytes; `lookup_word` then picks bytes out of them with PRMT, which indexes eight bytes by four 3-bit
selectors at once: 2.6 instructions a weight, no memory access and no branch. AMD and fp32 output multiply instead
(`value` gathered from a 16-entry table); both ways give the same bits, since both round value * absmax once.
"""

from __future__ import annotations

import struct

from . import codebooks
from ._triton import tl, triton


def _product_table_asm(values: list[float], dtype: str) -> str:
    """PTX: $8 is absmax; $0..$3 get the 16 products' low bytes, four a register in code order, $4..$7 their high bytes."""
    lines = ["{", ".reg .f32 p<16>;", ".reg .b32 h<8>;"]
    for i, value in enumerate(values):
        lines.append(f"mul.rn.f32 p{i}, $8, 0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X};")
    lines += [f"cvt.rn.{dtype}x2.f32 h{i}, p{2 * i + 1}, p{2 * i};" for i in range(8)]
    for i in range(4):
        lines.append(f"prmt.b32 ${i}, h{2 * i}, h{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 ${i + 4}, h{2 * i}, h{2 * i + 1}, 0x7531;")
    return "\n".join([*lines, "}"])


def _lookup_word_asm() -> str:
    """PTX: $4 holds eight codes (four packed bytes), $5..$12 the table; $0..$3 get the eight values, two a register.

    PRMT reads the low 16 bits of its selector, a nibble for each result byte: `s` holds the codes' low three bits, `m`
    picks between the table's halves by the codes' high bit. The high nibble comes first, so elements lie 1, 0, 3, 2.
    """
    lines = ["{", ".reg .b32 s0, s1, m0, m1, a, b, low, high;"]
    lines += ["and.b32 s0, $4, 0x77777777;", "shr.u32 s1, s0, 16;"]
    lines += ["shr.u32 m0, $4, 1;", "lop3.b32 m0, m0, 0x44444444, 0x32103210, 0xEA;", "shr.u32 m1, m0, 16;"]
    for half in (0, 1):
        for byte, first in (("low", 5), ("high", 9)):
            lines.append(f"prmt.b32 a, ${first}, ${first + 1}, s{half};")
            lines.append(f"prmt.b32 b, ${first + 2}, ${first + 3}, s{half};")
            lines.append(f"prmt.b32 {byte}, a, b, m{half};")
        lines.append(f"prmt.b32 ${2 * half}, low, high, 0x4051;")
        lines.append(f"prmt.b32 ${2 * half + 1}, low, high, 0x6273;")
    return "\n".join([*lines, "}"])


_NF4_BF16 = tl.constexpr(_product_table_asm(codebooks.NF4.tolist(), "bf16"))
_NF4_FP16 = tl.constexpr(_product_table_asm(codebooks.NF4.tolist(), "f16"))
_FP4_BF16 = tl.constexpr(_product_table_asm(codebooks.FP4.tolist(), "bf16"))
_FP4_FP16 = tl.constexpr(_product_table_asm(codebooks.FP4.tolist(), "f16"))
_LOOKUP_WORD = tl.constexpr(_lookup_word_asm())


@triton.jit
def decode_absmax(absmax_ptr, block, mask, dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, NESTED_BLOCK: tl.constexpr):
    """absmax float32 of `block` (any shape): what absmax_ptr holds if NESTED_BLOCK is 0, else map[code] * nested + offset."""
    if NESTED_BLOCK == 0:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:  # two roundings: every launch sets enable_fp_fusion=False
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=mask, other=0.0)
        absmax = tl.load(dynamic_map_ptr + code) * nested + tl.load(nested_offset_ptr)
    return absmax


@triton.jit
def product_table(absmax, QUANT_TYPE: tl.constexpr, DTYPE: tl.constexpr):
    """Eight int32 per element of absmax: the bytes of its 16 products in DTYPE (bfloat16 or float16). NVIDIA only."""
    nf4: tl.constexpr = _NF4_BF16 if DTYPE == tl.bfloat16 else _NF4_FP16
    fp4: tl.constexpr = _FP4_BF16 if DTYPE == tl.bfloat16 else _FP4_FP16
    asm: tl.constexpr = nf4 if QUANT_TYPE == "nf4" else fp4
    return tl.inline_asm_elementwise(
        asm, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,f", [absmax], dtype=(tl.int32,) * 8, is_pure=True, pack=1
    )


@triton.jit
def lookup_word(word, t0, t1, t2, t3, t4, t5, t6, t7):
    """The eight values of a packed int32 word, as four int32 of two 16-bit values, in memory order. NVIDIA only."""
    return tl.inline_asm_elementwise(
        _LOOKUP_WORD, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r", [word, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(tl.int32,) * 4, is_pure=True, pack=1,
    )  # fmt: skip
