"""How long the next draft is, so that drafting pays: from measured acceptance and measured times.

Of the lengths g it takes the one of most tokens a second,
    E[tokens](alpha, g) / (seconds to draft g + seconds of a pass over them and the root)          (planner.py, with v measured)
and none at all where plain passes are as fast. Two things keep it honest where that estimate errs: a ledger of what drafting has
cost and won in plain passes, which may fall behind by `MARGIN` of them and no more; and, when it has switched off, a
short draft now and then, at intervals that double, to see whether the text has changed.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from statistics import median_low

from .planner import expected_tokens
from .report import Report

clock = time.perf_counter
MARGIN = 0.03  # of the passes that plain decoding takes, up to AHEAD tokens from now
PROMPT_MARGIN = 0.02  # of the time that plain decoding would take, to let the drafter read the prompts
AHEAD = 64
REMEMBERED = 9  # times of a kind, of which the (lower) median counts: what interrupts a machine only adds
FORGETTING = 0.95  # of the acceptance counts, a step: with twenty in mind, chance seldom switches off drafts that pay a little
PRIOR = (2.0, 3.0)  # accepted of examined, before anything is known
FIRST_REST, LONGEST_REST = 8, 256  # passes without a draft after drafting did not pay
PROBE = 2  # tokens drafted to see whether it would pay again
GROWTH = 0.03  # of a pass for each token more, until measured
PLAIN_EVERY = 64  # passes after which a plain one is timed anew


class _Times:
    """Seconds by size (tokens of a pass, tokens drafted): medians of the last few, sizes between and beyond by lines.

    growth: what a size more costs while but one is known, of that one's seconds; None: in proportion, from nothing at 0.
    """

    def __init__(self, growth: float | None = None):
        self.growth = growth
        self.seconds: dict[int, deque[float]] = {} if growth is not None else {0: deque([0.0])}

    def add(self, size: int, seconds: float) -> None:
        self.seconds.setdefault(size, deque(maxlen=REMEMBERED)).append(seconds)

    def at(self, size: int) -> float:
        known, least = {}, float("inf")
        for larger in sorted(self.seconds, reverse=True):  # more takes no less: what was timed in a slow moment is put right
            known[larger] = least = min(least, median_low(self.seconds[larger]))
        if size in known:
            return known[size]
        below, above = max((s for s in known if s < size), default=None), min((s for s in known if s > size), default=None)
        if below is None:
            return known[above] if above is not None else 0.0
        if above is None:
            least = min(known)
            slope = (known[below] - known[least]) / (below - least) if below > least else known[below] * (self.growth or 0.0)
            return known[below] + max(slope, 0.0) * (size - below)
        share = (size - below) / (above - below)
        return known[below] * (1 - share) + known[above] * share


class Pace:
    """Decides draft lengths up to `longest`, and keeps the report. Not adaptive: every draft is as long as it may be.

    prompt_cost: of the drafter, see there.
    """

    def __init__(self, longest: int, adaptive: bool, prompt_cost: float, report: Report):
        self.longest, self.adaptive, self.prompt_cost, self.report = longest, adaptive, prompt_cost, report
        self.passes: dict[int, _Times] = defaultdict(lambda: _Times(GROWTH))  # by the number of rows
        self.drafting: dict[int, _Times] = defaultdict(_Times)
        self.width: dict[int, int] = {}  # of a pass with drafts of this depth
        self.accepted, self.examined = PRIOR
        self.behind = 0.0  # plain passes that drafting has cost more than it won
        self.done = 0.0  # tokens a row
        self.rest = self.resting = 0
        self.probing = self.drafted = self.prompts_read = False
        self.missed: deque[float] = deque(maxlen=REMEMBERED)  # seconds to take in what passed without a draft
        self.affordable: bool | None = None
        self.since_plain = 0
        self.prompt_seconds = 0.0

    def prompts_seen(self, seconds: float, max_new_tokens: int) -> None:
        self.prompt_seconds, self.max_new_tokens = seconds, max_new_tokens

    @property
    def alpha(self) -> float:
        return self.accepted / self.examined

    def length(self, caps: list[int]) -> int:
        """Of the next drafts, 0: none. caps: how long each row's may be."""
        limit, rows = min(self.longest, max(caps)), len(caps)
        if limit < 1 or not self.adaptive:
            return max(limit, 0)
        if 1 not in self.passes[rows].seconds or self.since_plain >= PLAIN_EVERY:
            return 0  # what a plain pass takes is not known, or not any more
        plain = self.passes[rows].at(1)
        if self.affordable is None:
            whole = self.prompt_seconds + self.max_new_tokens * plain
            self.affordable = self.prompt_cost * self.prompt_seconds <= PROMPT_MARGIN * whole
        length = self._length(limit, rows, max(caps)) if self.affordable else 0
        if length:
            allowed = MARGIN * (self.done + min(max(caps), AHEAD))
            missed = 0.0 if self.drafted else max(self.missed, default=self.prompt_cost * plain)
            if self.behind + (missed + self._seconds(rows, length)) / plain - 1 > allowed:
                length = 0
        self.report.rested += length == 0
        return length

    def _length(self, limit: int, rows: int, left: int) -> int:
        """The best length; where that is 0, a short one when it is time to try again and enough is left to profit from it."""
        known = max(self.passes[rows].seconds) - 1
        limit = min(limit, max(2 * known, PROBE))  # what longer ones cost is too far from anything measured
        best = max(range(limit + 1), key=lambda g: expected_tokens(self.alpha, g) / self._seconds(rows, g))
        if best:
            self.rest, self.resting, self.probing = 0, 0, False
            return best
        if not self.probing:
            if self.resting == 0:
                self.rest = min(2 * self.rest, LONGEST_REST) or FIRST_REST
                self.resting = self.rest
            self.resting = max(self.resting - 1, 1 if left < FIRST_REST else 0)
            if self.resting:
                return 0
            self.probing = True
            self.accepted, self.examined = self.accepted / 2, self.examined / 2
        return min(PROBE, limit)

    def _seconds(self, rows: int, length: int) -> float:
        """Seconds of a step with drafts of this length."""
        drafting = self.drafting[rows].at(length)
        if len(self.drafting[rows].seconds) == 1:  # not measured: what the prompts' tokens cost it is a first guess
            drafting = self.prompt_cost * length * self.passes[rows].at(1)
        return drafting + self.passes[rows].at(self.width.get(length, length + 1))

    def stepped(
        self, num: list[int], depth: list[int], accepted: list[int], width: int, draft_seconds: float, seconds: float
    ) -> None:
        """A pass of `width` tokens a row took `seconds`, after drafts of `num` nodes and `depth` tokens took `draft_seconds`."""
        rows, deepest = len(num), max(depth)
        self.report.add(num, depth, accepted, seconds, draft_seconds)
        self.passes[rows].add(width, seconds)
        self.since_plain = self.since_plain + 1 if deepest else 0
        if deepest:
            self.width[deepest] = width
            self.accepted = FORGETTING * self.accepted + sum(accepted)
            self.examined = FORGETTING * self.examined + sum(
                min(count + 1, deep) for count, deep in zip(accepted, depth, strict=True) if deep
            )
            self.probing = False
            if self.drafted:
                self.drafting[rows].add(deepest, draft_seconds)
            elif self.prompts_read:
                self.missed.append(draft_seconds - self.drafting[rows].at(deepest))
            else:  # it had the prompts to take in, which PROMPT_MARGIN is for
                draft_seconds = max(draft_seconds - self.prompt_cost * self.prompt_seconds, 0.0)
            self.prompts_read = True
        self.drafted = deepest > 0
        if 1 not in self.passes[rows].seconds:
            self.report.plain_seconds = None
            return
        plain = self.passes[rows].at(1)
        yielded = 1 + sum(accepted) / rows
        self.done += yielded
        # In units of what a plain pass would have taken just now: a machine's slow moments are no cost of drafting.
        cost = self.passes[rows].at(width) / plain
        self.behind += cost * (1 + draft_seconds / seconds) - yielded if seconds > 0 else 0.0
        self.behind = max(self.behind, -1.0)  # what was won long ago is not gambled away
        if self.report.plain_seconds is not None:
            self.report.plain_seconds += plain * yielded
            self.report.costs = {g: self._seconds(rows, g) / plain for g in self.report.lengths}
