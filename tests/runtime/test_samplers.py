"""Properties of sampler tables, and what is refused; tests/parity compares them with diffusers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError
from controlrt.runtime.samplers import COLUMNS, HISTORY, SamplerTable, compile_sampler, known_names
from controlrt.runtime.samplers.schedule import alphas_cumprod
from controlrt.runtime.samplers.table import LATENTS, OUTPUT, Form, Steps, assemble, kept, where

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
STOCHASTIC = (
    *("DDPM", "Euler a", "DPM2 a", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM++ SDE", "LCM"),
    *("EulerAncestral", "KDPM2Ancestral", "DPMSolverSDE"),
)
# these do not end at sigma zero: DEIS and TCD end at the first timestep, LCM's skip connection leaves a trace of noise,
# and PNDM averages outputs of different timesteps
INEXACT = ("DEIS", "TCD", "LCM", "PNDM", "PLMS", "EDM")
# in variance-preserving latents a timestep that was rounded does not tell the noise level that the stand-in must know
ROUNDED = tuple(
    f"{solver} {schedule}"
    for solver in ("DPM++ 2M", "DPM++ 3M", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S", "UniPC")
    for schedule in ("Karras", "Exponential", "Beta", "Lu")
)
EXACT = [name for name in known_names() if not name.startswith(INEXACT) and name not in ROUNDED]


def test_alphas_of_stable_diffusion() -> None:
    # first and last value of the schedule, as published with SD 1.5: sigma_min 0.0292, sigma_max 14.6146
    product = alphas_cumprod(CONFIG)
    sigmas = np.sqrt((1 - product) / product)
    assert sigmas[0] == pytest.approx(0.0292, abs=5e-5)
    assert sigmas[-1] == pytest.approx(14.6146, abs=5e-5)


def run(table: SamplerTable, model: Any, start: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies a table to a model of (latents, step)."""
    latents, history = start, np.zeros((HISTORY, *start.shape))
    for step in range(len(table)):
        output = model(table.input_scale[step] * latents, step)
        a, b, limit = table.clip[step]
        noise = rng.normal(size=start.shape) if table.draws[step] else np.zeros_like(start)
        clipped = np.clip(a * latents + b * output, -limit, limit)
        following = table.update[step] @ np.stack([latents, *history, output, noise, clipped])
        latents, history = following[0], following[1:]
    return latents


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", EXACT)
def test_a_perfect_model_is_recovered_exactly(name: str, prediction_type: str) -> None:
    """Where the model knows one picture only, every sampler that ends at sigma zero must land on it, noise or not."""
    rng = np.random.default_rng(0)
    picture = rng.normal(size=50)
    table = compile_sampler(name, {**CONFIG, "prediction_type": prediction_type}, 12)
    product = alphas_cumprod(CONFIG)

    def model(seen: np.ndarray, step: int) -> np.ndarray:
        scale = table.input_scale[step]  # the signal rate of what the model sees, or 1 where latents come scaled
        alpha = scale if scale != 1 else np.sqrt(product[int(table.timesteps[step])])
        eps = (seen - alpha * picture) / np.sqrt(1 - alpha**2)
        if prediction_type == "epsilon":
            return eps
        return picture if prediction_type == "sample" else alpha * eps - np.sqrt(1 - alpha**2) * picture

    start = rng.normal(size=50) * table.initial[1]
    np.testing.assert_allclose(run(table, model, start, rng), picture, atol=1e-9)


START = (np.ones(4), np.ones(4))


def test_history_carries_named_tensors() -> None:
    """Hand-written: x' = x + m at even steps, x + the output before at odd ones."""
    odd = np.arange(4) % 2 == 1
    steps = Steps(
        timesteps=np.arange(4.0)[::-1].copy(),
        latents=LATENTS + where(odd, kept("output"), OUTPUT),
        start=START,
        keep={"output": OUTPUT},
    )
    table = assemble(steps, 0, False)
    assert table.history == ("output",)
    outputs = iter([1.0, 10.0, 100.0, 1000.0])
    found = run(table, lambda seen, _: np.full_like(seen, next(outputs)), np.zeros(3), np.random.default_rng(0))
    np.testing.assert_array_equal(found, np.full(3, 1.0 + 1.0 + 100.0 + 100.0))


def test_a_form_that_is_not_kept_is_a_mistake() -> None:
    with pytest.raises(KeyError, match="kept nothing"):
        assemble(Steps(timesteps=np.zeros(1), latents=LATENTS + kept("nothing"), start=START), 0, False)
    many = {f"slot {i}": OUTPUT for i in range(HISTORY + 1)}
    with pytest.raises(ValueError, match="room"):
        assemble(Steps(timesteps=np.zeros(1), latents=LATENTS, start=START, keep=many), 0, False)


def test_what_is_not_chosen_may_be_infinite() -> None:
    chosen = where(np.array([True, False]), Form({"latents": np.array([1.0, np.nan])}), 2.0 * LATENTS)
    np.testing.assert_array_equal(chosen.terms["latents"], [1.0, 2.0])


@pytest.mark.parametrize("name", known_names())
def test_tables_compile_within_ten_milliseconds(name: str) -> None:
    steps = 50 if name.startswith(("LCM", "TCD")) else 999
    config = {**CONFIG, "skip_prk_steps": True}

    def seconds() -> float:
        started = time.thread_time()
        compile_sampler(name, config, steps)
        return time.thread_time() - started

    assert min(seconds() for _ in range(15)) < 0.010


@pytest.mark.parametrize("name", known_names())
def test_noise_is_drawn_where_it_counts(name: str) -> None:
    table = compile_sampler(name, {**CONFIG, "skip_prk_steps": True}, 20)
    assert table.draws.any() == name.startswith(STOCHASTIC)
    noise = table.update[:, :, COLUMNS - 2]
    assert not noise[~table.draws].any()
    assert noise[table.draws].any() == table.draws.any()


def test_clip_sample_clamps_the_predicted_picture() -> None:
    table = compile_sampler("DDIM", {**CONFIG, "clip_sample": True, "clip_sample_range": 0.25}, 8)
    assert (table.clip[:, 2] == 0.25).all()
    # a model that always predicts far outside the range: the last step lands on the range's edge
    start = np.random.default_rng(0).normal(size=64)
    table = compile_sampler(
        "DDIM",
        {
            **CONFIG,
            "clip_sample": True,
            "clip_sample_range": 0.25,
            "prediction_type": "sample",
            "set_alpha_to_one": True,
        },
        8,
    )
    np.testing.assert_allclose(
        run(table, lambda seen, _: np.full_like(seen, 7.0), start, np.random.default_rng(1)), 0.25
    )


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", True, None])
def test_bad_steps(steps: object) -> None:
    with pytest.raises(ParameterError, match="num_inference_steps"):
        compile_sampler("DDIM", CONFIG, steps)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("eular", "Euler"), ("dpm++ 2m karas", "DPM++ 2M Karras"), ("DDIMSheduler", "DDIMScheduler"), ("unipcc", "UniPC")],
)
def test_unknown_sampler_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UnknownNameError, match="known: DDIM, ") as caught:
        compile_sampler(wrong, CONFIG, 10)
    assert f"did you mean {right!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["DDIM Karras", "UniPC Lu", "Euler a Karras", "LCM Exponential"])
def test_schedules_that_a_sampler_does_not_take_are_unknown(name: str) -> None:
    sampler, _, schedule = name.rpartition(" ")
    with pytest.raises(UnknownNameError, match=f"unknown schedule of {sampler} '{schedule}'; known: "):
        compile_sampler(name, CONFIG, 10)


REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("DDIM", {"thresholding": True}, {}, "thresholding"),
    ("UniPC", {"use_flow_sigmas": True}, {}, "use_flow_sigmas"),
    ("UniPC", {"solver_p": {}}, {}, "solver_p"),
    ("DDPM", {"variance_type": "learned_range"}, {}, "variance_type"),
    ("DDPM", {"variance_type": "fixed_large_log"}, {}, "variance_type"),
    ("DDIM", {"prediction_type": "flow"}, {}, "prediction_type"),
    ("DDIM", {"beta_schedule": "cubic"}, {}, "beta_schedule"),
    ("Euler", {"timestep_spacing": "even"}, {}, "timestep_spacing"),
    ("Euler", {"final_sigmas_type": "one"}, {}, "final_sigmas_type"),
    ("Euler", {"interpolation_type": "cubic"}, {}, "interpolation_type"),
    ("Euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "set one of them"),
    ("DDIM", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}, "epsilon, which tells nothing"),
    ("EDM Euler", {}, {"scheduler": {"sigma_min": 90.0}}, "sigma_min"),
    ("Euler Karras", {"sigma_min": 20.0}, {}, "at most sigma_max"),
    ("Euler Karras", {"sigma_min": -1.0}, {}, "above 0"),
    ("EDM DPM++ 2M", {}, {"scheduler": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}}, "its kinds"),
    ("DPM++ 2M", {"timestep_spacing": "leading"}, {"steps": 1000}, "leading; or use trailing"),
    ("DPM++ 2M", {"lambda_min_clipped": 100.0}, {}, "lambda_min_clipped"),
    ("DPM++ 2M", {"lambda_min_clipped": "x"}, {}, "lambda_min_clipped"),
    ("DDIM", {"trained_betas": [0.1] * 500}, {}, "trained_betas"),
    ("DDIM", {"trained_betas": []}, {}, "trained_betas"),
    ("DDIM", {"beta_start": "x"}, {}, "beta_start"),
    ("DDIM", {"beta_end": 1.5}, {}, "beta_end"),
    ("DDIM", {"steps_offset": "x"}, {}, "steps_offset"),
    ("DDIM", {"num_train_timesteps": 1}, {}, "num_train_timesteps"),
    ("DDIM", {"num_train_timesteps": float("inf")}, {}, "num_train_timesteps"),
    ("DDIM", {"clip_sample": "false"}, {}, "True or False"),
    ("DDIM", {"prediction_type": []}, {}, "a name"),
    ("UniPC", {}, {"scheduler": {"solver_order": True}}, "solver_order"),
    ("UniPC", {"disable_corrector": "x"}, {}, "disable_corrector"),
    ("LCM", {"original_inference_steps": 2000}, {}, "at most num_train_timesteps"),
    ("LCM", {"timestep_scaling": "1"}, {}, "timestep_scaling"),
    ("DPM++ 2M", {}, {"scheduler": {"solver_order": 4}}, "solver_order"),
    ("DPM++ 2M", {}, {"scheduler": {"algorithm_type": "dpmsolver"}}, "sigma_min"),
    ("DPM++ 2M", {}, {"scheduler": {"algorithm_type": "euler"}}, "algorithm_type"),
    ("UniPC", {"predict_x0": False}, {}, "predict_x0"),
    ("UniPC", {"lower_order_final": False}, {}, "lower_order_final True"),
    ("UniPC", {"solver_type": "bh3"}, {}, "solver_type"),
    ("PNDM", {"skip_prk_steps": False}, {"steps": 3}, "skip_prk_steps True"),
    ("PNDM", {"prediction_type": "sample"}, {"steps": 10}, "prediction_type"),
    ("LCM", {}, {"steps": 51}, "original_inference_steps"),
    ("DDIM", {"steps_offset": 1}, {"steps": 1000}, "timestep 1000"),
    ("EDM Euler", {"prediction_type": "sample"}, {}, "prediction_type"),
    ("EDM Euler", {"sigma_schedule": "even"}, {}, "sigma_schedule"),
]


@pytest.mark.parametrize(("name", "options", "how", "named"), REFUSALS)
def test_what_cannot_be_is_refused_by_name(name: str, options: dict[str, Any], how: dict[str, Any], named: str) -> None:
    scheduler: Any = name
    if "scheduler" in how:
        scheduler = {"_class_name": name, **how["scheduler"]}
    with pytest.raises(UserError, match=named):
        compile_sampler(scheduler, {**CONFIG, **options}, how.get("steps", 10))


CUSTOM: list[tuple[Any, dict[str, Any], str]] = [
    ("DDIM", {"sigmas": [3, 1, 0]}, "these take them: EulerDiscreteScheduler"),
    ("DDIM", {"timesteps": [900, 100]}, "these take them: DDPMScheduler, "),
    ("Euler", {"timesteps": [100, 900]}, "descending"),
    ("Euler", {"timesteps": [900, 900]}, "descending"),
    ("Euler", {"timesteps": [1000, 900]}, "from 0 to 999"),
    ("Euler", {"timesteps": [900, 0.5]}, "whole numbers"),
    ("Euler", {"timesteps": []}, "at least 1"),
    ("Euler", {"timesteps": ["a"]}, "numbers"),
    ("Euler", {"sigmas": [10**400, 1, 0]}, "numbers"),
    ("DDIM", {"timesteps": 5}, "left out for DDIMScheduler"),
    ("Euler", {"timesteps": 5}, "at least 1"),
    ("Euler Karras", {"sigmas": [3, 1, 0]}, "together with use_karras_sigmas"),
    (
        {"_class_name": "Euler", "timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"timesteps": [900, 100]},
        "timestep_type discrete",
    ),
    (None, {"num_inference_steps": 10}, "no _class_name"),
    ({5: 1, "_class_name": "DDIM"}, {"num_inference_steps": 10}, "option of DDIMScheduler '5'"),
    ("Euler", {"sigmas": [3, float("nan"), 0]}, "finite"),
    ("Euler", {"sigmas": [3, 1, -1]}, "positive"),
    ("Euler", {"sigmas": [3, 1, 0], "timesteps": [900, 100]}, "left out where timesteps"),
    ("Euler", {"timesteps": [900, 100], "num_inference_steps": 3}, "left out, or 2"),
    ("Euler Karras", {"timesteps": [900, 100]}, "together with use_karras_sigmas"),
    (
        "Euler",
        {"num_inference_steps": 10, "eta": 0.5},
        "takes no eta; leave it out, or use DDIMScheduler, TCDScheduler",
    ),
    ("DDIM", {"num_inference_steps": 10, "eta": 1.5}, "from 0 to 1"),
    ("DDIM", {"num_inference_steps": 10, "eta": float("nan")}, "from 0 to 1"),
    ("DDIM", {"num_inference_steps": 10, "strength": 0.05}, "at least 0.1"),
    ("DDIM", {"num_inference_steps": 10, "strength": 2}, "from 0 to 1"),
]


@pytest.mark.parametrize(("name", "how", "message"), CUSTOM)
def test_bad_calls(name: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compile_sampler(name, CONFIG, **how)


def test_options_may_come_with_the_call() -> None:
    by_name = compile_sampler("DPM++ 2M SDE Karras", CONFIG, 10)
    by_options = compile_sampler(
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "sde-dpmsolver++",
            "use_karras_sigmas": True,
        },
        CONFIG,
        10,
    )
    np.testing.assert_array_equal(by_name.update, by_options.update)
    own = compile_sampler({"timestep_spacing": "trailing"}, {**CONFIG, "_class_name": "DDIMScheduler"}, 10)
    assert own.timesteps[0] == 999
    with pytest.raises(UnknownNameError, match="did you mean 'timestep_spacing'"):
        compile_sampler({"timestep_spaceing": "trailing"}, {**CONFIG, "_class_name": "DDIMScheduler"}, 10)


def test_strength_runs_the_end_of_the_schedule() -> None:
    whole, part = compile_sampler("Heun", CONFIG, 10), compile_sampler("Heun", CONFIG, 10, strength=0.5)
    np.testing.assert_array_equal(part.timesteps, whole.timesteps[10:])
    np.testing.assert_array_equal(part.update, whole.update[10:])
    assert whole.initial[0] == 0
    assert part.initial[0] == 1


def test_null_is_the_default_and_options_of_other_classes_have_no_effect() -> None:
    """A config as another scheduler saved it: null where it has no value, and options that only it knows."""
    expected = compile_sampler("DDPM", CONFIG, 10)
    foreign = {"variance_type": None, "thresholding": None, "use_flow_sigmas": True, "sigma_min": None, "rho": "x"}
    np.testing.assert_array_equal(compile_sampler("DDPM", {**CONFIG, **foreign}, 10).update, expected.update)
    edm = compile_sampler("EDM Euler", {**CONFIG, "sigma_min": None, "sigma_max": None}, 10)
    assert edm.initial[1] == pytest.approx((80**2 + 1) ** 0.5)


def test_sgm_uniform_is_a_schedule_of_its_own() -> None:
    table = compile_sampler("Euler SGM Uniform", {**CONFIG, "use_karras_sigmas": True}, 4)
    np.testing.assert_array_equal(table.timesteps, [999, 749, 499, 249])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("strength", [None, 0.6])
def test_every_step_predicts_the_picture(prediction_type: str, strength: float | None) -> None:
    """A model that knows picture and noise, seen where picture to picture would start each step."""
    rng = np.random.default_rng(8)
    picture, eps = rng.normal(size=(2, 16))
    for name in ("DDIM", "Euler", "Euler a", "DPM++ 2M Karras", "UniPC", "Heun", "DPM2", "LCM", "DDPM"):
        config = {**CONFIG, "prediction_type": prediction_type}
        whole = compile_sampler(name, config, 12)
        table = compile_sampler(name, config, 12, strength=strength)
        for step in range(len(table)):
            begin = len(whole) - len(table) + step
            # where the latents stand before a step is where those after the step before are put back in inpainting
            signal, noise = whole.known[begin - 1] if begin else (0.0, 0.0)
            if not begin or noise == 0:
                continue
            alpha, sigma = np.array([signal, noise]) / np.hypot(signal, noise)
            output = {"epsilon": eps, "sample": picture, "v_prediction": alpha * eps - sigma * picture}[prediction_type]
            found = table.predicted[step] @ np.stack([signal * picture + noise * eps, output])
            np.testing.assert_allclose(found, picture, atol=1e-6, err_msg=f"{name}, step {step}")
