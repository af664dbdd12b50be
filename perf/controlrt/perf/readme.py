"""Puts measured numbers where people read them: a table of every result that a Markdown file asks for.

    python -m controlrt.perf.readme README.md

fills what stands between ``<!-- bench RESULT.json -->`` and ``<!-- end bench -->`` with a table made of that file,
which is named as seen from the Markdown file. A test checks that README.md is what this makes of it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

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
    return _PLACE.sub(lambda found: f"{found[1]}{markdown(load(directory / found['file']))}{found[3]}", text)


def markdown(report: Report) -> str:
    """A result as Markdown: how it came about, and one table for every scenario."""
    machine = report.machine
    where = "; ".join([f"{machine.cpu}, {machine.cores} cores", *(gpu.partition(",")[0] for gpu in machine.gpus)])
    lines = [f"`{report.command}` on {where}; {_versions(report)}:", ""]
    for scenario in report.scenarios:
        lines += [*_table(scenario), ""]
    return "\n".join(lines)


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


def _versions(report: Report) -> str:
    titles = {
        "torch": "PyTorch {}",
        "diffusers": "diffusers {}",
        "onnxruntime": "ONNX Runtime {}",
        "onnxruntime-gpu": "ONNX Runtime {} for CUDA",
        "openvino": "OpenVINO {}",
        "tensorrt": "TensorRT {}",
        "tensorrt-rtx": "TensorRT-RTX {}",
    }
    if "onnxruntime-gpu" in report.versions:  # the other one is hidden behind it
        del titles["onnxruntime"]
    return ", ".join(title.format(report.versions[name]) for name, title in titles.items() if name in report.versions)


if __name__ == "__main__":
    main()
