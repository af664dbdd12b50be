"""Puts measured numbers where people read them: a table of every result that a Markdown file asks for.

    python -m controlrt.perf.readme README.md

fills what stands between ``<!-- bench RESULT.json -->`` and ``<!-- end bench -->`` with a table made of that file,
which is named as seen from the Markdown file: a result of ``controlrt bench`` or of ``controlrt bench ablation``. A
test checks that README.md and others are what this makes of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from controlrt.perf.report import AblationReport, VariantResult, load_ablation
from controlrt.perf.result_file import which_benchmark
from controlrt.perf.results import Contender, Report, Scenario, load
from controlrt.perf.statistics import Ratio
from controlrt.runtime.storage import atomic_file

_PLACE = re.compile(r"(<!-- bench (?P<file>\S+) -->\n).*?(<!-- end bench -->)", re.DOTALL)


def main() -> None:
    """Rewrites the files on the command line."""
    for name in sys.argv[1:]:
        file = Path(name)
        filled = fill(file.read_text(), file.parent)
        with atomic_file(file) as partial:
            partial.write_text(filled)


def fill(text: str, directory: Path) -> str:
    """``text`` with its tables made anew.

    Args:
        text: Markdown.
        directory: that results are named from.

    Raises:
        UserError: a result that is missing or none.
    """
    return _PLACE.sub(lambda found: f"{found[1]}{_read(directory / found['file'])}{found[3]}", text)


def _read(file: Path) -> str:
    return ablation_markdown(load_ablation(file)) if which_benchmark(file) == "ablation" else markdown(load(file))


def markdown(report: Report) -> str:
    """A result as Markdown: how it came about, and one table for every scenario."""
    lines = [_how(report), ""]
    for scenario in report.scenarios:
        lines += [*_table(scenario), ""]
    return "\n".join(lines)


def ablation_markdown(report: AblationReport) -> str:
    """A result of the ablation as Markdown: how it came about, and one table."""
    columns = [(title, cell) for title, cell in _COLUMNS.items() if report.eager is not None or title != _TIMES_EAGER]
    rows = [["", *(title for title, _ in columns)]]
    rows += [[f"`{each.name}`", *(cell(each) for _, cell in columns)] for each in report.variants]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join([_how(report), "", *(f"| {' | '.join(row)} |" for row in rows), "", ""])


_TIMES_EAGER = "times eager"
_COLUMNS: dict[str, Callable[[VariantResult], str]] = {
    _TIMES_EAGER: lambda variant: _interval(variant.speedup_over_eager),
    "times plain ONNX Runtime": lambda variant: _interval(variant.speedup_over_plain),
    "nodes": lambda variant: "" if variant.graph is None else str(variant.graph.nodes),
    "MatMul, Gemm": lambda variant: "" if variant.graph is None else str(variant.graph.matmuls),
    "GFLOP": lambda variant: "" if variant.graph is None else f"{variant.graph.flops / 1e9:.2f}",
    "peak memory, GiB": lambda variant: f"{variant.peak_memory_bytes / 2**30:.1f}",
    "error": lambda variant: "" if variant.accuracy is None else f"{variant.accuracy.max_relative_error:.1e}",
}


def _how(report: Report | AblationReport) -> str:
    machine = report.machine
    where = "; ".join([f"{machine.cpu}, {machine.cores} cores", *(gpu.partition(",")[0] for gpu in machine.gpus)])
    return f"`{report.command}` on {where}; {_versions(report.versions)}:"


def _table(scenario: Scenario) -> list[str]:
    setting = scenario.setting
    steps = " and ".join(map(str, setting.steps))
    title = f"{scenario.name}, {setting.width}x{setting.height}, {steps} steps"
    on_gpu = scenario.compiled is not None and any(each.options.get("device") == "cuda" for each in scenario.contenders)
    titles = ["seconds", "step", f"times as fast as {scenario.eager or 'eager'}", "peak memory", "PSNR"]
    if on_gpu:
        titles[1:] = ["p99/p50", titles[2], f"times as fast as {scenario.compiled}", "GPU memory", "PSNR"]
    rows = [f"| {title} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    return rows + [_row(each, len(titles), on_gpu) for each in scenario.contenders]


def _row(contender: Contender, columns: int, on_gpu: bool) -> str:
    measured = contender.measurement
    if measured is None or contender.status != "ok":
        return f"| {contender.name} | {contender.status}: {contender.reason} |{' |' * (columns - 1)}"
    picture, memory = measured.percentiles.picture, measured.memory
    likeness = "" if measured.parity is None else f"{measured.parity.psnr_db:.0f} dB"
    if on_gpu:
        taken = "" if memory.peak_device_bytes is None else f"{memory.peak_device_bytes / 2**20:.0f} MiB"
        faster = [_interval(measured.speedup_over_eager), _interval(measured.speedup_over_compiled)]
        cells = [f"{picture.p50:.3f}", f"{picture.spread:.3f}", *faster, taken, likeness]
    else:
        step, taken = f"{measured.percentiles.step.p50:.3f}", f"{memory.peak_host_bytes / 2**20:.0f} MiB"
        cells = [f"{picture.p50:.2f}", step, _interval(measured.speedup_over_eager), taken, likeness]
    rest = contender.options.get("unquantized")
    name = contender.name if rest is None else f"{contender.name}, all else {rest}"
    return f"| {' | '.join([name, *cells])} |"


def _interval(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _versions(versions: Mapping[str, str]) -> str:
    titles = {
        "torch": "PyTorch {}",
        "diffusers": "diffusers {}",
        "onnxruntime": "ONNX Runtime {}",
        "onnxruntime-gpu": "ONNX Runtime {} for CUDA",
        "openvino": "OpenVINO {}",
        "tensorrt": "TensorRT {}",
        "tensorrt-rtx": "TensorRT-RTX {}",
        "stable-diffusion-cpp-python": "stable-diffusion-cpp-python {}",
    }
    if "onnxruntime-gpu" in versions:  # the other one is hidden behind it
        del titles["onnxruntime"]
    return ", ".join(title.format(versions[name]) for name, title in titles.items() if name in versions)


if __name__ == "__main__":
    main()
