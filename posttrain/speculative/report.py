"""What a run did, in words that say which "acceptance rate" is meant: four different numbers go by that name.

acceptance_rate          accepted tokens / drafted tokens (a tree: drafted nodes)
acceptance_by_position   share of the drafts that reach so far whose first 1, 2, .. tokens were all accepted
alpha                    accepted / examined: how often a coin was thrown and won, behind nothing refused. Leviathan's alpha
                         where acceptance is the same everywhere and independent
overlap                  mean over the examined places of sum over x of min(p(x), q(x)): alpha without the coins
                         (Corollary 3.6); None unless asked for

mean_accepted_length     tokens a draft yields, the one more included; plain decoding has 1
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .planner import expected_tokens


@dataclass
class Report:
    """Counts over the steps of all rows (the prompts' pass is none), and seconds.

    plain_seconds: what plain decoding would have taken, by the median of the plain passes among the steps; None where there
    was none. lengths: how many passes had drafts of at most so many tokens; costs: seconds of such a pass, drafting included,
    over a plain one's.
    """

    rows: int = 0  # passes, counted once for each row in them
    passes: int = 0
    tokens: int = 0  # that these passes gave
    drafts: int = 0  # of `rows`, those with a draft
    drafted: int = 0
    accepted: int = 0
    examined: int = 0
    offered: Counter[int] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)
    overlaps: float = 0.0
    overlapped: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0
    plain_seconds: float | None = 0.0
    lengths: Counter[int] = field(default_factory=Counter)
    costs: dict[int, float] = field(default_factory=dict)
    rested: int = 0  # passes without drafts because these would not have paid

    def add(self, num: list[int], depth: list[int], accepted: list[int], seconds: float, draft_seconds: float) -> None:
        """One pass: per row its drafted nodes, how deep they lay, how many were accepted."""
        self.passes += 1
        self.rows += len(num)
        self.tokens += sum(accepted) + len(num)
        self.seconds += seconds + draft_seconds
        self.draft_seconds += draft_seconds
        self.lengths[max(depth)] += 1
        for nodes, deep, count in zip(num, depth, accepted, strict=True):
            if not deep:
                continue
            self.drafts += 1
            self.drafted += nodes
            self.accepted += count
            self.examined += min(count + 1, deep)
            self.offered.update(range(deep))
            self.accepted_at.update(range(count))

    def add_overlap(self, total: float, count: int) -> None:
        """sum of min(p, q) at `count` examined places (overlap.py)."""
        self.overlaps += total
        self.overlapped += count

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens a row gets from a pass of the target, those without a draft included."""
        return self.tokens / self.rows if self.rows else None

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_by_position(self) -> list[float]:
        return [self.accepted_at[i] / self.offered[i] for i in sorted(self.offered)]

    @property
    def alpha(self) -> float | None:
        return self.accepted / self.examined if self.examined else None

    @property
    def overlap(self) -> float | None:
        return self.overlaps / self.overlapped if self.overlapped else None

    @property
    def mean_accepted_length(self) -> float | None:
        return 1 + self.accepted / self.drafts if self.drafts else None

    @property
    def measured_speedup(self) -> float | None:
        """Over plain decoding, whose passes among the steps say what it would have taken."""
        return self.plain_seconds / self.seconds if self.plain_seconds and self.seconds else None

    @property
    def predicted_speedup(self) -> float | None:
        """Of the passes' lengths g, sum of E[tokens](alpha, g) over sum of costs: Theorem 3.8 where all have one length.

        A row without a match takes a plain step; alpha says nothing of that, so this is for a batch of one.
        """
        if self.alpha is None or any(length not in self.costs for length in self.lengths):
            return None
        gained = sum(count * expected_tokens(self.alpha, length) for length, count in self.lengths.items())
        return gained / sum(count * self.costs[length] for length, count in self.lengths.items())

    def __str__(self) -> str:
        if not self.rows:
            return "no step was taken after the prompts' pass"
        parts = [f"{self.tokens_per_pass:.2f} tokens a pass"]
        if self.drafts:
            by_position = " ".join(f"{rate:.2f}" for rate in self.acceptance_by_position)
            parts += [
                f"accepted of drafted {self.acceptance_rate:.2f}", f"accepted of examined (alpha) {self.alpha:.2f}",
                f"accepted up to each position {by_position}", f"mean accepted length {self.mean_accepted_length:.2f}",
            ]  # fmt: skip
            if self.overlap is not None:
                parts.append(f"sum of min(p, q) {self.overlap:.2f}")
        for name, speedup in (("measured", self.measured_speedup), ("predicted", self.predicted_speedup)):
            parts.append(f"{name} speedup {'n/a' if speedup is None else f'{speedup:.2f}'}")
        if self.rested:
            parts.append(f"drafting switched off for {self.rested} of {self.passes} passes, where it would not have paid")
        return ", ".join(parts)
