"""Reward functions: what a completion is worth. Called as TRL calls them, so that one written for it works here:

    reward(prompts=[...], completions=[...], prompt_ids=[...], completion_ids=[...], **columns) -> one number a completion

prompts are as in the data, completions text without special tokens, and each other column of the data comes as a list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from posttrain.adapters import active_adapter, adapter_names, set_adapter
from posttrain.errors import PosttrainError
from posttrain.model.decoder import CausalLM
from posttrain.reward import load_reward_model, score

from .prompts import Prompt

Reward = Callable[..., Sequence[float] | Tensor]


def exact_match(completions: Sequence[str], answer: Sequence[Any] | None = None, **_: Any) -> list[float]:
    """1 where the completion is the column "answer", white space around it aside, else 0. PosttrainError without that column."""
    if answer is None:
        raise PosttrainError('the completion is to be "answer", and the data has no such column; add it, or give another reward')
    return [float(text.strip() == str(right).strip()) for text, right in zip(completions, answer, strict=True)]


def regex_match(pattern: str) -> Reward:
    """1 where the pattern is found in the completion and its first group, if it has one, is the column "answer", else 0.
    PosttrainError for what is no regular expression."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise PosttrainError(f"{pattern!r} is no regular expression: {error}") from error

    def reward(completions: Sequence[str], answer: Sequence[Any] | None = None, **_: Any) -> list[float]:
        if not compiled.groups:
            return [float(compiled.search(text) is not None) for text in completions]
        if answer is None:
            raise PosttrainError(f'{pattern!r} has a group to compare with "answer", and the data has no such column')
        found = [compiled.search(text) for text in completions]
        right = [str(a).strip() for a in answer]
        return [float(m is not None and m[1] is not None and m[1].strip() == a) for m, a in zip(found, right, strict=True)]

    return reward


def reward_model(model: CausalLM, path: str, name: str = "reward", *, any_base: bool = False, batch_size: int = 16) -> Reward:
    """The score of a reward model (posttrain/reward.py) that is loaded beside the policy, on the one copy of the base.
    PosttrainError where the policy's adapter is not attached yet."""
    policy = active_adapter(model)
    if policy is None:
        raise PosttrainError("attach the policy's adapter before the reward model is loaded beside it")
    if name not in adapter_names(model):
        load_reward_model(model, path, name, any_base=any_base)
        set_adapter(model, policy)

    def reward(prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], **_: Any) -> Tensor:
        acting = active_adapter(model) or policy
        set_adapter(model, name)
        try:
            return score(model, list(zip(prompt_ids, completion_ids, strict=True)), batch_size)
        finally:
            set_adapter(model, acting)

    return reward


def call_reward(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[list[int]], items: Sequence[int]
) -> list[float]:
    """The rewards of completions, one a prompt. PosttrainError naming the item (its place in the data) whose reward cannot be
    had: the function raises, or gives something that is not a finite number."""

    def call(which: Sequence[int]) -> list[float]:
        columns = {name: [prompts[i].columns[name] for i in which] for name in (prompts[0].columns if prompts else ())}
        given = reward(
            prompts=[prompts[i].text for i in which],
            completions=[completions[i] for i in which],
            prompt_ids=[prompts[i].ids for i in which],
            completion_ids=[completion_ids[i] for i in which],
            **columns,
        )
        values = given.tolist() if isinstance(given, Tensor) else list(given)
        if len(values) != len(which):
            given_back = f"{len(values)} rewards for {len(which)} completions"
            raise PosttrainError(f"the reward function returned {given_back}; expected one each")
        return values

    def name(i: int) -> str:
        return f"item {items[i]} of the data (completion {completions[i]!r})"

    everything = range(len(prompts))
    try:
        values = call(everything)
    except PosttrainError:
        raise
    except Exception as error:  # whatever the user's function raises becomes an error that names the item
        raise PosttrainError(f"the reward function raised {_first_that_raises(call, name, everything, error)}") from error
    for i, value in enumerate(values):
        if isinstance(value, Real) and math.isfinite(value):
            continue
        raise PosttrainError(f"the reward function returned {value!r} for {name(i)}; expected a finite number")
    return [float(value) for value in values]


def _first_that_raises(
    call: Callable[[Sequence[int]], Any], name: Callable[[int], str], items: Sequence[int], error: Exception
) -> str:
    """Which item, called with it alone, and what it raises there; all of them where none does alone."""
    for i in items:
        try:
            call([i])
        except Exception as alone:  # noqa: BLE001 - as above
            return f"{type(alone).__name__}: {alone} on {name(i)}"
    return f"{type(error).__name__}: {error} on the {len(items)} completions together, and on none of them alone"
