"""A training run's state on disk: tensors in safetensors, the rest in JSON, nothing pickled.

    checkpoint-<step>/
        adapter_model.safetensors   the adapter as PEFT has it, with its adapter_config.json, so that any tool loads a
                                    checkpoint; trainable.safetensors where something trains that an adapter's file
                                    does not hold
        optimizer.safetensors       the optimizer's tensors, as <parameter>.<entry>
        trainer_state.json          the step, what the run was started with, the random states, and `untouched`: what trains
                                    and no step has given a gradient yet, of which the optimizer keeps nothing

A checkpoint is written beside its place and moved there whole, and an older one is deleted only after that: a kill or a
full disk at any moment leaves the last good one.
"""

from __future__ import annotations

import base64
import json
import math
import os
import random
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import active_adapter, adapter_parameters, save_adapter, saved_tensors
from .adapters.peft_format import WEIGHTS_FILE
from .atomic import atomic_dir, sweep
from .errors import PosttrainError
from .model.safetensors_file import SafetensorsReader, write_safetensors

OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # beside the step, what AdamW keeps of a parameter


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train: an adapter's by PEFT's keys, others by their names in the model."""
    keys = {id(p): key for key, p in adapter_parameters(model).items()} if active_adapter(model) else {}
    return {keys.get(id(p), name): p for name, p in model.named_parameters() if p.requires_grad}


def weights_file(model: nn.Module) -> str:
    """Name of the file with the trained weights."""
    if not active_adapter(model):
        return "trainable.safetensors"
    files = saved_tensors(model)
    # The adapter's file may hold something made of what trains, under its key: training cannot go on from that.
    whole = all(key in files and files[key].is_set_to(p) for key, p in trainable(model).items())
    return WEIGHTS_FILE if whole else "trainable.safetensors"


def random_states() -> dict[str, Any]:
    """The states of torch's generators (CPU and every GPU), Python's and NumPy's, as JSON can hold them."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
        "python": [version, list(words), gauss],
        "numpy": {**numpy_state, "state": {k: np.asarray(v).tolist() for k, v in numpy_state["state"].items()}},
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned. ValueError, with all as they were, for what it cannot have returned."""
    before = random_states()
    try:
        _set_random_states(states)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        _set_random_states(before)
        raise ValueError(f"its random_states are no generators' states: {type(error).__name__}: {error}") from error


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(_bytes(states["torch"]))
    if states["cuda"]:
        torch.cuda.set_rng_state_all([_bytes(state) for state in states["cuda"]])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    if not 0 <= states["numpy"]["state"]["pos"] <= len(key):  # NumPy reads there unasked
        raise ValueError(f"NumPy's position is {states['numpy']['state']['pos']}")
    np.random.set_state({**states["numpy"], "state": {**states["numpy"]["state"], "key": key}})


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def save_checkpoint(folder: str | os.PathLike, model: nn.Module, optimizer: torch.optim.AdamW, state: dict[str, Any]) -> Path:
    """Write checkpoint-<state["step"]> in `folder` with the random states as they are now. Returns its path."""
    path = Path(folder) / f"checkpoint-{state['step']}"
    names: dict[Tensor, str] = {parameter: name for name, parameter in trainable(model).items()}
    tensors = {
        f"{names[parameter]}.{entry}": value for parameter, entries in optimizer.state.items() for entry, value in entries.items()
    }
    untouched = [name for parameter, name in names.items() if not optimizer.state.get(parameter)]
    with atomic_dir(path) as temporary:
        if (weights := weights_file(model)) == WEIGHTS_FILE:
            save_adapter(model, temporary)
        else:
            write_safetensors(temporary / weights, trainable(model).items())
        write_safetensors(temporary / OPTIMIZER, tensors.items())
        content = json.dumps({**state, "untouched": untouched, "random_states": random_states()}, allow_nan=False)
        (temporary / STATE).write_text(content, encoding="utf-8")
    return path


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    found = {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else [])
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE).is_file()
    }
    return [found[step] for step in sorted(found)]


def keep_last(folder: str | os.PathLike, count: int) -> None:
    """Delete all but the last `count` checkpoints in `folder`, and what a kill left of others half written."""
    for path in checkpoints(folder)[:-count]:
        shutil.rmtree(path)
    sweep(folder, r"checkpoint-\d+")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


# What a run's state holds, by key: whether a value is one, and what that is in words.
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_whole, "a whole number of at least 0"),
    "tokens": (_is_whole, "a whole number of at least 0"),
    "seconds": (_is_number, "a number of at least 0"),
    "kl_coef": (_is_number, "a number of at least 0"),
    "identity": (lambda value: isinstance(value, dict), "an object"),
    "random_states": (lambda value: isinstance(value, dict), "an object"),
    "untouched": (lambda value: isinstance(value, list), "a list"),
}


def read_state(path: str | os.PathLike, needed: Iterable[str] = ()) -> dict[str, Any]:
    """trainer_state.json of a checkpoint. PosttrainError where it is missing, damaged, or lacks a key that is needed beside the
    step and the random states."""
    file = Path(path) / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}; expected an object")
        if missing := {"step", "random_states", *needed} - set(state):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        for key, (fits, words) in FORMS.items():
            if key in state and not fits(state[key]):
                raise ValueError(f"its {key} is {reprlib.repr(state[key])}; expected {words}")
    except (OSError, ValueError, RecursionError) as error:
        raise PosttrainError(f"{file} cannot be read ({error}); resume from another checkpoint") from error
    return state


def _read(path: Path) -> dict[str, Tensor]:
    with SafetensorsReader(path) as file:
        return {name: file.read(name) for name in file.entries}


def _check_moments(file: Path, moments: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """PosttrainError unless `moments` are what AdamW keeps of `parameters`: it reads them by the parameters' shapes, unasked."""
    expected = {f"{name}.{entry}": (tuple(p.shape), p.dtype) for name, p in parameters.items() for entry in MOMENTS}
    expected |= {f"{name}.step": ((), torch.float32) for name in parameters}
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in moments.items()}

    def words(kind: tuple[tuple[int, ...], torch.dtype] | None) -> str:
        return "none" if kind is None else f"{list(kind[0])} {kind[1]}"

    if different := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        key = different[0]
        raise PosttrainError(
            f"{file} is of another model, or damaged: {len(different)} tensors are not those expected, {key} first "
            f"(it holds {words(found.get(key))}; expected {words(expected.get(key))}); resume from another checkpoint"
        )


def load_checkpoint(path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Put weights, optimizer and random states back as `save_checkpoint` found them; returns its `state`.

    PosttrainError, with everything as it was, where a file is damaged or its tensors are not those of this model.
    """
    path = Path(path)
    state = read_state(path)
    try:
        weights, moments = _read(path / weights_file(model)), _read(path / OPTIMIZER)
    except (OSError, PosttrainError) as error:
        raise PosttrainError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    parameters = trainable(model)
    expected = saved_tensors(model) if weights_file(model) == WEIGHTS_FILE else parameters
    ours = {name: (tuple(p.shape), p.dtype) for name, p in expected.items()}
    theirs = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    if ours != theirs:
        different = sorted({name for name, _ in ours.items() ^ theirs.items()})
        raise PosttrainError(
            f"{path} holds other parameters than this model trains ({len(different)} differ, {different[0]} first); "
            "resume with the model and adapter settings that the run was started with"
        )
    touched = {name: p for name, p in parameters.items() if name not in state.get("untouched", [])}
    _check_moments(path / OPTIMIZER, moments, touched)
    try:
        set_random_states(state["random_states"])
    except ValueError as error:
        raise PosttrainError(f"{path / STATE} cannot be read ({error}); resume from another checkpoint") from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {id(p): i for i, p in enumerate(order)}
    packed = optimizer.state_dict()
    packed["state"] = {
        index[id(p)]: {entry: moments[f"{name}.{entry}"] for entry in ("step", *MOMENTS)} for name, p in touched.items()
    }
    optimizer.load_state_dict(packed)
    return state
