"""A Llama-family GGUF file rewritten as a Hugging Face directory that any reader of safetensors can use.

Values are those of the GGUF, dequantized: rewriting does not bring back what its quantization lost. As float32 they are
exact (a Q4_1 weight d * code + m seldom fits a shorter format); as bfloat16 each is rounded once to 8 significant bits.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from posttrain.atomic import atomic_dir
from posttrain.model.gguf import GGUF

_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "gpt-2": lambda: _byte_level(),
    "default": lambda: _byte_level(),
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf_path: str | os.PathLike, out: str | os.PathLike, dtype: str = "float32", max_shard_bytes: int = 5 * 10**9) -> Path:
    """Write `gguf_path` as the Hugging Face directory `out`, whole or not at all. See `write_hf`."""
    with atomic_dir(out) as folder:
        write_hf(gguf_path, folder, dtype, max_shard_bytes)
    return Path(out)


def write_hf(gguf_path: str | os.PathLike, folder: Path, dtype: str = "float32", max_shard_bytes: int = 5 * 10**9) -> None:
    """Write `gguf_path` into `folder` as Hugging Face keeps a model, one tensor in memory at a time.

    dtype            "float32" keeps every value exact; "bfloat16" rounds to nearest even and halves the size
    max_shard_bytes  a larger model is written as several safetensors files and an index

    Raises ValueError for an architecture, tokenizer or rope scaling that this conversion does not know.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {list(_DTYPES)}")
    with GGUF(gguf_path) as gguf:
        config = hf_config(gguf) | {"dtype": dtype}
        _write_json(folder / "config.json", config)
        _write_json(
            folder / "generation_config.json",
            {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config},
        )
        hf_tokenizer(gguf).save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", tokenizer_config(gguf))
        names = {hf_name(name): name for name in gguf.tensors}
        _check_tensors(gguf, config, names)
        _write_weights(folder, gguf, names, config, dtype, max_shard_bytes)


def hf_config(gguf: GGUF) -> dict[str, Any]:
    """config.json of a `llama` GGUF."""
    meta = gguf.metadata
    if (architecture := meta.get("general.architecture")) != "llama":
        raise ValueError(f"{gguf.path}: architecture is {architecture!r}; this conversion knows 'llama'")
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in gguf.tensors:
        raise ValueError(
            f"{gguf.path}: uses rope scaling, whose Hugging Face parameters a GGUF does not keep; "
            "use the model's Hugging Face directory"
        )
    hidden, heads = _get(gguf, "llama.embedding_length", int), _get(gguf, "llama.attention.head_count", int)
    head_dim = meta.get("llama.attention.key_length", meta.get("llama.rope.dimension_count", hidden // heads))
    embedding = gguf.tensors.get("token_embd.weight")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _get(gguf, "llama.feed_forward_length", int),
        "num_hidden_layers": _get(gguf, "llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0] if embedding else _get(gguf, "llama.vocab_size", int),
        "max_position_embeddings": _get(gguf, "llama.context_length", int),
        # Stored as float32: 1e-05 comes back as 9.999999747378752e-06. The shortest decimal is what was meant.
        "rms_norm_eps": float(str(np.float32(_get(gguf, "llama.attention.layer_norm_rms_epsilon", float)))),
        "rope_theta": float(str(np.float32(meta.get("llama.rope.freq_base", 10000.0)))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    for key, entry in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if f"tokenizer.ggml.{entry}_token_id" in meta:
            config[key] = meta[f"tokenizer.ggml.{entry}_token_id"]
    return config


def hf_tokenizer(gguf: GGUF) -> Tokenizer:
    """The byte-level BPE tokenizer inside `gguf`, as tokenizer.json keeps it."""
    meta = gguf.metadata
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{gguf.path}: tokenizer is {model!r} with pre-tokenizer {pre!r}; this conversion knows "
            f"byte-level BPE ('gpt2') with {list(_PRE_TOKENIZERS)}. Use the model's own tokenizer.json"
        )
    tokens, merges = _get(gguf, "tokenizer.ggml.tokens", list), _get(gguf, "tokenizer.ggml.merges", list)
    kinds = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(f"{gguf.path}: {len(kinds)} token types for {len(tokens)} tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not vocab.keys() >= {pair[0], pair[1], "".join(pair)}:
            raise ValueError(f"{gguf.path}: merge {' '.join(pair)!r} does not join two tokens into a third")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
    if meta.get("tokenizer.ggml.add_bos_token", False):
        bos_id = _get(gguf, "tokenizer.ggml.bos_token_id", int)
        bos = _token(gguf, bos_id)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def tokenizer_config(gguf: GGUF) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name and the chat template."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": _get(gguf, "llama.context_length", int),
    }
    for name, entry in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (token_id := gguf.metadata.get(f"tokenizer.ggml.{entry}_token_id")) is not None:
            config[f"{name}_token"] = _token(gguf, token_id)
    if "tokenizer.chat_template" in gguf.metadata:
        config["chat_template"] = gguf.metadata["tokenizer.chat_template"]
    return config


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        if match[2] in _LAYER_TENSORS:
            return f"model.layers.{int(match[1])}.{_LAYER_TENSORS[match[2]]}.weight"
    elif (stem := name.removesuffix(".weight")) != name and stem in _TOP_TENSORS:
        return f"{_TOP_TENSORS[stem]}.weight"
    raise ValueError(f"tensor {name!r} is not one of a llama model's (biases and mixtures of experts are not converted)")


def undo_rope_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj (num_heads * head_dim, K) back in Hugging Face's order.

    GGUF rotates neighbouring rows (0, 1), (2, 3), ...; Hugging Face rotates row i with row i + head_dim / 2. Within
    each head GGUF's row 2 i + j is Hugging Face's row j * head_dim / 2 + i.
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _check_tensors(gguf: GGUF, config: dict[str, Any], names: dict[str, str]) -> None:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    expected = {
        f"model.layers.{i}.{name}.weight": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()
    }
    expected |= {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (config["vocab_size"], hidden)
    if missing := expected.keys() - names.keys():
        raise ValueError(f"{gguf.path}: no tensor for {sorted(missing)[:3]} ({len(missing)} missing)")
    for name, original in names.items():
        if name not in expected:
            raise ValueError(f"{gguf.path}: tensor {original!r} is beyond the {config['num_hidden_layers']} layers announced")
        if (shape := gguf.tensors[original].shape) != expected[name]:
            raise ValueError(f"{gguf.path}: tensor {original!r} has shape {shape}, expected {expected[name]}")


def _write_weights(
    folder: Path, gguf: GGUF, names: dict[str, str], config: dict[str, Any], dtype: str, max_shard_bytes: int
) -> None:
    itemsize = _DTYPES[dtype][1]
    sizes = {name: int(np.prod(gguf.tensors[original].shape)) * itemsize for name, original in names.items()}
    shards = list(_shards(sizes, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(shard, file_name)
        with open(folder / file_name, "wb") as file:
            _write_header(file, {name: (gguf.tensors[names[name]].shape, sizes[name]) for name in shard}, dtype)
            for name in shard:
                weight = gguf.read(names[name])
                if name.endswith("q_proj.weight"):
                    weight = undo_rope_permutation(weight, config["num_attention_heads"])
                elif name.endswith("k_proj.weight"):
                    weight = undo_rope_permutation(weight, config["num_key_value_heads"])
                file.write((weight.astype("<f4", copy=False) if dtype == "float32" else to_bfloat16(weight)).data)
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        )


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even bfloat16, as uint16 bit patterns (NumPy has no bfloat16). NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2")


def _shards(sizes: dict[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    used = 0
    for name, size in sizes.items():
        if shard and used + size > max_shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size
    yield shard


def _write_header(file: BinaryIO, tensors: dict[str, tuple[tuple[int, ...], int]], dtype: str) -> None:
    # safetensors: u64 length of the header, JSON header padded with spaces to 8 bytes, tensors back to back.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, nbytes) in tensors.items():
        header[name] = {"dtype": _DTYPES[dtype][0], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _get(gguf: GGUF, key: str, kind: type) -> Any:
    value = gguf.metadata.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{gguf.path}: metadata {key!r} is {str(value)[:40]!r}, expected {kind.__name__}")
    return value


def _token(gguf: GGUF, token_id: int) -> str:
    tokens = _get(gguf, "tokenizer.ggml.tokens", list)
    if not 0 <= token_id < len(tokens):
        raise ValueError(f"{gguf.path}: special token id {token_id} is outside the vocabulary of {len(tokens)}")
    return tokens[token_id]


def _write_json(path: Path, value: Iterable[Any] | dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
