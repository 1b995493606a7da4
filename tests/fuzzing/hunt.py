"""Counts of the outcomes of many jobs, and shrinking of jobs that show a defect."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from tests.fuzzing.child import Child, Outcome

#: Limits of the tries and of the seconds for shrinking one defect.
_TRIES, _SECONDS = 600, 40.0


@dataclass
class Defect:
    """A defect, with the smallest job that shows it."""

    what: str
    job: str
    seed: int
    detail: str
    groups: Counter[str] = field(default_factory=Counter)
    """Number of times per operation or file."""


@dataclass
class Tally:
    """Counts of many jobs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Reasons why accepted calls were not computed or compared."""
    by_group: dict[str, Counter[str]] = field(default_factory=dict)
    """Outcomes by operation, or by file."""
    loose: Counter[str] = field(default_factory=Counter)
    """Strange arguments that were accepted."""
    defects: dict[str, Defect] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Add the counts of ``other``."""
        self.outcomes += other.outcomes
        self.refusals += other.refusals
        self.reasons += other.reasons
        self.loose += other.loose
        for group, counts in other.by_group.items():
            self.by_group.setdefault(group, Counter()).update(counts)
        for key, defect in other.defects.items():
            if key in self.defects:
                self.defects[key].groups += defect.groups
                if len(defect.job) < len(self.defects[key].job):
                    self.defects[key].job, self.defects[key].seed = defect.job, defect.seed
            else:
                self.defects[key] = defect

    def count(self, group: str, outcome: Outcome) -> None:
        """Count one outcome."""
        self.outcomes[outcome.kind] += 1
        self.by_group.setdefault(group, Counter())[outcome.kind] += 1
        if outcome.loose:
            self.loose[outcome.loose] += 1
        if outcome.kind == "refused":
            self.refusals[outcome.what] += 1
        elif outcome.kind in ("accepted", "computed", "skipped"):
            self.reasons[f"{outcome.kind}: {outcome.stage}: {outcome.what}"] += 1


def key_of(group: str, outcome: Outcome) -> str:
    """Return the key of a defect: the place in the code if known, else the operation."""
    where = group if outcome.kind in ("disagreement", "overwritten input", "hang") else ""
    return " · ".join(part for part in (outcome.kind, where, outcome.stage, outcome.what) if part)


class FoundError(Exception):
    """Signal to hypothesis that a job shows the defect to be shrunk."""


def hunt(
    jobs: st.SearchStrategy[Any],
    child: Child,
    seed: int,
    n: int,
    group: Callable[[Any], str],
    *,
    known: frozenset[str] = frozenset(),
    shrink: bool = True,
) -> Tally:
    """Try ``n`` jobs drawn with ``seed``, and shrink those with defects that are not ``known``."""
    tally, answers, new = Tally(), dict[str, Outcome](), list[str]()

    def ask(job: Any) -> Outcome:
        text = str(job)
        if text not in answers:
            answers[text] = child.ask(job)
        return answers[text]

    def count(job: Any) -> None:
        outcome = ask(job)
        tally.count(group(job), outcome)
        if outcome.is_defect:
            key = key_of(group(job), outcome)
            if key not in tally.defects:
                tally.defects[key] = Defect(key, str(job), seed, outcome.detail)
                new.append(key)
            tally.defects[key].groups[group(job)] += 1

    _draw(jobs, seed, n, count, (Phase.generate,))
    for key in new:
        if shrink and key not in known and not key.startswith("hang"):
            small = _shrink(jobs, seed, n, key, ask, group)
            if small is not None:
                tally.defects[key].job, tally.defects[key].detail = str(small), ask(small).detail
    return tally


def _draw(jobs: Any, seed: int, n: int, use: Callable[[Any], None], phases: tuple[Phase, ...]) -> None:
    @seeded(seed)
    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=phases,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(jobs)
    def draw(job: Any) -> None:
        use(job)

    draw()


def _shrink(jobs: Any, seed: int, n: int, key: str, ask: Callable[[Any], Outcome], group: Callable[[Any], str]) -> Any:
    """Return the smallest job with the defect ``key`` that hypothesis finds from the same seed."""
    smallest: list[Any] = []
    tries, end = 0, 0.0

    def check(job: Any) -> None:
        nonlocal tries, end
        if smallest:
            end = end or time.monotonic() + _SECONDS
            tries += 1
            if tries > _TRIES or time.monotonic() > end:
                return
        outcome = ask(job)
        if outcome.is_defect and key_of(group(job), outcome) == key:
            if not smallest or len(str(job)) <= len(str(smallest[0])):
                smallest[:] = [job]
            raise FoundError

    try:
        _draw(jobs, seed, n, check, (Phase.generate, Phase.shrink))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
    return smallest[0] if smallest else None
