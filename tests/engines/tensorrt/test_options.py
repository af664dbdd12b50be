"""What a build may be asked for, and what is refused before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlrt.engines.build import BuildOptions
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.engines.tensorrt import builder
from controlrt.engines.tensorrt.builder import TensorRtBuilder
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.runtime.cuda.gpu import Gpu
from controlrt.runtime.errors import UserError
from controlrt.runtime.profile import ShapeProfile

ADA = Gpu(name="NVIDIA L40S", compute_capability="8.9")


def test_capabilities_are_sorted_as_numbers_and_named_once() -> None:
    assert EngineOptions.parse_capabilities(" 12.0, 8.9,8.6 ,8.9") == ("8.6", "8.9", "12.0")
    assert EngineOptions.parse_capabilities("") == ()


def test_options_that_are_left_alone_are_not_given() -> None:
    assert EngineOptions().given() == []
    asked = EngineOptions(optimization_level=0, aux_streams=0, refittable=True)
    assert asked.given() == ["--optimization-level", "--aux-streams", "--refittable"]


@pytest.mark.parametrize(
    ("flavour", "gpu", "options", "says"),
    [
        ("tensorrt", None, EngineOptions(), "there is none here.*--backend tensorrt-rtx"),
        ("tensorrt", ADA, EngineOptions(compute_capabilities=("9.0",)), r"8\.9, this machine's \(NVIDIA L40S\)"),
        ("tensorrt-rtx", ADA, EngineOptions(compute_capabilities=("9.0",)), r"7\.5, 8\.0, 8\.6"),
        ("tensorrt-rtx", ADA, EngineOptions(version_compatible=True), "lean runtime"),
        ("tensorrt-rtx", None, EngineOptions(refittable=True), "--refittable: .* on a GPU only"),
        ("tensorrt-rtx", None, EngineOptions(strip_weights=True), "--strip-weights: .* on a GPU only"),
        (
            "tensorrt-rtx",
            ADA,
            EngineOptions(refittable=True, compute_capabilities=("8.6", "8.9")),
            r"'8\.6,8\.9', but must be one at most with --refittable",
        ),
    ],
)
def test_refused(
    monkeypatch: pytest.MonkeyPatch, flavour: str, gpu: Gpu | None, options: EngineOptions, says: str
) -> None:
    monkeypatch.setattr(builder, "find_gpu", lambda: gpu)
    with pytest.raises(UserError, match=says):
        TensorRtBuilder(flavour).check(options)


@pytest.mark.parametrize(
    ("flavour", "gpu", "options"),
    [
        ("tensorrt", ADA, EngineOptions(compute_capabilities=("8.9",), version_compatible=True, refittable=True)),
        ("tensorrt-rtx", None, EngineOptions(compute_capabilities=("7.5", "12.0"), optimization_level=5)),
        ("tensorrt-rtx", ADA, EngineOptions(refittable=True, strip_weights=True)),
    ],
)
def test_allowed(monkeypatch: pytest.MonkeyPatch, flavour: str, gpu: Gpu | None, options: EngineOptions) -> None:
    monkeypatch.setattr(builder, "find_gpu", lambda: gpu)
    TensorRtBuilder(flavour).check(options)


@pytest.mark.parametrize("option", ["refittable", "strip_weights"])
def test_engines_in_8_bits_are_not_refitted(option: str) -> None:
    with pytest.raises(UserError, match=r"--refittable and --strip-weights: nothing refits engines in int8"):
        BuildOptions(
            model="model",
            controlnets={},
            profile=ShapeProfile.parse("512x512"),
            output=Path("bundle"),
            backend="tensorrt-rtx",
            precision="int8",
            quantization=QuantizationOptions(precision="int8", statistics=Path("statistics")),
            engine=EngineOptions(**{option: True}),
        )
