"""The table for the terminal: what it shows of a CPU and of a GPU."""

from __future__ import annotations

import msgspec
import pytest

from bench_reports import MACHINE, full_report, gpu_report, report
from controlrt.perf.bench_table import header, table
from controlrt.perf.results import Scenario


def cell(scenario: Scenario, contender: str, title: str) -> str:
    """What stands under a title; columns end where their titles do."""
    lines = table(scenario).splitlines()
    titles = next(line for line in lines if line.startswith("contender"))
    row = next(line for line in lines if line.startswith(f"{contender} "))
    return row[: titles.index(title) + len(title)].split()[-1]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_torch_compile_has_a_column_where_it_ran(on_gpu: bool) -> None:
    scenario = gpu_report().scenarios[0] if on_gpu else full_report().scenarios[0]
    text = table(scenario)
    assert ("x compile: how many times faster than torch-compile" in text) == on_gpu
    assert ("x compile  " in text) == on_gpu


def test_what_takes_milliseconds_is_told_in_full() -> None:
    scenario = gpu_report().scenarios[0]
    found = scenario.contenders[2].measurement
    assert found is not None
    assert found.percentiles.host is not None
    assert cell(scenario, "cuda-fp16", "p99/p50") == f"{found.percentiles.picture.spread:.3f}"
    assert cell(scenario, "cuda-fp16", "step") == f"{found.percentiles.step.p50:.5f}"
    assert cell(scenario, "cuda-fp16", "host ms") == f"{1000 * found.percentiles.host.p50:.2f}"
    assert cell(scenario, "cuda-fp16", "GPU MiB") == "3000"


def test_a_cpu_has_no_gpu_memory_and_old_results_no_host_time() -> None:
    scenario = full_report().scenarios[0]
    eager = scenario.contenders[0]
    assert eager.measurement is not None
    stages = msgspec.structs.replace(eager.measurement.percentiles, host=None)
    eager = msgspec.structs.replace(eager, measurement=msgspec.structs.replace(eager.measurement, percentiles=stages))
    scenario = msgspec.structs.replace(scenario, contenders=(eager,))
    assert (cell(scenario, "eager", "GPU MiB"), cell(scenario, "eager", "host ms")) == ("-", "-")


def test_the_gpu_is_named() -> None:
    assert "NVIDIA H100, 9.0" in header(gpu_report())
    assert header(report(machine=MACHINE)).count("\n") == 1
