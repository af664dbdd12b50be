import numpy as np
import pytest

from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError
from controlrt.runtime.samplers import alphas_cumprod, compile_sampler

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def test_alphas_of_stable_diffusion() -> None:
    # first and last value of the schedule, as published with SD 1.5: sigma_min 0.0292, sigma_max 14.6146
    product = alphas_cumprod(CONFIG)
    sigmas = np.sqrt((1 - product) / product)
    assert sigmas[0] == pytest.approx(0.0292, abs=5e-5)
    assert sigmas[-1] == pytest.approx(14.6146, abs=5e-5)


@pytest.mark.parametrize("sampler", ["DDIM", "euler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_perfect_model_is_recovered_exactly(sampler: str) -> None:
    """Where the model knows the noise of a fixed picture, every deterministic sampler must land on the picture."""
    rng = np.random.default_rng(0)
    picture = rng.normal(size=100)
    table = compile_sampler(sampler, {**CONFIG, "timestep_spacing": "trailing"}, 10)
    product = alphas_cumprod(CONFIG)
    x = rng.normal(size=100) * table.initial_scale
    for step in range(len(table)):
        alpha = np.sqrt(product[int(table.timesteps[step])])
        noise = (x * table.input_scale[step] - alpha * picture) / np.sqrt(1 - alpha**2)
        x = table.coefficients[step] @ np.stack([x, noise])
    np.testing.assert_allclose(x, picture, atol=1e-9)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", True])
def test_bad_steps(steps: object) -> None:
    with pytest.raises(ParameterError, match="num_inference_steps"):
        compile_sampler("DDIM", CONFIG, steps)


def test_unknown_sampler_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'euler'"):
        compile_sampler("eular", CONFIG, 10)


@pytest.mark.parametrize(
    ("sampler", "option"),
    [("DDIM", {"clip_sample": True}), ("DDIM", {"thresholding": True}), ("Euler", {"use_karras_sigmas": True})],
)
def test_what_is_not_supported_is_refused_by_name(sampler: str, option: dict[str, bool]) -> None:
    with pytest.raises(UserError, match=next(iter(option))):
        compile_sampler(sampler, {**CONFIG, **option}, 10)
