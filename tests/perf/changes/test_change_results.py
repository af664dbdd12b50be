"""What is said of calls whose seconds are made up, the file of it, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench_reports import MACHINE, VERSIONS
from controlrt.perf.changes import second_control, single_changes
from controlrt.perf.changes.changes_table import table
from controlrt.perf.changes.meter import STAGES, CallSeconds
from controlrt.perf.changes.results import SCHEMA_VERSION, ChangesReport, SecondControl, Setting, load, save
from controlrt.perf.changes.walk import CHANGES, FIRST_USE, PROMPT, SAME, SCALE, WINDOW
from controlrt.perf.targets import missed
from controlrt.runtime.errors import UserError

ROUNDS = 20
TRUTH = dict.fromkeys(CHANGES, 0.0) | {WINDOW: 0.0004, FIRST_USE: 0.003, PROMPT: 0.002}
"""What each change costs the host."""
PROGRAMS = ("controlnet.canny.step", "controlnet.mask.step")


def call(rng: np.random.Generator, drift: float, added: float = 0.0, step: float = 0.05) -> CallSeconds:
    """Stages of 1, 2, 3 and 4 ms, all longer by a drift, and what a change adds when memory is bound."""
    seconds = [drift * (0.001 * (number + 1) + rng.normal(0, 2e-5)) for number in range(len(STAGES))]
    seconds[1] += added
    steps = tuple(drift * step + rng.normal(0, 1e-4) for _ in range(4))
    own = {PROGRAMS[0]: 4 * drift * 0.01, PROGRAMS[1]: 4 * drift * 0.02}
    return CallSeconds(stages=dict(zip(STAGES, seconds, strict=True)), networks=0.007, steps=steps, programs=own)


def second(seed: int = 0) -> SecondControl:
    """Both ControlNets together take 1 ms more than each alone."""
    rng = np.random.default_rng(seed)
    truth = {"none": 0.05, "first": 0.06, "second": 0.07, "both": 0.081}
    rounds = [1 + number / ROUNDS for number in range(ROUNDS)]
    calls = {kind: [call(rng, drift, step=step) for drift in rounds] for kind, step in truth.items()}
    return second_control.summarized(("canny", "mask"), PROGRAMS, calls)


def report(seed: int = 0) -> ChangesReport:
    """Of a machine that gets slower all the time, to half its speed."""
    rng = np.random.default_rng(seed)
    calls = {
        name: [
            [call(rng, 1 + number / ROUNDS, TRUTH.get(name, 0.0)) for _ in range(3 if name == SAME else 1)]
            for number in range(ROUNDS)
        ]
        for name in (SAME, *CHANGES)
    }
    return ChangesReport(
        benchmark="changes",
        schema_version=SCHEMA_VERSION,
        created="2026-01-02T03:04:05Z",
        command="controlrt bench changes",
        commit=None,
        machine=MACHINE,
        versions=VERSIONS,
        setting=Setting(
            bundle="demo",
            named=False,
            backend="onnxruntime",
            precision="fp32",
            width=256,
            height=256,
            steps=4,
            sampler="DDIM",
            threads=2,
            rounds=ROUNDS,
            seed=0,
        ),
        changes=single_changes.summarized(calls),
        second=second(seed),
    )


def test_what_is_added_is_found_on_a_machine_that_gets_slower() -> None:
    found = {change.name: change for change in report().changes}
    assert found[SAME].added is None
    for name, truth in TRUTH.items():
        added = found[name].added
        assert added is not None
        assert added.low <= added.value <= added.high
        assert added.value == pytest.approx(truth, abs=1e-4)
        assert added.high - added.low < 2e-4
    assert found[PROMPT].network_seconds == pytest.approx(0.007)
    assert found[WINDOW].stages["noise"] == pytest.approx(0.004 * 1.475, rel=0.05)
    assert len(found[SAME].host_seconds) == ROUNDS


def test_only_changes_of_scale_and_window_are_judged() -> None:
    found = report()
    assert {target.name.partition(" adds")[0] for target in found.targets()} == {
        "scale",
        "layer weights",
        "scale curve",
        "window",
        "first use of a window",
    }
    assert missed(found.targets()) == "first use of a window adds, seconds"


def test_a_second_control_costs_what_it_adds() -> None:
    found = second()
    assert found.ratio.value == pytest.approx(31 / 30, abs=0.01)
    assert found.over_own is not None
    assert found.over_own.value == pytest.approx(31 / 30, abs=0.01)
    assert found.own_seconds == pytest.approx({"canny": 0.01475, "mask": 0.0295}, rel=0.01)
    rng = np.random.default_rng(0)
    alone = {kind: [call(rng, 1, step=0.05 + 0.01 * on)] for on, kind in enumerate(second_control.KINDS)}
    unknown = second_control.summarized(("canny", "mask"), ("other", "another"), alone)
    assert unknown.own_seconds is None
    assert unknown.over_own is None


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    for each in (report(), msgspec.structs.replace(report(), second=None)):
        save(each, tmp_path / "changes.json")
        assert load(tmp_path / "changes.json") == each


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schema_version": 99}, "schema version 99"), ({"benchmark": "server"}, "no result"), ({"x": 1}, "unknown")],
)
def test_another_file_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "changes.json"
    save(report(), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load(file)


def test_the_table_shows_what_was_found() -> None:
    shown = table(report())
    for text in ("first use of a window", "canny", "a step with ControlNets, ms: none", "2 threads"):
        assert text in shown
    assert "no second one" in table(msgspec.structs.replace(report(), second=None))


def test_the_documents_say_what_a_change_costs() -> None:
    root = Path(__file__).parents[3]
    text = " ".join((root / "docs" / "control.md").read_text().split())
    found = load(root / "perf" / "results" / "changes.json")
    assert found.command in text
    assert found.second is not None
    changes = {each.name: each.added for each in found.changes}
    for said, name in (("another scale", SCALE), ("another window", WINDOW), ("its first use", FIRST_USE)):
        added = changes[name]
        assert added is not None
        value, low, high = (round(1000 * each, 1) + 0.0 for each in (added.value, added.low, added.high))
        assert f"{said} {value} ({low} to {high})" in text
    alone, own = found.second.ratio, found.second.over_own
    assert own is not None
    assert f"add {alone.value:.2f} ({alone.low:.2f} to {alone.high:.2f}) of what each adds" in text
    assert f"and {own.value:.2f} ({own.low:.2f} to {own.high:.2f}) of what their own programs take" in text
