"""Judges one result of ``controlrt bench`` against an older one.

What is compared is the time of a call, contender by contender and scenario by scenario. Two sessions share no rounds,
so nothing between them is paired, and both sides are resampled by themselves.

Where machine, versions and settings agree, seconds are compared. Where anything differs, and where the yardstick itself
(eager PyTorch, which our changes leave alone) has become faster or slower, contenders are compared in its units: each
round's seconds over the yardstick's in the same round. What slows a whole machine down then cancels, within a session
and between the two. This assumes that it slows both by the same factor. That is so where both are bound by the same
thing, as matrix products bind all of them here, and only nearly so between machines of different caches or memory;
hence the warning, and a threshold below which a change counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from controlrt.perf.ratios import Measured
from controlrt.perf.results import Report, Scenario, Setting
from controlrt.perf.statistics import FEWEST_ROUNDS, Bootstrap, Estimate, Ratio, Verdict, joint_confidence, verdict
from controlrt.runtime.errors import UserError

THRESHOLD = 0.03
HARDWARE = ("cpu", "cores", "os", "python", "governor", "isa", "gpus")
"""Fields of a machine that say how fast it is; memory is compared in GiB, and load and clock move by themselves."""
OWN_PACKAGE = "controlrt"
WORK = (
    *("width", "height", "batch", "steps", "sampler", "guidance_scale", "controls", "prompts", "hints", "threads"),
    "one_at_a_time",
)
"""Fields of a setting that say what a call costs."""

Outcome = Verdict | Literal["broken", "mended", "failed", "yardstick", "gone", "new"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of one contender in one scenario."""

    scenario: str
    contender: str
    outcome: Outcome
    old_seconds: float | None
    """Median of a call; None where it did not run, or not rightly."""
    new_seconds: float | None
    ratio: Ratio | None
    """New over old, in seconds or in the yardstick's units; None where one side is missing."""
    yardstick: str | None
    """In whose units; None for seconds."""
    note: str

    @property
    def is_regression(self) -> bool:
        """Whether it became slower, or ran rightly once and does no more."""
        return self.outcome in ("slower", "broken")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What became of everything."""

    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    threshold: float
    confidence: float
    """Of each interval, so that all of them hold at once with 95%."""

    @property
    def regressions(self) -> list[Change]:
        """The changes that are for the worse."""
        return [change for change in self.changes if change.is_regression]


def compare_reports(old: Report, new: Report, threshold: float = THRESHOLD) -> Comparison:
    """Compares every contender in every scenario that both reports hold, and names what only one of them holds.

    Args:
        old: what is compared with.
        new: what is judged.
        threshold: the change that counts for nothing, a fraction.

    Raises:
        UserError: two models, no scenario or contender in common, or nothing to compare different sessions by.
    """
    if old.model.name != new.model.name:
        raise UserError(
            f"the old result is of model {old.model.name} and the new one of {new.model.name}; compare results of one "
            "model"
        )
    before = {scenario.name: _Session(scenario) for scenario in old.scenarios}
    after = {scenario.name: _Session(scenario) for scenario in new.scenarios}
    shared = [name for name in after if name in before]
    if not shared:
        raise UserError(
            f"no scenario in common: the old result has {_listed(before)}, the new one {_listed(after)}; measure both "
            "with the same options"
        )
    count = sum(len(before[name].sound.keys() & after[name].sound.keys()) for name in shared)
    if count == 0:
        raise UserError(
            f"no contender ran rightly in both results ({_listed(shared)}); controlrt bench page shows why they failed"
        )
    judge = _Judge(threshold, joint_confidence(count))
    differences = _report_differences(old, new)
    warnings = [*differences, *_busy("old", old), *_busy("new", new)]
    for which, lonely in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        if lonely:
            warnings.append(f"only in the {which} result: {_listed(sorted(lonely))}")
    changes: list[Change] = []
    for name in shared:
        here = _setting_differences(before[name].scenario.setting, after[name].scenario.setting)
        warnings += [f"{name}: {difference}" for difference in here]
        if gone := [each for each in before[name].sound if each not in after[name].contenders]:
            warnings.append(f"{name}: ran rightly in the old result and is not in the new one: {_listed(gone)}")
        yardstick = _yardstick(before[name], after[name])
        if (differences or here) and yardstick is None:
            raise UserError(
                f"{name}: the two sessions differ in {_listed([*differences, *here])}, and no yardstick ran in both to "
                "compare them by; measure eager beside the others"
            )
        if not (differences or here) and yardstick is not None:
            drift = judge.ratio(before[name], after[name], yardstick, None)
            if verdict(drift, threshold) in ("faster", "slower"):
                warnings.append(
                    f"{name}: {yardstick} itself takes {drift.value:.3f} times as long as in the old result"
                )
            else:
                yardstick = None
        changes += judge.changes(before[name], after[name], yardstick)
    return Comparison(
        changes=tuple(changes), warnings=tuple(warnings), threshold=threshold, confidence=judge.confidence
    )


class _Session:
    """One scenario of one report, by contender."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.contenders = {contender.name: contender for contender in scenario.contenders}
        self.sound = {
            contender.name: contender.measurement
            for contender in scenario.contenders
            if contender.status == "ok" and contender.measurement is not None
        }
        self._check()

    def seconds(self, name: str) -> NDArray[np.float64]:
        """Of a call, one number per round: the mean of the calls of a round, which differ where steps are mixed."""
        return self._by_round(self.sound[name].samples.picture)

    def estimate(self, name: str, yardstick: str | None, bootstrap: Bootstrap) -> Estimate:
        """The median time of a call: in seconds, or in the yardstick's, which ran in turns with it."""
        if yardstick is None:
            return bootstrap.median(self.seconds(name))
        if self.scenario.reference is None or not self.scenario.reference_samples:
            return bootstrap.median(self.seconds(name)) / bootstrap.median(self.seconds(yardstick))
        return self._measured(self.scenario.reference).estimate(yardstick, name, bootstrap)

    def _measured(self, reference: str) -> Measured:
        groups = []
        for number, samples in enumerate(self.scenario.reference_samples):
            mine = {name: self.seconds(name) for name, found in self.sound.items() if found.group == number}
            groups.append(mine | {reference: self._by_round(samples)})
        return Measured(groups, reference)

    def _check(self) -> None:
        """Refuses samples that cannot be what the benchmark wrote."""
        scenario, groups = self.scenario, self.scenario.reference_samples
        for name, found in self.sound.items():
            calls, steps = found.samples.picture, scenario.setting.steps
            whole = bool(calls) and bool(steps) and len(calls) % len(steps) == 0
            beside = scenario.reference in (None, name) or (
                0 <= found.group < len(groups) and len(groups[found.group]) == len(calls)
            )
            if not whole or not beside or min(calls) <= 0:
                raise UserError(
                    f"{scenario.name}: the samples of {name} are not those of whole rounds; the file was edited, "
                    "measure again"
                )

    def _by_round(self, calls: Sequence[float]) -> NDArray[np.float64]:
        seconds: NDArray[np.float64] = np.asarray(calls, np.float64).reshape(-1, len(self.scenario.setting.steps))
        means: NDArray[np.float64] = seconds.mean(axis=1)
        return means


class _Judge:
    """Compares contenders of two sessions."""

    def __init__(self, threshold: float, confidence: float) -> None:
        self.threshold, self.confidence = threshold, confidence
        self._bootstrap = Bootstrap()

    def ratio(self, old: _Session, new: _Session, name: str, yardstick: str | None) -> Ratio:
        """New over old."""
        after = new.estimate(name, yardstick, self._bootstrap)
        return (after / old.estimate(name, yardstick, self._bootstrap)).ratio(self.confidence)

    def changes(self, old: _Session, new: _Session, yardstick: str | None) -> Iterator[Change]:
        """One for each contender of either session, in the new one's order."""
        for name in dict.fromkeys([*new.contenders, *old.contenders]):
            ratio = None
            if name in old.sound and name in new.sound:
                ratio = self.ratio(old, new, name, yardstick)
                outcome, note = self._outcome(old, new, name, yardstick, ratio)
            else:
                outcome, note = _outcome_without_ratio(old, new, name)
            yield Change(
                scenario=new.scenario.name,
                contender=name,
                outcome=outcome,
                old_seconds=_median(old, name),
                new_seconds=_median(new, name),
                ratio=ratio,
                yardstick=yardstick,
                note=note,
            )

    def _outcome(
        self, old: _Session, new: _Session, name: str, yardstick: str | None, ratio: Ratio
    ) -> tuple[Outcome, str]:
        if name == yardstick:
            return "yardstick", ""
        rounds = min(len(old.seconds(name)), len(new.seconds(name)))
        if rounds < FEWEST_ROUNDS:
            return "cannot tell", f"{rounds} rounds; it takes {FEWEST_ROUNDS}"
        found = verdict(ratio, self.threshold)
        return found, "more rounds would tell" if found == "cannot tell" else ""


def _outcome_without_ratio(old: _Session, new: _Session, name: str) -> tuple[Outcome, str]:
    if name not in new.contenders:
        return "gone", "only in the old result"
    if name not in old.contenders:
        return "new", "only in the new result"
    if name in new.sound:
        return "mended", f"before: {old.contenders[name].reason}"
    return "broken" if name in old.sound else "failed", new.contenders[name].reason


def _yardstick(old: _Session, new: _Session) -> str | None:
    """Eager PyTorch where it ran in both, else what ran beside all others."""
    wanted = (new.scenario.eager, old.scenario.eager, new.scenario.reference, old.scenario.reference)
    return next((name for name in wanted if name in old.sound and name in new.sound), None)


def _median(session: _Session, name: str) -> float | None:
    return float(np.median(session.seconds(name))) if name in session.sound else None


def _report_differences(old: Report, new: Report) -> list[str]:
    """Why seconds of the two cannot be compared, apart from the code that is being judged."""
    found = [
        f"machine: {field} was {_shown(getattr(old.machine, field))}, is {_shown(getattr(new.machine, field))}"
        for field in HARDWARE
        if getattr(old.machine, field) != getattr(new.machine, field)
    ]
    memory = [round(report.machine.memory_bytes / 2**30) for report in (old, new)]
    if memory[0] != memory[1]:
        found.append(f"machine: memory was {memory[0]} GiB, is {memory[1]} GiB")
    packages = dict.fromkeys([*old.versions, *new.versions])
    found += [
        f"version: {name} was {old.versions.get(name, 'missing')}, is {new.versions.get(name, 'missing')}"
        for name in packages
        if name != OWN_PACKAGE and old.versions.get(name) != new.versions.get(name)
    ]
    if old.model.profile != new.model.profile:
        found.append(f"setting: profile was {old.model.profile}, is {new.model.profile}")
    return found


def _setting_differences(old: Setting, new: Setting) -> list[str]:
    return [
        f"setting: {field} was {_shown(getattr(old, field))}, is {_shown(getattr(new, field))}"
        for field in WORK
        if getattr(old, field) != getattr(new, field)
    ]


def _busy(which: str, report: Report) -> list[str]:
    machine = report.machine
    if not machine.is_busy:
        return []
    return [f"machine: load {machine.load_average} on {machine.cores} cores when the {which} result was measured"]


def _shown(value: object) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
