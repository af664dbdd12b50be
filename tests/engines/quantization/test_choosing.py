"""Which layers are quantized: by name, by what blocks were measured to cost and save, and a gate after it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlrt.compiler.quantization.statistics import BINS, BUCKETS, About, LayerStatistics, Statistics
from controlrt.engines.quantization import quality_gate, sensitivity
from controlrt.engines.quantization.layer_choice import amax_by_part, choose_layers, in_part
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.engines.quantization.quality_gate import measure_quality, pass_gate
from controlrt.engines.quantization.sensitivity import TURNS, block_of, choose_blocks, keep_others, seconds_saved
from controlrt.runtime.errors import BuildError, NotFiniteError, ParameterError, UserError
from controlrt.runtime.manifest import Quality, QuantizedBlock

ABOUT = About(
    parts={"unet": "0" * 64},
    data="demo",
    cases=1,
    steps=1,
    samplers=("DDIM",),
    guidance_scales=(1.0,),
    size=(64, 64),
    seed=0,
    versions={},
)


def layer(amax: float = 2.0) -> LayerStatistics:
    histogram = np.zeros((BUCKETS, BINS), np.int64)
    histogram[0, : BINS // 2] = 1
    buckets = np.zeros(BUCKETS, np.float32)
    buckets[0] = amax
    return LayerStatistics(
        channel_amax=np.full(4, amax, np.float32), bucket_amax=buckets, histogram=histogram, limit=2 * amax
    )


def statistics(**parts: dict[str, LayerStatistics]) -> Statistics:
    return Statistics(about=ABOUT, layers={part.replace("_", "."): layers for part, layers in parts.items()})


def options(**given: Any) -> QuantizationOptions:
    return QuantizationOptions(statistics=Path("statistics.safetensors"), **given)


def block(name: str, error: float, saved: float, chosen: bool = False) -> QuantizedBlock:
    return QuantizedBlock(part="unet", name=name, latent_error=error, seconds_saved=saved, chosen=chosen)


def test_some_layers_stay_and_it_is_said_why() -> None:
    names = ("unet.conv_in", "unet.mid.conv1", "unet.mid.conv_shortcut", "unet.mid.to_q", "unet.zero")
    seen = statistics(unet={name: layer(0.0 if "zero" in name else 2.0) for name in names})
    kept = {each.name: each.kept for each in choose_layers(seen, options(keep=("to_q",)))}
    assert {name for name, why in kept.items() if why is None} == {"unet.mid.conv1"}
    assert kept["unet.mid.to_q"] == "--keep to_q"
    of_part = choose_layers(
        statistics(unet={"unet.mid.conv1": layer()}, controlnet_canny={"mid": layer()}),
        options(keep=("controlnet.canny",)),
    )
    assert [each.kept for each in of_part] == [None, "--keep controlnet.canny"]
    assert kept["unet.conv_in"] == "it reads the latents themselves"
    assert kept["unet.zero"] == "all that it reads is 0"
    assert amax_by_part(choose_layers(seen, options(method="minmax", keep=("to_q",)))) == {
        "unet": {"unet.mid.conv1": 2.0}
    }


def test_fused_layers_are_told_apart_by_control() -> None:
    amax = {
        "unet": {"unet.conv1": 1.0},
        "controlnet.a": {"controlnet.conv1": 2.0},
        "controlnet.b": {"controlnet.conv1": 3.0},
    }
    fused = {"a": "controlnet.a", "b": "controlnet.b"}
    assert in_part(amax, "controlnet.a", fused) == {"controlnet.conv1": 2.0}
    assert in_part(amax, "vae_decoder", fused) == {}
    assert in_part(amax, "fused", fused) == {"unet.conv1": 1.0, "a/controlnet.conv1": 2.0, "b/controlnet.conv1": 3.0}
    assert in_part(amax, "fused", {"b": "controlnet.b"}) == {"unet.conv1": 1.0, "b/controlnet.conv1": 3.0}


def test_patterns_that_fit_nothing_are_refused_and_so_is_a_build_of_nothing() -> None:
    seen = statistics(unet={"unet.mid.conv1": layer()})
    with pytest.raises(UserError, match="--keep 'conv9': no layer is called so"):
        choose_layers(seen, options(keep=("conv9",)))
    with pytest.raises(BuildError, match="no layer is left for int8"):
        choose_layers(seen, options(keep=("conv",)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "median"}, "--amax is 'median', but must be one of mse, minmax"),
        ({"budget": 0.0}, "--quality-budget is 0.0"),
        ({"budget": float("nan")}, "--quality-budget is nan"),
        ({"smoothing": 1.5}, "--smooth is 1.5, but must be a number from 0 to 1"),
        ({"min_psnr_db": -1.0}, "--min-psnr is -1.0"),
        ({"precision": "fp8", "method": "entropy"}, "--amax is 'entropy', but must be one of mse, .* --precision fp8"),
        ({"precision": "fp8", "budget": 0.1}, "--quality-budget is 0.1, but must be left out with --precision fp8"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        options(**given)


def test_seven_bits_are_for_int8() -> None:
    with pytest.raises(UserError, match="--reduce-range is for int8"):
        options(precision="fp8", reduce_range=True)


def test_fp8_keeps_all_of_a_range_where_nobody_says() -> None:
    seen = statistics(unet={"unet.mid.conv1": layer()})
    assert options().amax_method == "mse"
    (found,) = choose_layers(seen, options(precision="fp8"))
    assert (found.amax, found.kept) == (2.0, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet.down_blocks.0.resnets.1.conv1", "unet.down_blocks.0.resnets.1"),
        ("unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q", "unet.up_blocks.1.attentions.2"),
        ("unet.up_blocks.0.upsamplers.0.conv", "unet.up_blocks.0.upsamplers.0"),
        ("controlnet.controlnet_down_blocks.7", "controlnet.controlnet_down_blocks"),
        ("unet.conv_out", "unet.conv_out"),
    ],
)
def test_blocks(name: str, expected: str) -> None:
    assert block_of(name) == expected


@dataclass
class Clock:
    """Stands still but for launches."""

    now: float = 0.0


class Timed:
    """Runs a program in so many seconds."""

    def __init__(self, clock: Clock, seconds: Iterable[float]) -> None:
        self.clock, self.seconds = clock, iter(seconds)

    def bind_call(self, program: str, inputs: Any, outputs: Any) -> Callable[[], None]:
        assert (program, inputs, outputs) == ("unet.step", {"x": 1}, {"y": 2})

        def launch() -> None:
            self.clock.now += next(self.seconds)

        return launch


def saved(monkeypatch: pytest.MonkeyPatch, saves: float, seed: int) -> float:
    """What is measured of a block that saves so much of 1 second, where runs differ by chance, by 0.03 seconds."""
    rng = np.random.default_rng(seed)
    clock = Clock()
    monkeypatch.setattr(sensitivity, "perf_counter", lambda: clock.now)
    before, after = (Timed(clock, rng.normal(1 - less, 0.03, 1 + 2 * TURNS)) for less in (0.0, saves))
    return seconds_saved(before, after, "unet.step", ({"x": 1}, {"y": 2}))  # type: ignore[arg-type, dict-item]


@pytest.mark.parametrize(("saves", "fewest", "most"), [(0.5, 300, 300), (0.1, 290, 300), (0.0, 0, 15), (-0.1, 0, 0)])
def test_what_a_block_saves_is_more_than_chance(
    monkeypatch: pytest.MonkeyPatch, saves: float, fewest: int, most: int
) -> None:
    """One of no use is taken in 2% of 300 measurements (5.3 are expected; 15 would be by chance in 1 of 5,000)."""
    assert fewest <= sum(saved(monkeypatch, saves, seed) > 0 for seed in range(300)) <= most


def test_a_short_program_runs_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that less than the noise of one run is found: 0.2 of 10 ms, which differ by 0.5 ms by chance."""
    clock, rng = Clock(), np.random.default_rng(0)
    monkeypatch.setattr(sensitivity, "perf_counter", lambda: clock.now)
    before, after = (Timed(clock, rng.normal(1e-2 - less, 5e-4, 1000)) for less in (0.0, 2e-4))
    found = seconds_saved(before, after, "unet.step", ({"x": 1}, {"y": 2}))  # type: ignore[arg-type, dict-item]
    assert 0 < found < 2e-4
    assert sensitivity.SECONDS <= clock.now < sensitivity.SECONDS + 0.1


def test_a_machine_that_slows_down_favours_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch takes 0.1 seconds longer than the one before, whichever program is launched."""
    clock = Clock()
    monkeypatch.setattr(sensitivity, "perf_counter", lambda: clock.now)
    drift = itertools.count(1.0, 0.1)
    found = seconds_saved(Timed(clock, drift), Timed(clock, drift), "unet.step", ({"x": 1}, {"y": 2}))  # type: ignore[arg-type, dict-item]
    assert found == pytest.approx(0, abs=1e-9)


@given(
    st.lists(st.tuples(st.floats(0, 0.2), st.floats(-1, 1)), max_size=8),
    st.floats(0.01, 0.3),
)
def test_chosen_blocks_stay_within_the_budget_and_none_is_left_that_fits(
    measured: list[tuple[float, float]], budget: float
) -> None:
    blocks = [block(str(number), *each) for number, each in enumerate(measured)]
    found = choose_blocks(blocks, budget)
    assert [(each.name, each.latent_error, each.seconds_saved) for each in found] == [
        (each.name, each.latent_error, each.seconds_saved) for each in blocks
    ]
    spent = sum(each.latent_error**2 for each in found if each.chosen)
    assert spent <= budget**2 * (1 + 1e-9)
    assert not any(each.chosen and each.seconds_saved <= 0 for each in found)
    left = [each for each in found if not each.chosen and each.seconds_saved > 0]
    assert all(spent + each.latent_error**2 > budget**2 * (1 - 1e-9) for each in left)


def test_blocks_that_save_more_for_their_error_go_first() -> None:
    found = choose_blocks([block("a", 0.04, 1.0), block("b", 0.03, 1.0), block("c", 0.01, 0.1)], 0.035)
    assert [each.chosen for each in found] == [False, True, True]


def test_choosing_by_saved_time_is_near_the_best_set() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        blocks = [block(str(n), float(rng.uniform(0.001, 0.03)), float(rng.uniform(0.1, 1))) for n in range(8)]
        best = max(
            sum(each.seconds_saved for each in chosen)
            for size in range(9)
            for chosen in itertools.combinations(blocks, size)
            if sum(each.latent_error**2 for each in chosen) <= 0.04**2
        )
        assert sum(each.seconds_saved for each in choose_blocks(blocks, 0.04) if each.chosen) >= 0.8 * best


def test_layers_of_blocks_that_were_not_chosen_stay() -> None:
    names = ("unet.mid.resnets.0.conv1", "unet.mid.resnets.1.conv1", "unet.mid.resnets.2.conv1", "unet.conv_in")
    layers = choose_layers(statistics(unet={name: layer() for name in names}), options())
    blocks = [
        block("unet.mid.resnets.0", 0.1, 1.0, chosen=True),
        block("unet.mid.resnets.1", 0.1, -1.0),
        block("unet.mid.resnets.2", 0.1, 1.0),
    ]
    assert [each.kept for each in keep_others(layers, blocks)] == [
        None,
        "it is no faster here",
        "the quality budget was spent",
        "it reads the latents themselves",
    ]


def test_the_gate_says_what_to_relax() -> None:
    quality = Quality(pictures=4, latent_errors=(0.1,), psnr_db=27.9, lowest_psnr_db=20.0, ssim=0.9)
    with pytest.raises(BuildError, match=r"27\.9 dB from float32's, on average of 4; at least 28 .* --min-psnr"):
        pass_gate(quality, options())
    pass_gate(quality, options(min_psnr_db=27.0))


def test_without_pictures_nothing_can_be_compared() -> None:
    with pytest.raises(UserError, match="controlrt calibrate --unseen 4"):
        measure_quality(None, ())  # type: ignore[arg-type]


def test_what_is_not_finite_ends_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflows(*_: object) -> None:
        raise NotFiniteError

    monkeypatch.setattr(quality_gate, "ControlNetPipeline", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(quality_gate, "replay", overflows)
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(precision="int8"))
    case: Any = SimpleNamespace(arguments={}, hints={})
    with pytest.raises(BuildError, match="int8 gives latents that are not finite; keep layers out with --keep"):
        measure_quality(bundle, [case])
