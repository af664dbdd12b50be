"""Tables of results in Markdown, and that those of the README are what the results say."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench_reports import full_report, gpu_report
from controlrt.perf.readme import ablation_markdown, fill, markdown
from controlrt.perf.report import load_ablation
from controlrt.perf.results import load, save
from controlrt.perf.server import results as server_results
from controlrt.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("file", "marks"), [("README.md", 6), ("perf/README.md", 1), ("docs/passes.md", 3)])
def test_the_documents_say_what_the_results_say(file: str, marks: int) -> None:
    text = (ROOT / file).read_text()
    assert text.count("<!-- bench ") == marks
    assert fill(text, (ROOT / file).parent) == text, f"run: python -m controlrt.perf.readme {file}"


def test_the_readme_says_how_fast_a_compiled_step_is() -> None:
    found = {
        each.name: each.speedup_over_eager
        for each in load_ablation(ROOT / "perf" / "results" / "ablation-sd15.json").variants
    }
    openvino, onnxruntime = found["openvino+binding-times"], found["onnxruntime+binding-times"]
    assert openvino is not None
    assert onnxruntime is not None
    said = f"{openvino.value:.2f} times as fast as eager PyTorch's with OpenVINO and {onnxruntime.value:.2f} with"
    assert said in (ROOT / "README.md").read_text()


def test_the_documents_say_what_was_measured_on_a_gpu() -> None:
    results, documents = ROOT / "perf" / "results", ROOT / "docs"
    text = (documents / "cuda.md").read_text()
    (found,) = (
        each.measurement
        for each in load(results / "sd15-512-h200.json").scenario("single stream").contenders
        if each.name == "cuda-fp16"
    )
    assert found is not None
    for ratio in (found.speedup_over_eager, found.speedup_over_compiled):
        assert ratio is not None
        assert f"| {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |" in text
    assert f"| {found.percentiles.picture.spread:.3f} |" in text
    assert found.parity is not None
    assert f"| {found.parity.psnr_db:.1f} dB |" in text
    steps = json.loads((results / "cuda-passes-sd15.json").read_text())["step_milliseconds"]
    text = (documents / "passes.md").read_text()
    assert f"all passes being {statistics.median(steps['all']):.2f} ms" in text
    for variant, times in steps.items():
        if variant.startswith("without ") and variant != "without JoinedProjections":  # a pass that is gone
            ratio = statistics.median(np.divide(times, steps["all"]))
            assert f"| `{variant.removeprefix('without ')}` | {ratio:.3f} |" in text


MEMORY_ROWS = {
    "eager": "eager PyTorch, float32",
    "eager-channels-last": "eager PyTorch, channels last",
    "plain-onnxruntime": "plain export, ONNX Runtime, float32",
    "openvino-fp32": "OpenVINO, float32",
    "onnxruntime-fp32": "ONNX Runtime, float32",
    "openvino-int8": "OpenVINO, int8",
}


def test_the_documents_say_how_much_memory_a_picture_takes() -> None:
    text = (ROOT / "docs" / "precision.md").read_text()
    report = load(ROOT / "perf" / "results" / "sd15-512-memory.json")
    contenders = {each.name: each for each in report.scenario("single stream").contenders}
    assert report.command in text
    eager = contenders["eager"].measurement
    assert eager is not None
    for name, title in MEMORY_ROWS.items():
        measured, stored = contenders[name].measurement, contenders[name].engine_bytes
        assert measured is not None
        assert stored is not None
        peak, of_eager = measured.memory.peak_host_bytes, measured.memory.peak_host_bytes / eager.memory.peak_host_bytes
        step, faster = measured.percentiles.step.p50, measured.step_speedup_over_eager
        assert faster is not None
        ratio = f"{faster.value:.2f} ({faster.low:.2f} to {faster.high:.2f})"
        row = f"| {title} | {peak / 2**20:.0f} | {of_eager:.2f} | {stored / 2**20:.0f} | {step:.1f} | {ratio} |"
        assert row in text


INT8_ROWS = {
    "eager": "eager PyTorch, float32",
    "eager-channels-last": "eager PyTorch, channels last",
    "eager-bf16": "eager PyTorch, bfloat16",
    "plain-openvino": "plain export, OpenVINO, float32",
    "openvino-fp32": "OpenVINO, float32",
    "openvino-bf16": "OpenVINO, bfloat16",
    "openvino-int8": "OpenVINO, int8, all else in bfloat16",
}


def test_the_documents_say_how_fast_int8_is() -> None:
    text = (ROOT / "docs" / "int8.md").read_text()
    report = load(ROOT / "perf" / "results" / "sd15-512-int8.json")
    assert report.command in text
    contenders = report.scenario("single stream").contenders
    assert [each.name for each in contenders] == list(INT8_ROWS)
    for each in contenders:
        measured, stored = each.measurement, each.engine_bytes
        assert measured is not None
        assert stored is not None
        assert each.options.get("unquantized") == ("bf16" if each.name == "openvino-int8" else None)
        faster, peak = measured.step_speedup_over_eager, measured.memory.peak_host_bytes
        assert faster is not None
        ratio = f"{faster.value:.2f} ({faster.low:.2f} to {faster.high:.2f})"
        likeness = "" if measured.parity is None else f"{measured.parity.psnr_db:.0f} dB"
        numbers = [
            f"{measured.percentiles.step.p50:.2f}",
            ratio,
            f"{stored / 2**20:.0f}",
            f"{peak / 2**20:.0f}",
            likeness,
        ]
        assert f"| {' | '.join([INT8_ROWS[each.name], *numbers])} |" in text
        if each.name in ("eager", "openvino-fp32", "openvino-bf16", "openvino-int8"):
            assert f"{peak / 2**20:.0f}" in (ROOT / "docs" / "precision.md").read_text()


def test_the_documents_say_what_stays_out_of_int8_and_why() -> None:
    text = (ROOT / "docs" / "int8.md").read_text()
    found = json.loads((ROOT / "perf" / "results" / "kept-layers-demo.json").read_text())
    for group, each in found["groups"].items():
        before, after = (sum(times[name] for times in each["programs"].values()) for name in ("float32_ms", "int8_ms"))
        numbers = [str(each["layers"]), f"{each['final_latent_error']:.1e}", f"{each['psnr_db']:.1f} dB"]
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {group} |"))
        assert row.endswith(f"| {' | '.join([*numbers, f'{before:.1f}', f'{after:.1f}'])} |")


def test_the_documents_say_what_int8_gives_attention() -> None:
    text = (ROOT / "docs" / "int8.md").read_text()
    found = json.loads((ROOT / "perf" / "results" / "attention-int8.json").read_text())
    assert found["command"] in text
    for form, each in found["forms"].items():
        error = "" if form == "float32" else f"{each['error']:.1e}"
        assert f"| {form} | {each['milliseconds']:.0f} | {error} |" in text


def test_the_documents_say_what_the_server_was_measured_at() -> None:
    text = " ".join((ROOT / "docs" / "server.md").read_text().split())
    report = server_results.load(ROOT / "perf" / "results" / "server.json")
    assert report.capacity is not None
    assert report.mixed is not None
    assert report.overhead is not None
    assert report.overload is not None
    assert report.soak is not None
    assert report.command.removeprefix("controlrt ") in text
    assert report.machine.cpu in text
    for each in report.mixed.by_steps:
        seconds = [f"{getattr(each.latency, name).value:.2f} s" for name in ("p50", "p90", "p99")]
        better = each.p99_ratio
        digits = 1 if better.value > 1 else 2
        ratio = f"{better.value:.{digits}f} ({better.low:.{digits}f} to {better.high:.{digits}f})"
        assert f"| {' | '.join([str(each.steps), *seconds, ratio])} |" in text
    rates = report.capacity.requests_per_second
    capacity = rates[report.setting.policy] / rates[report.setting.baseline]
    throughput = report.mixed.throughput / report.mixed.baseline_throughput
    assert f"Throughput is {throughput:.3f} of that of whole requests, the capacity {capacity:.3f}." in text
    overload = report.overload
    goodput = overload.goodput / overload.capacity
    rejected = f"{1000 * overload.rejection_p99:.0f} ms"
    said = f"goodput is {goodput:.2f} of the capacity in requests and {overload.steps_goodput:.2f} in steps"
    assert f"{said}, and a rejection takes {rejected} (p99)" in text
    assert not report.soak.lost
    assert not report.soak.mixed_up
    assert f"memory grew by {100 * report.soak.growth:.1f}% over the second half" in text
    calls = {(each.steps, each.encoding): f"{1000 * each.overhead.value:.1f}" for each in report.overhead.calls}
    assert f"{calls[4, 'png']} and {calls[4, 'jpeg']} ms of 4 steps, as PNG and JPEG" in text
    assert f"{calls[20, 'png']} and {calls[20, 'jpeg']} ms of 20 steps" in text
    low, high = (
        min(each.overhead.low for each in report.overhead.calls),
        max(each.overhead.high for each in report.overhead.calls),
    )
    assert f"within intervals of {1000 * low:.1f} to {1000 * high:.1f} ms" in text


def test_a_table_has_every_contender_with_its_numbers_or_its_reason() -> None:
    report = full_report()
    text = markdown(report)
    single = report.scenario("single stream")
    assert report.command in text
    for contender in single.contenders:
        row = next(line for line in text.splitlines() if line.startswith(f"| {contender.name} |"))
        assert row.count("|") == 7
        if contender.status == "ok":
            assert contender.measurement is not None
            ratio = contender.measurement.speedup_over_eager
            assert ratio is not None
            assert f"| {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |" in row
        else:
            assert f"{contender.status}: {contender.reason}" in row


def test_a_gpu_s_table_has_what_matters_there() -> None:
    report = gpu_report()
    text = markdown(report)
    head = "| seconds | p99/p50 | times as fast as eager | times as fast as torch-compile | GPU memory | PSNR |"
    assert head in text
    assert "NVIDIA H100; PyTorch 2.11.0, ONNX Runtime 1.31.1 for CUDA:" in text
    row = next(line for line in text.splitlines() if line.startswith("| cuda-fp16 |"))
    assert row.count("|") == head.count("|") + 1
    assert row.endswith("| 3000 MiB | 48 dB |")
    measured = report.scenarios[0].contenders[2].measurement
    assert measured is not None
    assert measured.speedup_over_compiled is not None
    assert f"| {measured.speedup_over_compiled.value:.2f} (" in row
    assert f"| cuda-fp16 | {measured.percentiles.picture.p50:.3f} | {measured.percentiles.picture.spread:.3f} |" in row


def test_a_table_has_every_variant_of_an_ablation(tmp_path: Path) -> None:
    file = ROOT / "perf" / "results" / "ablation-demo.json"
    lines = fill(f"<!-- bench {file} -->\n<!-- end bench -->\n", tmp_path).splitlines()
    head, variants = next(line for line in lines if line.startswith("|  |")), load_ablation(file).variants
    assert "times eager" in head
    assert len(variants) == len([line for line in lines if line.startswith("| `")])
    for each in variants:
        (row,) = (line for line in lines if line.startswith(f"| `{each.name}` |"))
        cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
        ratio = each.speedup_over_plain
        found = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        assert cells["times plain ONNX Runtime"] == found
        assert float(cells["peak memory, GiB"]) == pytest.approx(each.peak_memory_bytes / 2**30, abs=0.05)
        if each.graph is None:
            assert (cells["nodes"], cells["MatMul, Gemm"], cells["GFLOP"]) == ("", "", "")
        else:
            assert (int(cells["nodes"]), int(cells["MatMul, Gemm"])) == (each.graph.nodes, each.graph.matmuls)
            assert float(cells["GFLOP"]) == pytest.approx(each.graph.flops / 1e9, abs=0.005)
    without = msgspec.structs.replace(load_ablation(file), eager=None)
    assert "times eager" not in ablation_markdown(without)


def test_only_what_stands_between_the_marks_changes(tmp_path: Path) -> None:
    save(full_report(), tmp_path / "a.json")
    text = "before\n<!-- bench a.json -->\nold\n<!-- end bench -->\nafter\n"
    filled = fill(text, tmp_path)
    assert filled.startswith("before\n<!-- bench a.json -->\n`controlrt bench")
    assert filled.endswith("<!-- end bench -->\nafter\n")
    assert "old" not in filled
    assert fill(filled, tmp_path) == filled
    with pytest.raises(UserError, match="cannot read"):
        fill(text.replace("a.json", "b.json"), tmp_path)
