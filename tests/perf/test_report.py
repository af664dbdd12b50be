"""The JSON schema, and the table made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlrt.perf.accuracy import Accuracy
from controlrt.perf.graphs import GraphCounts
from controlrt.perf.machine import Commit, this_machine
from controlrt.perf.report import AblationReport, Group, Setting, VariantResult, load_ablation, save_ablation, table
from controlrt.perf.statistics import Ratio
from controlrt.runtime.errors import UserError

ONE = Ratio(value=1, low=1, high=1)


def result(name: str, error: float | None) -> VariantResult:
    return VariantResult(
        name=name,
        runtime="onnxruntime",
        passes=("Geglu", "binding-times"),
        samples_seconds=(0.5, 0.25, 0.75),
        median_seconds=0.5,
        load_seconds=1.25,
        peak_memory_bytes=300 * 2**20,
        speedup_over_eager=None if error is None else Ratio(value=2, low=1.5, high=2.5),
        speedup_over_plain=ONE,
        graph=None if error is None else GraphCounts(nodes=918, matmuls=126, flops=10_370_000_000),
        accuracy=None if error is None else Accuracy(compared_with="plain", max_relative_error=error, limit=1e-5),
    )


def report() -> AblationReport:
    return AblationReport(
        benchmark="ablation",
        schema_version=1,
        created="2026-01-01T00:00:00Z",
        command="controlrt bench ablation",
        commit=Commit(hash="0123456789abcdef", dirty=True),
        machine=this_machine(),
        versions={"controlrt": "0"},
        setting=Setting(
            model="demo",
            controlnet="canny",
            width=512,
            height=512,
            batch=1,
            rows=2,
            sampler="DDIM",
            step=9,
            steps=20,
            guidance_scale=0.5,
            threads=2,
            repeats=3,
        ),
        reference="plain",
        eager=None,
        groups=(Group(variants=("plain", "good", "bad"), reference_samples_seconds=(0.5, 0.25, 0.75)),),
        variants=(result("plain", None), result("good", 1e-6), result("bad", 2e-5)),
        lost={"gone": "the worker of gone ended with signal 9"},
    )


def test_json_is_read_back_as_it_was_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "ablation.json"
    save_ablation(report(), file)
    assert load_ablation(file) == report()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"more": 1}))
    with pytest.raises(UserError, match="unknown field `more`"):
        load_ablation(file)


def test_json_says_what_was_measured_where(tmp_path: Path) -> None:
    save_ablation(report(), tmp_path / "ablation.json")
    read = json.loads((tmp_path / "ablation.json").read_text())
    assert read["machine"].keys() >= {"cpu", "cores", "memory_bytes", "os"}
    assert read["commit"] == {"hash": "0123456789abcdef", "dirty": True}
    assert read["variants"][0]["samples_seconds"] == [0.5, 0.25, 0.75]


def test_what_is_too_far_off_is_told() -> None:
    assert [variant.name for variant in report().failed] == ["bad"]
    lines = table(report()).splitlines()
    (good,) = (line for line in lines if line.startswith("good"))
    assert " ".join(good.split()) == "good 0.500 2.00 [1.50, 2.50] 1.00 [1.00, 1.00] 300 1.2 918 126 10.37 1.0e-06"
    assert [line.split()[0] for line in lines if line.endswith("TOO FAR")] == ["bad"]
    assert any("0123456789ab+dirty" in line for line in lines)
    assert "not measured: gone: the worker of gone ended with signal 9" in lines
