"""Decoders of the Llama family: configuration, forward pass, cache, generation, files."""

from .config import ModelConfig, parse_dtype
from .decoder import CausalLM
from .generate import generate
from .kv_cache import KVCache
from .loading import load, save

__all__ = ["CausalLM", "KVCache", "ModelConfig", "generate", "load", "parse_dtype", "save"]
