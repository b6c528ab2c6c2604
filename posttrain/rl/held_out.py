"""What practice did to prompts that were not practised on: rewards before and after, prompt by prompt, and the divergence.

One completion of each prompt is drawn, as in training, by the base (the adapter off) and by the policy, from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.model.decoder import CausalLM
from posttrain.model.eval_mode import eval_mode
from posttrain.statistics import compare, format_p, mcnemar, paired_bootstrap

from .loop import Sampling, check_prompts, collect, measured
from .prompts import Prompt
from .rewards import Reward

SEED = 20_251_122  # no step of a run draws with it: those are below 1,000,003 (seed + 1)


@dataclass(frozen=True)
class HeldOut:
    """Prompt by prompt: reward of the base's and of the policy's completion, and of the latter log pi / pi_ref, whose mean is the
    divergence of the policy from the base."""

    before: list[float]
    after: list[float]
    log_ratios: list[float]

    @property
    def rose(self) -> tuple[int, int, float]:
        """Prompts whose reward rose, whose fell, and the two-sided exact p of that by chance (sign test)."""
        pairs = list(zip(self.before, self.after, strict=True))
        up, down = sum(b < a for b, a in pairs), sum(b > a for b, a in pairs)
        return up, down, mcnemar(down, up)[0]

    def __str__(self) -> str:
        n = len(self.before)
        low, high = paired_bootstrap([0.0] * n, self.log_ratios)
        divergence = f"KL to the base {sum(self.log_ratios) / n:.3f} [{low:.3f}, {high:.3f}] nats a completion"
        if {*self.before, *self.after} <= {0.0, 1.0}:
            return f"{compare(list(map(bool, self.before)), list(map(bool, self.after)), 'base', 'policy')}\n{divergence}"
        low, high = paired_bootstrap(self.before, self.after)
        up, down, p = self.rose
        before, after = sum(self.before) / n, sum(self.after) / n
        means = f"mean reward {before:.3f} -> {after:.3f}: difference {after - before:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"{means}; it rose on {up} prompts and fell on {down}, p {format_p(p)}, n = {n}\n{divergence}"


def held_out(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    sampling: Sampling,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """Measure the policy (the adapter that acts) against the base on prompts. PosttrainError as `optimize`."""
    check_prompts(model, prompts, sampling)
    stop_id, device = sampling.stop_id(tokenizer), next(model.parameters()).device
    with eval_mode(model):
        before: list[float] = []
        after: list[float] = []
        ratios: list[float] = []
        for start in range(0, len(prompts), batch_size):
            items = range(start, min(start + batch_size, len(prompts)))
            draws = [
                collect(model, tokenizer, prompts, items, reward, sampling, stop_id, SEED + start, by_base=base)
                for base in (True, False)
            ]
            for rewards, rollouts in zip((before, after), draws, strict=True):
                rewards += rollouts.by_completion["rewards"].tolist()
            drawn = measured(model, draws[1], sampling.temperature, batch_size, None, True, device)
            log_ratios = (drawn.by_token["logps"] - drawn.by_token["ref_logps"]).split(drawn.lengths.tolist())
            ratios += [part.sum().item() for part in log_ratios]
            if progress:
                progress(items[-1] + 1, len(prompts))
    return HeldOut(before, after, ratios)
