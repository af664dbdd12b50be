"""Comparisons of sessions of which it is known what changed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from bench_reports import CONTENDERS, MACHINE, VERSIONS, Made, report, scenario
from controlrt.perf.comparison import Change, Comparison, compare_reports
from controlrt.perf.results import Report, Scenario
from controlrt.runtime.errors import UserError

OTHER_MACHINE = msgspec.structs.replace(MACHINE, cpu="Xeon")
SLOWER = CONTENDERS | {"openvino": Made(seconds=1.9 * 1.05, runtime="openvino")}
"""A regression of 5%."""


def found(comparison: Comparison, contender: str) -> Change:
    (change,) = (change for change in comparison.changes if change.contender == contender)
    return change


def test_a_regression_of_five_percent_is_found() -> None:
    comparison = compare_reports(report(scenario(seed=0)), report(scenario(SLOWER, seed=1)))
    assert [change.contender for change in comparison.regressions] == ["openvino"]
    change = found(comparison, "openvino")
    assert change.ratio is not None
    assert change.ratio.value == pytest.approx(1.05, abs=0.015)
    assert change.old_seconds == pytest.approx(1.9, rel=0.01)
    assert change.yardstick is None
    assert found(comparison, "onnxruntime").outcome == "same"
    assert not comparison.warnings


def test_a_gain_is_found() -> None:
    comparison = compare_reports(report(scenario(SLOWER, seed=1)), report(scenario(seed=0)))
    assert found(comparison, "openvino").outcome == "faster"
    assert not comparison.regressions


def test_a_regression_below_the_threshold_counts_for_nothing() -> None:
    comparison = compare_reports(report(scenario(seed=0)), report(scenario(SLOWER, seed=1)), threshold=0.1)
    assert found(comparison, "openvino").outcome == "same"


def test_sessions_without_a_change_are_seldom_flagged() -> None:
    """At most one of 40 may be, whatever the number of contenders; no threshold to help. 20 sessions of three."""
    few = {name: CONTENDERS[name] for name in ("eager", "onnxruntime", "openvino")}
    flagged = 0
    for number in range(20):
        old, new = (report(scenario(few, seed=2 * number + half, noise=0.03)) for half in (0, 1))
        flagged += bool(compare_reports(old, new, threshold=0).regressions)
    assert flagged <= 2


def test_noise_leaves_it_open() -> None:
    comparison = compare_reports(
        report(scenario(seed=0, noise=0.2)), report(scenario(SLOWER, seed=1, noise=0.2)), threshold=0.03
    )
    assert found(comparison, "openvino").outcome == "cannot tell"


@pytest.mark.parametrize("regression", [False, True])
def test_drift_and_a_slower_machine_cancel(regression: bool) -> None:
    """The new machine is 1.7 times slower, and gets slower by half within the session."""
    old = report(scenario(seed=0, drift=1.2))
    slow = scenario(SLOWER if regression else CONTENDERS, seed=1, drift=1.5, slowness=1.7)
    comparison = compare_reports(old, report(slow, machine=OTHER_MACHINE))
    change = found(comparison, "openvino")
    assert change.ratio is not None
    assert change.ratio.value == pytest.approx(1.05 if regression else 1, abs=0.015)
    assert change.outcome == ("slower" if regression else "same")
    assert change.yardstick == "eager"
    assert found(comparison, "eager").outcome == "yardstick"
    assert comparison.warnings == ("machine: cpu was AMD EPYC (family 25, model 17), is Xeon",)


def test_a_yardstick_that_moved_is_noticed() -> None:
    """Same machine, but the host gave it less that day: seconds would call everything a regression."""
    comparison = compare_reports(report(scenario(seed=0)), report(scenario(seed=1, slowness=1.2)))
    assert not comparison.regressions
    assert found(comparison, "openvino").yardstick == "eager"
    (warning,) = comparison.warnings
    assert "eager itself takes 1.2" in warning


def test_contenders_of_other_groups_are_compared_by_the_reference() -> None:
    """The second group ran when the machine was twice as slow, in the new session only."""
    split = CONTENDERS | {"openvino": Made(seconds=1.9, runtime="openvino", group=1)}
    slower = CONTENDERS | {"openvino": Made(seconds=1.9 * 1.05, runtime="openvino", group=1)}
    old = report(scenario(split, seed=0, group_slowness=(1, 1)))
    for contenders, outcome in ((split, "same"), (slower, "slower")):
        new = report(scenario(contenders, seed=1, group_slowness=(1, 2)), machine=OTHER_MACHINE)
        assert found(compare_reports(old, new), "openvino").outcome == outcome


def test_calls_of_mixed_steps_are_compared_round_by_round() -> None:
    old, new = (
        report(scenario(contenders, seed=seed, steps=(10, 20, 50), kind="mixed-steps"))
        for seed, contenders in enumerate((CONTENDERS, SLOWER))
    )
    comparison = compare_reports(old, new)
    assert [change.contender for change in comparison.regressions] == ["openvino"]


def test_few_rounds_tell_nothing() -> None:
    comparison = compare_reports(report(scenario(seed=0)), report(scenario(SLOWER, seed=1, rounds=4)))
    change = found(comparison, "openvino")
    assert (change.outcome, change.note) == ("cannot tell", "4 rounds; it takes 5")


def test_what_no_longer_runs_is_a_regression() -> None:
    broken = Made(runtime="openvino", status="failed", reason="the worker ended with signal 9")
    comparison = compare_reports(report(scenario()), report(scenario(CONTENDERS | {"openvino": broken}, seed=1)))
    assert [change.outcome for change in comparison.regressions] == ["broken"]
    assert comparison.regressions[0].note == "the worker ended with signal 9"
    back = compare_reports(report(scenario(CONTENDERS | {"openvino": broken})), report(scenario(seed=1)))
    assert found(back, "openvino").outcome == "mended"
    assert found(back, "torch.compile").outcome == "failed"


def test_a_wrong_picture_has_no_speed() -> None:
    wrong = Made(seconds=0.5, runtime="openvino", psnr_db=9, status="wrong picture", reason="PSNR 9 dB")
    comparison = compare_reports(report(scenario()), report(scenario(CONTENDERS | {"openvino": wrong}, seed=1)))
    change = found(comparison, "openvino")
    assert (change.outcome, change.ratio, change.new_seconds) == ("broken", None, None)


def test_what_only_one_result_has_is_named() -> None:
    fewer = {name: made for name, made in CONTENDERS.items() if name != "openvino"}
    old = report(scenario(fewer), scenario(name="offline, batch 2", batch=2, kind="offline"))
    comparison = compare_reports(old, report(scenario(seed=1)))
    assert found(comparison, "openvino").outcome == "new"
    assert comparison.warnings == ("only in the old result: offline, batch 2",)
    comparison = compare_reports(report(scenario(seed=1)), old)
    assert found(comparison, "openvino").outcome == "gone"
    assert comparison.warnings == (
        "only in the new result: offline, batch 2",
        "single stream: ran rightly in the old result and is not in the new one: openvino",
    )


def test_other_versions_and_settings_are_named() -> None:
    new = report(scenario(seed=1, threads=1), versions={**VERSIONS, "torch": "3.0", "controlrt": "9"})
    comparison = compare_reports(report(scenario()), new)
    assert comparison.warnings == (
        "version: torch was 2.13.0+cpu, is 3.0",
        "single stream: setting: threads was 2, is 1",
    )
    assert found(comparison, "openvino").yardstick == "eager"


def test_a_busy_machine_is_named() -> None:
    busy = msgspec.structs.replace(MACHINE, load_average=3.5)
    comparison = compare_reports(report(scenario()), report(scenario(seed=1), machine=busy))
    assert comparison.warnings == ("machine: load 3.5 on 2 cores when the new result was measured",)


def edited(change: Callable[[Scenario], Scenario]) -> Report:
    return report(change(scenario(seed=1)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            msgspec.structs.replace(report(), model=msgspec.structs.replace(report().model, name="sd15")),
            report(),
            "of model sd15 and the new one of demo",
        ),
        (report(), report(scenario(name="offline, batch 2")), "the old result has single stream, the new one offline"),
        (
            report(),
            edited(lambda each: msgspec.structs.replace(each, contenders=(), reference=None, eager=None)),
            "no contender ran rightly in both",
        ),
        (
            report(),
            edited(lambda each: msgspec.structs.replace(each, reference_samples=((1.0, 2.0),))),
            "are not those of whole rounds",
        ),
        (
            report(),
            edited(lambda each: msgspec.structs.replace(each, reference_samples=())),
            "are not those of whole rounds",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(old: Report, new: Report, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare_reports(old, new)


def test_sessions_that_differ_need_a_yardstick() -> None:
    """In the old one eager and in the new one nothing that ran beside it was right."""
    wrong = Made(seconds=2.75, runtime="pytorch", status="wrong picture", reason="PSNR 9 dB")
    new = report(scenario(CONTENDERS | {"eager": wrong}, seed=1), machine=OTHER_MACHINE)
    with pytest.raises(UserError, match="no yardstick ran in both"):
        compare_reports(report(), new)
