"""GGUF files for tests, written field by field from the format's description."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

TYPES = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
GGML = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
BLOCK = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34)}

Entry = tuple[str, str, Any]  # key, type ("str", "[u32]", ...), value
Tensor = tuple[str, tuple[int, ...], str, bytes]  # name, row-major shape, type, data


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, kind: str, value: Any) -> bytes:
    if kind == "str":
        return string(key) + struct.pack("<I", 8) + string(value)
    if kind == "[str]":
        return string(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    if kind.startswith("["):
        number, code = TYPES[kind[1:-1]]
        return string(key) + struct.pack("<IIQ", 9, number, len(value)) + struct.pack(f"<{len(value)}{code}", *value)
    number, code = TYPES[kind]
    return string(key) + struct.pack(f"<I{code}", number, value)


def gguf_bytes(entries: list[Entry], tensors: list[Tensor], alignment: int = 32, version: int = 3) -> bytes:
    """A whole file. `alignment` must also be among the entries when it is not 32."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    header += b"".join(entry(*e) for e in entries)
    data = b""
    for name, shape, kind, raw in tensors:
        data += b"\0" * (-len(data) % alignment)
        header += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", GGML.get(kind, kind), len(data))
        data += raw
    return header + b"\0" * (-len(header) % alignment) + data


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> bytes:
    """Random finite data of `kind`: random codes under float16 scales (and minima) of the size of weights."""
    per_block, block_bytes = BLOCK[kind]
    count = int(np.prod(shape)) // per_block
    if kind == "F32":
        return rng.standard_normal(count).astype("<f4").tobytes()
    if kind == "F16":
        return rng.standard_normal(count).astype("<f2").tobytes()
    if kind == "BF16":
        return (rng.standard_normal(count).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    scales = 4 if kind == "Q4_1" else 2
    blocks[:, :scales] = (rng.standard_normal((count, scales // 2)) / 64).astype("<f2").view(np.uint8)
    return blocks.tobytes()


def byte_level_alphabet() -> list[str]:
    """GPT-2's 256 characters for bytes: printable Latin-1 ones stand for themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [characters[b] for b in range(256)]


CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_llama(rng: np.random.Generator, kind: str = "Q4_1", tied: bool = True) -> tuple[list[Entry], list[Tensor]]:
    """Entries and tensors of a llama: 2 layers, hidden 32, 4 heads of 8, 2 key/value heads, inner 64, 262 tokens."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_level_alphabet(), "he", "ll", "hell"]
    entries: list[Entry] = [
        ("general.architecture", "str", "llama"),
        ("llama.block_count", "u32", 2),
        ("llama.context_length", "u32", 128),
        ("llama.embedding_length", "u32", 32),
        ("llama.feed_forward_length", "u32", 64),
        ("llama.attention.head_count", "u32", 4),
        ("llama.attention.head_count_kv", "u32", 2),
        ("llama.rope.freq_base", "f32", 1e5),
        ("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5),
        ("llama.rope.dimension_count", "u32", 8),
        ("llama.vocab_size", "u32", len(tokens)),
        ("tokenizer.ggml.model", "str", "gpt2"),
        ("tokenizer.ggml.pre", "str", "smollm"),
        ("tokenizer.ggml.tokens", "[str]", tokens),
        ("tokenizer.ggml.token_type", "[i32]", [3] * 3 + [1] * (len(tokens) - 3)),
        ("tokenizer.ggml.merges", "[str]", ["h e", "l l", "he ll"]),
        ("tokenizer.ggml.bos_token_id", "u32", 1),
        ("tokenizer.ggml.eos_token_id", "u32", 2),
        ("tokenizer.ggml.unknown_token_id", "u32", 0),
        ("tokenizer.ggml.padding_token_id", "u32", 2),
        ("tokenizer.ggml.add_bos_token", "bool", False),
        ("tokenizer.chat_template", "str", CHAT_TEMPLATE),
    ]
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_norm": (32,),
                "attn_q": (32, 32),
                "attn_k": (16, 32),
                "attn_v": (16, 32),
                "attn_output": (32, 32),
                "ffn_norm": (32,),
                "ffn_gate": (64, 32),
                "ffn_up": (64, 32),
                "ffn_down": (32, 64),
            }.items()
        }
    if not tied:
        shapes["output"] = (len(tokens), 32)
    tensors = []
    for name, shape in shapes.items():
        used = "F32" if len(shape) == 1 else kind
        tensors.append((f"{name}.weight", shape, used, random_blocks(rng, shape, used)))
    return entries, tensors
