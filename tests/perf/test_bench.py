"""The command: its mistakes, and a short run of it on the demo model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from controlrt.perf.command import expand
from controlrt.perf.results import load
from controlrt.runtime.commands import main

SCRATCH = Path(os.environ["CONTROLRT_CACHE"]) / "bench" / "pipeline"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundles/none"], "bundles/none is neither a bundle nor a benchmark"),
        (["--model", "none"], "model 'none' does not exist; --model takes demo, sd15, sd21, sdxl, or a checkpoint"),
        (["--model", "demo", "--controlnet", "a=b"], "--controlnet goes with a checkpoint that --model names"),
        (["--model", "/"], "name one with --controlnet NAME=SOURCE"),
        (["--rounds", "0"], "--rounds is 0, but must be at least 1"),
        (["--warm-ups", "-1"], "--warm-ups is -1, but must be at least 0"),
        (["--threads", "0"], "--threads is 0, but must be at least 1"),
        (["--steps", "0"], "--steps is 0, but must be at least 1"),
        (["--timeout", "0"], "--timeout is 0.0, but must be more than 0"),
        (["--only", "eager,nothing"], "unknown contender 'nothing'; known: eager, "),
        (["--control", "depth"], "unknown control 'depth'; known: canny, mask"),
        (["--sampler", "Oiler"], "unknown sampler 'Oiler'"),
        (["--profile", "100x100"], "side 100 is not a multiple of 64"),
        (["--sweep", "steps"], "is not AXIS=VALUE"),
        (["--memory", "0.1"], "0.1 GiB may be used; free some memory, or say with --memory GIB"),
        (["--output", "/proc/no/such/file.json"], "cannot write /proc/no/such/file.json"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path))
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("error:") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["bundles/demo"], ["pipeline", "bundles/demo"]),
        (["--model", "sd15"], ["pipeline", "--model", "sd15"]),
        (["-v", "bundles/demo"], ["-v", "pipeline", "bundles/demo"]),
        (["ablation", "--repeats", "1"], ["ablation", "--repeats", "1"]),
        (["-v", "compare", "a", "b"], ["-v", "compare", "a", "b"]),
        (["./ablation"], ["pipeline", "./ablation"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_a_bundle_needs_no_benchmark_s_name(given: list[str], meant: list[str]) -> None:
    assert expand(given) == meant


@pytest.mark.bundle
def test_the_demo_model_is_measured(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eager, a plain export and a bundle, one after the other in two scenarios."""
    output = tmp_path / "results" / "bench.json"
    only = "eager,plain-onnxruntime,onnxruntime-fp32"
    short = ["--steps", "2", "--rounds", "2", "--warm-ups", "0", "--steps-mix", "1,2"]
    assert main(["bench", str(demo_bundle), *short, "--only", only, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    report = load(output)
    assert report.complete
    assert [scenario.name for scenario in report.scenarios] == ["single stream", "mixed steps"]
    assert {ceiling.dtype for ceiling in report.ceilings} >= {"float32"}
    for scenario in report.scenarios:
        assert scenario.name in printed
        assert scenario.eager == scenario.reference == "eager"
        calls = 2 * len(scenario.setting.steps)
        found = {each.name: each for each in scenario.contenders}
        assert list(found) == ["eager", "plain-onnxruntime", "onnxruntime-fp32"]
        for name, each in found.items():
            measured = each.measurement
            assert each.status == "ok", each.reason
            assert measured is not None
            samples = measured.samples
            assert len(samples.picture) == len(samples.decode) == calls
            assert len(samples.step) == len(samples.host_step) == 2 * sum(scenario.setting.steps)
            parts = sum(map(sum, (samples.text, samples.hint, samples.timestep_table, samples.step, samples.decode)))
            assert 0.5 * sum(samples.picture) < parts <= sum(samples.picture)
            assert all(0 <= host < step for host, step in zip(samples.host_step, samples.step, strict=True))
            assert measured.cold_start_seconds > measured.load_seconds > 0
            assert measured.memory.peak_host_bytes > measured.memory.file_backed_bytes > 2**20
            assert measured.flops_per_second is not None
            assert each.engine_bytes is not None
            assert (measured.parity is None) == (name == "eager")
            if measured.parity is not None:
                assert measured.parity.psnr_db > 60
                assert measured.parity.ssim > 0.999
                assert len(measured.parity.latent_errors) == scenario.setting.steps[0]
                assert max(measured.parity.latent_errors) < 1e-3
            assert (each.build_seconds is None) == (name != "plain-onnxruntime")  # the bundle was there
        plain, ours = (found[name].measurement for name in ("plain-onnxruntime", "onnxruntime-fp32"))
        assert plain is not None
        assert ours is not None
        assert plain.flops_per_picture is not None
        assert ours.flops_per_picture is not None
        assert ours.flops_per_picture < plain.flops_per_picture
        assert min(ours.samples.text) > 0  # no prompt was seen before
        assert min(ours.samples.hint) > 0
    assert not SCRATCH.exists()


@pytest.mark.bundle
def test_contenders_of_which_memory_holds_no_two(
    demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bench.json"
    short = ["--steps", "1", "--rounds", "2", "--only", "eager,onnxruntime-fp32", "--memory", "1"]
    assert main(["bench", str(demo_bundle), *short, "--output", str(output)]) == 0
    assert "2 rounds, " in (printed := capsys.readouterr().out)
    assert ", each loaded anew in every round" in printed
    (scenario,) = load(output).scenarios
    assert scenario.setting.one_at_a_time
    assert scenario.reference == "eager"
    for each in scenario.contenders:
        assert each.status == "ok", each.reason
        assert each.measurement is not None
        assert len(each.measurement.samples.picture) == 2
        assert each.measurement.cold_start_seconds > each.measurement.load_seconds > 0
        assert each.measurement.speedup_over_eager is not None
