"""Adapters on disk as PEFT has them: adapter_config.json and adapter_model.safetensors.

Keys are `base_model.model.<layer>.lora_A.weight` and the like. The safetensors metadata carries, beside PEFT's `format`,
the fingerprint of the base that the adapter was trained on: PEFT passes over it, `load_adapter` refuses another base. An
adapter without one (PEFT's own) is taken at its word.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection, Mapping, Set
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from posttrain.atomic import atomic_write
from posttrain.errors import PosttrainError
from posttrain.fingerprint import METADATA_KEY
from posttrain.model.safetensors_file import SafetensorsReader, write_safetensors

Config = TypeVar("Config")

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The adapter's name in a key, as PEFT has it in memory: lora_A.default.weight.
_NAMED = re.compile(
    r"(\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l))\.(?!(?:weight|bias)$)[^.]+(?=\.(?:weight|bias)$|$)"
)
_MAGNITUDE = re.compile(r"(?<=\.lora_magnitude_vector)\.weight$")
# Fields that say where an adapter comes from; nothing here depends on them.
PROVENANCE = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config",
)  # fmt: skip


def read_config(
    kind: type[Config],
    content: Mapping[str, Any],
    source: str | os.PathLike,
    refused: Collection[str] = (),
    ignored: Collection[str] = (),
) -> Config:
    """The configuration of type `kind` that an adapter_config.json describes.

    refused: fields that change what an adapter computes or holds, in ways that are not supported: an error unless off.
    ignored: fields on which nothing here depends. Others that are unknown and set are passed over with a warning.
    """
    for key in refused:
        if content.get(key):
            raise PosttrainError(
                f"{source}: {key} is {content[key]!r}; adapters that use it are not supported: where PEFT can merge it into its "
                "base (merge_and_unload), load the merged model"
            )
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    for key in content.keys() - known - set(refused) - set(ignored) - set(PROVENANCE):
        if content[key]:
            warnings.warn(f"{source}: unknown field {key}={content[key]!r} is passed over", stacklevel=2)
    try:
        return kind(**{k: v for k, v in content.items() if k in known and v is not None})
    except ValueError as error:
        raise PosttrainError(f"{source}: {error}") from error


def check_types(kind: type, content: Mapping[str, Any], source: str | os.PathLike) -> None:
    """PosttrainError naming the field of adapter_config.json whose value the field of `kind` cannot have. null is nothing: no
    value of a field whose default is something, but for target_modules, where it is PEFT's own default."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        value = content.get(field.name)
        nothing = field.name == "target_modules" or field.default in (None, False, MISSING)
        if value is None and field.name in content and not nothing:
            raise PosttrainError(f"{source}: {field.name} is null; expected {field.type}")
        if value is not None and not _is_a(value, hints[field.name]):
            raise PosttrainError(f"{source}: {field.name} is {value!r}, of another type than PEFT writes; expected {field.type}")


def plain_fields(config: Any) -> None:
    """Give a configuration's fields the types that its file can hold: tuples, sets and ranges become lists, scalars of numpy and
    torch Python's. ValueError naming the first that is of another type still: better now than when training has ended."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        given = getattr(config, field.name)
        value = _plain(given)
        if not _is_a(value, hints[field.name]):
            raise ValueError(f"{field.name} is {given!r}; expected {field.type}")
        object.__setattr__(config, field.name, value)


def _plain(value: Any) -> Any:
    """The value as JSON has it, if it has."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        value = sorted(value, key=str)
    return [_plain(item) for item in value] if isinstance(value, list | tuple | range) else value


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value that JSON holds is of the type that the hint says; a whole number is a float, and a bool no number."""
    inner = get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_a(item, inner[0]) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) and _is_a(item, inner[1]) for key, item in value.items())
    if inner:
        return any(_is_a(value, one) for one in inner)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def write_adapter(
    path: str | os.PathLike, content: Mapping[str, Any], tensors: Mapping[str, Tensor], fingerprint: str | None
) -> None:
    """Write the folder `path`: `tensors` under the file's keys and adapter_config.json; each file whole or not at all."""
    path = Path(path)
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    with atomic_write(path / CONFIG_FILE) as description, atomic_write(path / WEIGHTS_FILE) as weights:
        description.write_text(text, encoding="utf-8")
        write_safetensors(weights, tensors.items(), {METADATA_KEY: fingerprint} if fingerprint else {})


def _without_names(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors under the keys of PEFT's files, where a file has those of its modules: with the adapter's name after the table's,
    and `.weight` after DoRA's magnitudes. PosttrainError where two adapters are in one file."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = _MAGNITUDE.sub("", _NAMED.sub(r"\1", key))
        if plain in found:
            raise PosttrainError(f"{source} holds {plain} of several adapters ({key} and another); save them one by one")
        found[plain] = tensor
    return found


def read_adapter(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """(adapter_config.json's content, tensors by key, fingerprint of the base or None) of the adapter in the folder `path`."""
    path = Path(path)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / file).is_file():
            raise PosttrainError(f"{path} holds no {file}; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PosttrainError(f"{path / CONFIG_FILE} is not JSON in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise PosttrainError(f"{path / CONFIG_FILE}: expected a JSON object, found {type(content).__name__}")
    with SafetensorsReader(path / WEIGHTS_FILE) as reader:
        tensors, metadata = {name: reader.read(name) for name in reader.entries}, reader.metadata
    tensors = _without_names(tensors, path / WEIGHTS_FILE)
    return content, tensors, metadata.get(METADATA_KEY)


def check_keys(path: str | os.PathLike, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """PosttrainError naming keys, shapes and dtypes of a file that are not those expected."""
    problems = [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    problems += [f"{key} is of no layer that the config selects" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{key} is {tuple(tensors[key].shape)} and the layer takes {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    problems += [f"{key} is {t.dtype}, expected a floating-point tensor" for key, t in tensors.items() if not t.is_floating_point()]
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise PosttrainError(f"the adapter in {path} does not fit this model: {shown}{more}")
