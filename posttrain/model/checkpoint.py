"""A Hugging Face model directory: config.json and safetensors, whole or in shards with an index."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.errors import PosttrainError

from .safetensors_file import Entry, SafetensorsReader, write_safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
CHAT_TEMPLATES = "additional_chat_templates"  # a folder
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


class Checkpoint:
    """The directory's config and tensors by name, read one at a time. Use as a context manager.

    Raises PosttrainError that names the file and what to do when one is missing, corrupt or points outside the
    directory.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise PosttrainError(
                f"{self.path} is not a folder; expected a Hugging Face model directory (config.json, tokenizer.json, *.safetensors)"
            )
        self.config = read_json(self.path / "config.json")
        self._readers: dict[str, SafetensorsReader] = {}
        try:
            self._where = self._index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for reader in self._readers.values():
            reader.__exit__(None, None, None)

    def _open(self, file: str) -> SafetensorsReader:
        if file not in self._readers:
            self._readers[file] = SafetensorsReader(self.path / file)
        return self._readers[file]

    def _index(self) -> dict[str, SafetensorsReader]:
        """The reader of each tensor's file."""
        index = self.path / INDEX
        if not index.exists():
            if not (self.path / SINGLE).exists():
                others = ", ".join(sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")))
                raise PosttrainError(
                    f"{self.path} holds neither {SINGLE} nor {INDEX}"
                    + (f" (but {others}, which cannot be loaded: convert it to safetensors first)" if others else "")
                )
            reader = self._open(SINGLE)
            return dict.fromkeys(reader.entries, reader)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise PosttrainError(f"{index} has no weight_map from tensor names to file names; download or save the model again")
        where = {}
        for name, file in weight_map.items():
            # A plain name, so that an index cannot make us read elsewhere; Windows' separators count everywhere.
            if not file or file in (".", "..") or any(character in file for character in "/\\:\0"):
                raise PosttrainError(f"{index} places tensor {name} in {file!r}, which is not a file name in {self.path}")
            if not (self.path / file).is_file():
                raise PosttrainError(f"{index} places tensor {name} in {file}, which is not there; download the missing shard")
            where[name] = self._open(file)
            if name not in where[name].entries:
                raise PosttrainError(f"{index} places tensor {name} in {file}, which does not hold it; download both again")
        return where

    @property
    def metadata(self) -> dict[str, str]:
        """The safetensors metadata of all files together."""
        return {key: value for reader in self._readers.values() for key, value in reader.metadata.items()}

    def names(self) -> list[str]:
        """Tensor names, file by file in the order in which they lie there."""
        return sorted(self._where, key=lambda name: (self._where[name].path.name, self.entry(name).start))

    def entry(self, name: str) -> Entry:
        return self._where[name].entries[name]

    def read(self, name: str) -> Tensor:
        return self._where[name].read(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; PosttrainError that names the file when it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PosttrainError(f"{path} does not exist; is {path.parent} a Hugging Face model directory?") from None
    except (ValueError, RecursionError) as error:
        raise PosttrainError(f"{path} is not JSON ({error}); download or save it again") from error
    if not isinstance(value, dict):
        raise PosttrainError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what goes with the weights from one model's folder to another: tokenizer, chat template, generation defaults."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, target / CHAT_TEMPLATES, dirs_exist_ok=True)


def is_model_file(file: Path) -> bool:
    """Whether a file of a model's folder is one that another model's takes the place of."""
    return file.name in ("config.json", INDEX) or (file.name.startswith("model") and file.suffix == ".safetensors")


def check_kept(folder: Path) -> None:
    """PosttrainError where a model cannot be written in `folder`, whose other files stay: beside an adapter, which transformers
    would put on it once more, or beside pipes and devices, which have no copy."""
    if not folder.is_dir():
        return
    if adapter := [name for name in ADAPTER_FILES if os.path.lexists(folder / name)]:
        raise PosttrainError(
            f"{folder} holds an adapter ({', '.join(adapter)}), which transformers would put on the model written there; "
            "give another folder, or move the adapter away"
        )
    for file in (Path(above) / name for above, _, names in os.walk(folder) for name in names):
        if not file.is_symlink() and not file.is_file():
            raise PosttrainError(f"{file} is neither a file nor a folder and cannot stay there; give another folder, or remove it")


def copy_kept(source: Path, target: Path, dropped: Iterable[str] = ()) -> None:
    """Copy to `target` what the folder `source` holds beside a model and `dropped`, links as links."""
    for file in source.iterdir():
        if is_model_file(file) or file.name in dropped:
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.copytree(file, target / file.name, symlinks=True)
        else:
            shutil.copy2(file, target / file.name, follow_symlinks=False)


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    groups: Iterable[list[tuple[str, Tensor]]],
    max_shard_bytes: int,
    metadata: dict[str, str],
) -> None:
    """Write config.json and the tensors into an existing folder, in shards of at most max_shard_bytes.

    A group of (name, tensor) stays in one shard (one larger than the limit has a shard to itself).
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shards = list(_shards(groups, max_shard_bytes))
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], metadata)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, metadata)
        weight_map.update(dict.fromkeys((name for name, _ in shard), file))
    total = sum(tensor.nbytes for shard in shards for _, tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(groups: Iterable[list[tuple[str, Tensor]]], max_shard_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    shard: list[tuple[str, Tensor]] = []
    size = 0
    for group in groups:
        nbytes = sum(tensor.nbytes for _, tensor in group)
        if shard and size + nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard += group
        size += nbytes
    yield shard
