"""Sampler tables beside diffusers' own schedulers, step by step, on stand-ins for the model.

In float64 throughout nothing but the algorithms can differ: 1e-5 is asked for, 1e-11 is usual. And the table applied in
float32, as it is in a bundle, against that same float64 trajectory: 2e-4. Where the run itself is badly conditioned
(sigmas of 20,000 under squaredcos, say) diffusers strays as far, and three times its error is allowed instead: in
float32, or in float64 from a start and of sigmas that are some dozens of roundings away.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from hypothesis import assume, currently_in_test_context, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from parity.reference_samplers import Model, our_trajectory, reference, scheduler_class, their_trajectory
from scipy import integrate, stats

from controlrt.export.checkpoint import stored_scheduler_config
from controlrt.runtime.errors import UserError
from controlrt.runtime.samplers import SAMPLERS, SamplerTable, compile_sampler, known_names
from controlrt.runtime.samplers.exponential import log_lagrange_integral
from controlrt.runtime.samplers.schedule import beta_quantile

WIDE_BOUND, SINGLE_BOUND, TIMESTEP_BOUND = 1e-5, 2e-4, 5e-3
SHAKE = 1e-14
"""Relative; what tens of float64's roundings may add up to over a run."""
SHAPE = (1, 4, 2, 4)
SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# align-your-steps tables (Sabour et al. 2024), for SD 1.5
TIMESTEPS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
SIGMAS = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
NO_SAMPLE = "prediction_type not implemented yet: sample"
"""diffusers has these samplers for epsilon and v only; here they take x_0 predictions too (see the tests below)."""


def sin(x: Any) -> Any:
    return torch.sin(x) if isinstance(x, torch.Tensor) else np.sin(x)


MODELS: dict[str, Model] = {
    "linear": lambda x, _: 0.8 * x,
    "nonlinear": lambda x, _: sin(x) + 0.1 * x,
    "time-dependent": lambda x, t: math.cos(t / 200) * 0.5 * x + 0.2 * sin(x),
}

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "beta_end": st.sampled_from([0.012, 0.02, 0.03]),
    "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
    "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
    "rescale_betas_zero_snr": st.booleans(),
    "clip_sample": st.booleans(),
    "clip_sample_range": st.sampled_from([0.5, 1.0]),
    "set_alpha_to_one": st.booleans(),
    "skip_prk_steps": st.booleans(),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "solver_order": st.sampled_from([1, 2, 3]),
    "solver_type": st.sampled_from(["midpoint", "heun"]),
    "algorithm_type": st.sampled_from(["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]),
    "lower_order_final": st.booleans(),
    "euler_at_final": st.booleans(),
    "lambda_min_clipped": st.sampled_from([-math.inf, -5.1]),
    "predict_x0": st.booleans(),
    "disable_corrector": st.sampled_from([[], [0], [1, 3]]),
    "interpolation_type": st.sampled_from(["linear", "log_linear"]),
    "timestep_type": st.sampled_from(["discrete", "continuous"]),
    "sigma_schedule": st.sampled_from(["karras", "exponential"]),
    "original_inference_steps": st.sampled_from([50, 100]),
}
OF_ONE: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "DDPMScheduler": {"variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large"])},
    "UniPCMultistepScheduler": {"solver_type": st.sampled_from(["bh1", "bh2"])},
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": st.sampled_from(["dpmsolver", "dpmsolver++", "sde-dpmsolver++"])
    },
    "EDMDPMSolverMultistepScheduler": {"algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++"])},
}


@st.composite
def configs(draw: st.DrawFn, name: str) -> dict[str, Any]:
    options = SAMPLERS[name].options
    config = {option: draw(values) for option, values in OPTIONS.items() if option in options}
    config |= {option: draw(values) for option, values in OF_ONE.get(name, {}).items()}
    if "beta_start" in options:
        config["beta_start"] = 0.00085
    spread = draw(st.sampled_from([None, *(one for one in SPREADS if one in options)]))
    return config if spread is None else {**config, spread: True}


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if "use_karras_sigmas" in sampler.options])
@pytest.mark.parametrize("spread", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_bounds_of_the_sigmas(name: str, spread: str) -> None:
    """A config saved from Euler that names sigma_min and sigma_max, as each class's ``from_config`` reads it."""
    config = {**stored_scheduler_config(diffusers.EulerDiscreteScheduler(sigma_min=0.1, sigma_max=10.0)), spread: True}
    table = compile_sampler(name, config, 9)
    cls = scheduler_class(name)
    with reference(cls, lambda: draws.standard_normal(SHAPE).astype(np.float32), wide=True):
        scheduler = cls.from_config(config)
        scheduler.set_timesteps(9)
        start = np.random.default_rng(0).standard_normal(SHAPE) * table.initial[1]
        draws = np.random.default_rng(1)
        expected = their_trajectory(scheduler, scheduler.timesteps, MODELS["linear"], table.timesteps, start)
    again = np.random.default_rng(1)
    found = our_trajectory(table, MODELS["linear"], start, lambda: again.standard_normal(SHAPE).astype(np.float32))
    assert worst(found, expected) <= WIDE_BOUND


SLOW = ("LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
"""diffusers integrates numerically for the first, and finds timesteps one by one for the others."""


def counts_of_steps(name: str) -> st.SearchStrategy[int]:
    """Up to a thousand; long runs of those that take diffusers seconds are for ``test_long_runs``."""
    if name in SLOW:
        return st.integers(1, 30) | st.integers(1, 100)
    return st.integers(1, 30) | st.integers(1, 1000) | st.sampled_from([100, 333, 1000])


class Run:
    """One run of diffusers and ours, from the same start and noise."""

    def __init__(self, name: str, config: dict[str, Any], seed: int, **how: Any) -> None:
        self.name, self.config, self.seed, self.how = name, config, seed, how
        self.eta, self.strength = how.pop("eta", 0.0), how.pop("strength", None)
        self.table = compile_sampler(name, config, **self._ours(how), eta=self.eta, strength=self.strength)
        rng = np.random.default_rng([seed, 1])
        self.clean, self.noise = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
        self.start = self.table.initial[0] * self.clean + self.table.initial[1] * self.noise
        self._schedulers: dict[torch.dtype, Any] = {}

    @staticmethod
    def _ours(how: dict[str, Any]) -> dict[str, Any]:
        return {"num_inference_steps": how["steps"]} if "steps" in how else how

    def draws(self) -> Any:
        rng = np.random.default_rng([self.seed, 2])
        return lambda: rng.standard_normal(SHAPE).astype(np.float32)

    def theirs(self, model: Model, *, wide: bool, shake: float = 0.0) -> list[NDArray[Any]]:
        """diffusers' trajectory, from a start and of sigmas that are moved by ``shake`` of themselves.

        Discards points where diffusers itself breaks down, and says why.
        """
        start = self.start * (1 + shake * np.random.default_rng([self.seed, 3]).choice([-1, 1], SHAPE))
        cls, kind = scheduler_class(self.name), np.float64 if wide else np.float32
        extra = {"eta": self.eta} if "eta" in SAMPLERS[self.name].takes else {}
        with reference(cls, self.draws(), wide=wide):
            scheduler = self.scheduler(cls)
            timesteps = self.cut(scheduler)
            if shake and hasattr(scheduler, "sigmas"):
                scheduler.sigmas = scheduler.sigmas * (1 + shake)
            try:
                trajectory = their_trajectory(
                    scheduler, timesteps, model, self.table.timesteps, start.astype(kind), **extra
                )
            except torch.linalg.LinAlgError:
                discard("diffusers: a repeated sigma leaves its equations singular")
            except NotImplementedError as error:
                if str(error) != NO_SAMPLE:
                    raise
                discard("not in diffusers: sample prediction")
        if not all(np.isfinite(latents).all() for latents in trajectory):
            discard("diffusers: not a number")
        return trajectory

    def cut(self, scheduler: Any) -> torch.Tensor:
        """diffusers' timesteps, cut for picture to picture."""
        timesteps, begin = scheduler.timesteps, 0
        steps = self.how.get("steps") or len(self.how.get("timesteps") or self.how["sigmas"][1:])
        if self.strength is not None:
            begin = (steps - min(int(steps * self.strength), steps)) * scheduler.order
            timesteps = timesteps[begin:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
        if self.config.get("timestep_spacing") == "trailing" and len(np.arange(1000, 0, -1000 / steps)) != steps:
            discard("diffusers: rounding makes trailing spacing one step too long")
        if begin == 0 and (timesteps == timesteps[0]).sum() > 1:
            discard("diffusers: a repeated first timestep makes it lose count")
        if self.name == "DDPMScheduler" and len(set(timesteps.tolist())) < len(timesteps):
            discard("diffusers: repeated timesteps make it lose count")
        assert len(timesteps) == len(self.table)
        return timesteps

    def check_timesteps(self) -> None:
        """Each is what diffusers has in float64, or in float32: it rounds or cuts some of them to whole numbers."""
        apart = np.abs(self.told(wide=True) - self.table.timesteps)
        if apart.max() > TIMESTEP_BOUND:
            apart = np.minimum(apart, np.abs(self.told(wide=False) - self.table.timesteps))
        assert apart.max() <= TIMESTEP_BOUND

    def told(self, *, wide: bool) -> NDArray[np.float64]:
        """diffusers' timesteps."""
        cls = scheduler_class(self.name)
        with reference(cls, self.draws(), wide=wide):
            return self.cut(self.scheduler(cls)).double().numpy()

    def scheduler(self, cls: Any) -> Any:
        """diffusers' scheduler, with its timesteps set. Some take most of a second to make: once in each precision."""
        dtype = torch.get_default_dtype()
        if dtype not in self._schedulers:
            scheduler = self._schedulers[dtype] = cls(**self.config)
            if "steps" in self.how:
                scheduler.set_timesteps(self.how["steps"])
            else:
                scheduler.set_timesteps(**self.how)
        return copy.deepcopy(self._schedulers[dtype])

    def ours(self, model: Model, kind: Any) -> list[NDArray[Any]]:
        return our_trajectory(self.table, model, self.start.astype(kind), self.draws())


def _note(what: str) -> None:
    if currently_in_test_context():
        event(what)


def discard(reason: str) -> Any:
    event(reason)
    assume(False)


def worst(found: list[NDArray[Any]], expected: list[NDArray[Any]]) -> float:
    """The largest relative difference over the steps."""
    return max(
        float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-3))
        for ours, theirs in zip(found, expected, strict=True)
    )


# what the grid holds and tests/runtime/test_samplers.py sees refused by name; diffusers refuses these too, or computes
# infinities, not-a-number or timesteps that are not there
REFUSED_IN_THE_GRID = re.compile(
    r"prediction_type 'sample'|Runge-Kutta start|tells nothing at a first step|trained for|original_inference_steps|"
    r"not defined at a last step|cannot end at sigma zero|solver_order 3 does not go|log_linear with continuous|"
    r"^strength is|timestep_spacing leading; or|no finite coefficients at (9[0-9][0-9]|1000) steps"
)


def compiled(name: str, config: dict[str, Any], seed: int, **how: Any) -> Run:
    """The run, unless the combination is one that is known to be refused."""
    try:
        return Run(name, config, seed, **how)
    except UserError as error:
        found = REFUSED_IN_THE_GRID.search(str(error))
        if found is None:
            raise
        return discard(f"refused: {found[0]}")


def check(run: Run, model: Model) -> None:
    run.check_timesteps()
    exact = run.theirs(model, wide=True)
    wide = worst(run.ours(model, np.float64), exact)
    if wide > WIDE_BOUND:
        _note("badly conditioned in float64")
        assert wide <= 3 * worst(run.theirs(model, wide=True, shake=SHAKE), exact)
    single = worst(run.ours(model, np.float32), exact)
    if single > SINGLE_BOUND:
        _note("badly conditioned in float32")
        assert single <= 3 * worst(run.theirs(model, wide=False), exact)


every_sampler = pytest.mark.parametrize("name", list(SAMPLERS))


@every_sampler
@settings(max_examples=16, deadline=None)
@given(data=st.data(), model=st.sampled_from(list(MODELS)), seed=st.integers(0, 2**31))
def test_whole_trajectory(name: str, data: st.DataObject, model: str, seed: int) -> None:
    steps = data.draw(counts_of_steps(name))
    eta = data.draw(st.sampled_from([0.0, 0.3, 1.0])) if "eta" in SAMPLERS[name].takes else 0.0
    check(compiled(name, data.draw(configs(name)), seed, steps=steps, eta=eta), MODELS[model])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_run_that_multiplies_rounding(seed: int) -> None:
    """By 1e9 in the nonlinear model; coefficients 1e-9 off are seen all the same."""
    config = {
        "beta_schedule": "linear",
        "beta_start": 0.00085,
        "beta_end": 0.03,
        "solver_order": 3,
        "solver_type": "heun",
        "algorithm_type": "sde-dpmsolver++",
        "lower_order_final": False,
    }
    run = Run("DPMSolverSinglestepScheduler", config, seed, steps=35)
    check(run, MODELS["nonlinear"])
    run.table.update[0] *= 1 + 1e-9
    with pytest.raises(AssertionError):
        check(run, MODELS["nonlinear"])


@settings(max_examples=50, deadline=None)
@given(
    start=st.floats(-3.5, 5.0),
    widths=st.lists(st.floats(-5, 1.5), min_size=3, max_size=3),
    nodes=st.sampled_from([2, 3]),
)
def test_integrals_of_deis(start: float, widths: list[float], nodes: int) -> None:
    """As scipy integrates the polynomials, over steps in log rho of any length; diffusers' closed form cancels."""
    before, last, ahead = 10 ** np.array(widths)
    z = start + np.array([0.0, last, last + before])[:nodes]
    high = start - ahead
    for i in range(nodes):
        others = np.delete(z, i)
        expected, _ = integrate.quad(
            lambda x, i=i, others=others: np.exp(x) * np.prod((x - others) / (z[i] - others)), start, high, epsrel=1e-12
        )
        rho = np.exp([z[i], *others, start, high])[:, None]
        found = log_lagrange_integral(rho[0], list(rho[1:-2]), rho[-2], rho[-1])[0]
        # log(exp(z)) is a rounding of z away, of which the differences are taken
        assert found == pytest.approx(expected, rel=1e-12 / min(before, last, ahead, 1.0))


def test_deis_takes_its_last_step_to_sigma_zero() -> None:
    """Where the first beta is nothing. In first order it gives x_0 = (x - sigma eps) / alpha, as DDIM does (Song et al.
    2021, eq. 12)."""
    betas = np.append(0.0, np.linspace(0.001, 0.02, 999))
    config = {"trained_betas": betas.tolist(), "lower_order_final": True}
    table = compile_sampler("DEISMultistepScheduler", config, 5)
    alpha = math.sqrt(np.cumprod(1 - betas)[round(table.timesteps[-1])])
    sigma = math.sqrt(1 - alpha**2)
    assert np.isfinite(table.update).all()
    np.testing.assert_allclose(table.update[-1, 0, [0, -3]], [1 / alpha, -sigma / alpha], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [333, 1000])
@pytest.mark.parametrize("name", SLOW)
def test_long_runs(name: str, steps: int) -> None:
    check(Run(name, {}, 4, steps=steps), MODELS["time-dependent"])


@every_sampler
@settings(max_examples=8, deadline=None)
@given(
    data=st.data(),
    steps=st.integers(2, 60),
    strength=st.floats(0.1, 1.0),
    model=st.sampled_from(list(MODELS)),
    seed=st.integers(0, 2**31),
)
def test_picture_to_picture(name: str, data: st.DataObject, steps: int, strength: float, model: str, seed: int) -> None:
    run = compiled(name, data.draw(configs(name)), seed, steps=steps, strength=strength)
    cls = scheduler_class(name)
    with reference(cls, run.draws(), wide=True):
        scheduler = run.scheduler(cls)
        first = run.cut(scheduler)[:1]
        expected = scheduler.add_noise(torch.from_numpy(run.clean), torch.from_numpy(run.noise), first).numpy()
    np.testing.assert_allclose(run.start, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    check(run, MODELS[model])


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if "timesteps" in sampler.takes])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_custom_timesteps(name: str, prediction_type: str) -> None:
    config = {"prediction_type": prediction_type}
    check(Run(name, config, 3, timesteps=TIMESTEPS), MODELS["time-dependent"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_custom_sigmas(prediction_type: str) -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    run = Run("EulerDiscreteScheduler", {**config, "prediction_type": prediction_type}, 3, sigmas=SIGMAS)
    check(run, MODELS["time-dependent"])


@pytest.mark.parametrize(
    "name",
    [
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSDEScheduler",
    ],
)
def test_sample_prediction_where_diffusers_has_none(name: str) -> None:
    """A model of x_0 and the same one asked for epsilon must give one trajectory."""

    def x_0(x: Any, _: float) -> Any:
        return 0.3 * sin(x) + 0.1 * x

    def table(prediction_type: str) -> SamplerTable:
        return compile_sampler(name, {"prediction_type": prediction_type}, 12)

    sample, epsilon = table("sample"), table("epsilon")
    sigmas = np.sqrt(1 / sample.input_scale**2 - 1)
    sigma_of = dict(zip(epsilon.timesteps, sigmas, strict=True))

    def as_epsilon(x: Any, t: float) -> Any:
        sigma = sigma_of[t]
        return (x * np.sqrt(sigma**2 + 1) - x_0(x, 0)) / sigma

    start = np.random.default_rng(0).standard_normal(SHAPE) * sample.initial[1]
    noises = [np.random.default_rng(1), np.random.default_rng(1)]
    found, expected = (
        our_trajectory(one, model, start, lambda rng=rng: rng.standard_normal(SHAPE).astype(np.float32))
        for one, model, rng in zip((sample, epsilon), (x_0, as_epsilon), noises, strict=True)
    )
    assert worst(found, expected) < 1e-10


FAMILIAR = {
    # diffusers' documentation, "Schedulers" overview: names in the web UI to classes; but "DPM++ SDE", which it maps to
    # the singlestep solver, is k-diffusion's sampler here, DPMSolverSDEScheduler
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DPM++ 2M SGM Uniform": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "DPM++ 2M Exponential": ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    "DPM++ 2M Beta": ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
    "DPM++ 2M Lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "UniPC Karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC Exponential": ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
    "DEIS Karras": ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
    "DEIS Beta": ("DEISMultistepScheduler", {"use_beta_sigmas": True}),
    "DPM++ 2S Karras": ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2S Exponential": ("DPMSolverSinglestepScheduler", {"use_exponential_sigmas": True}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}


def stable_diffusion_15() -> PNDMScheduler:
    """The scheduler that SD 1.5 ships with; its config says nothing of timestep spacing."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@pytest.mark.parametrize("alias", list(FAMILIAR))
def test_a_familiar_name_is_from_config_of_its_class(alias: str) -> None:
    """By name on SD 1.5's own config: the same timesteps, start and trajectory in plain float32 diffusers."""
    name, options = FAMILIAR[alias]
    stored = {**stored_scheduler_config(stable_diffusion_15()), "clip_sample": False}
    table = compile_sampler(alias, stored, 20)
    cls = scheduler_class(name)
    with reference(cls, lambda: noise.standard_normal(SHAPE).astype(np.float32), wide=False):
        scheduler = cls.from_config({**stable_diffusion_15().config, "clip_sample": False}, **options)
        scheduler.set_timesteps(20)
        np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=0, atol=TIMESTEP_BOUND)
        assert table.initial == (0, pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5))
        start = (np.random.default_rng(0).standard_normal(SHAPE) * table.initial[1]).astype(np.float32)
        noise, model = np.random.default_rng(1), MODELS["nonlinear"]
        extra = {"eta": 0.0} if "eta" in SAMPLERS[name].takes else {}  # what diffusers' pipelines pass
        expected = their_trajectory(scheduler, scheduler.timesteps, model, table.timesteps, start, **extra)
    again = np.random.default_rng(1)
    found = our_trajectory(table, model, start, lambda: again.standard_normal(SHAPE).astype(np.float32))
    assert worst(found, expected) <= SINGLE_BOUND


def test_every_name_compiles() -> None:
    stored = {**stored_scheduler_config(stable_diffusion_15()), "clip_sample": False}
    for name in known_names():
        for steps in (4, 20, 50):
            table = compile_sampler(name, stored, steps)
            assert np.isfinite(table.update).all()
            assert table.timesteps.max() < 1000


def test_covers_what_diffusers_calls_compatible() -> None:
    compatible = {one.name for one in diffusers.schedulers.KarrasDiffusionSchedulers}
    assert compatible | {"LCMScheduler", "TCDScheduler", "EDMDPMSolverMultistepScheduler"} == set(SAMPLERS)


@settings(max_examples=50, deadline=None)
@given(probability=st.lists(st.just(0.0) | st.floats(1e-12, 1), min_size=1, max_size=20), shape=st.floats(0.3, 3))
def test_quantiles_of_the_beta_distribution(probability: list[float], shape: float) -> None:
    expected = stats.beta.ppf(probability, shape, shape)
    np.testing.assert_allclose(beta_quantile(np.array(probability), shape), expected, rtol=1e-9, atol=1e-12)
