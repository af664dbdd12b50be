"""Exponential integrators in lambda = log(alpha / sigma): DPM-Solver in its kinds, DEIS, UniPC.

Latents are x = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, or alpha = 1 for EDM. A data prediction solver (the
++ ones, UniPC) interpolates x_0 over lambda, a noise prediction solver eps. Notation follows DPM-Solver++ (Lu et al.
2022, arXiv 2211.01095): h is a step in lambda, r a ratio of steps, D divided differences of what is interpolated.

The last step may end at sigma = 0, where lambda and h are infinite: what a first-order step needs stays finite, and the
rest is not chosen (``where``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import UnknownNameError
from controlrt.runtime.samplers.kdiffusion import EDM, edm
from controlrt.runtime.samplers.sampler import BETAS, NO_FLOW, NO_THRESHOLD, SPREAD, Request, Sampler, predict
from controlrt.runtime.samplers.schedule import NoiseSchedule, sigma_schedule, spaced_above_zero, spread_sigmas
from controlrt.runtime.samplers.table import LATENTS, NOISE, Array, Form, Steps, kept, select, where

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
FEW_STEPS = 15
"""Below this many steps ``lower_order_final`` steadies the last ones."""


@dataclass(frozen=True)
class Path:
    """The points of a run: sigma over alpha at each call and at the end, (n + 1,)."""

    ratios: Array
    variance_preserving: bool = True

    @cached_property
    def alpha(self) -> Array:
        """Signal rate, (n + 1,)."""
        return 1 / np.sqrt(self.ratios**2 + 1) if self.variance_preserving else np.ones_like(self.ratios)

    @cached_property
    def sigma(self) -> Array:
        """Noise rate, (n + 1,)."""
        return self.ratios * self.alpha

    @cached_property
    def lam(self) -> Array:
        """Half the log signal-to-noise ratio, (n + 1,); infinite where sigma is 0."""
        return -np.log(self.ratios)

    def defined(self, orders: NDArray[np.intp]) -> NDArray[np.intp]:
        """The orders, lowered at steps over no distance and after points met twice, where differences say nothing."""
        moves = np.abs(np.diff(self.ratios)) > 1e-12 * self.ratios[:-1]
        one_back, two_back = np.append(True, moves[:-1]), np.append([True, True], moves[:-2])[: len(moves)]
        lowered: NDArray[np.intp] = np.minimum(orders, 1 + moves * one_back * (1 + two_back))
        return lowered

    def before(self, values: Array, back: int) -> Array:
        """``values`` at the point ``back`` calls before each call, (n,); the first one where there is none."""
        return values[np.maximum(np.arange(len(self.ratios) - 1) - back, 0)]


def _dpm_multistep(request: Request) -> Steps:
    """Lu et al. 2022, arXiv 2206.00927 (dpmsolver) and 2211.01095, algorithm 2 (++); the SDE kinds are its appendix."""
    config, schedule = request.config, NoiseSchedule(request.config, finite=True)
    used = len(schedule) - int(np.searchsorted(-schedule.log_sigmas[::-1], float(config["lambda_min_clipped"])))
    timesteps = spaced_above_zero(config, request.steps, used) if request.timesteps is None else request.timesteps
    rounded = config["beta_schedule"] != "squaredcos_cap_v2"
    timesteps, ratios = _grid(
        request, schedule, timesteps, rounded=("use_karras_sigmas", "use_lu_lambdas") if rounded else ()
    )
    path = Path(np.append(ratios, _final(request, schedule)))
    x_0, eps = predict(config["prediction_type"], path.alpha[:-1], path.sigma[:-1])
    return _multistep(request, timesteps, path, x_0, eps)


def _edm_dpm_multistep(request: Request) -> Steps:
    """DPM-Solver++ multistep with EDM's preconditioning and alpha = 1."""
    timesteps, sigmas, x_0, scale = edm(request)
    path = Path(sigmas, variance_preserving=False)
    return _multistep(request, timesteps, path, x_0, x_0, scale, (float(request.config["sigma_max"]) ** 2 + 1) ** 0.5)


def _multistep(
    request: Request,
    timesteps: Array,
    path: Path,
    x_0: Form,
    eps: Form,
    input_scale: Array | float = 1.0,
    noise_scale: float = 1.0,
) -> Steps:
    algorithm, order = _algorithm(request)
    data, sde = algorithm.endswith("++"), algorithm.startswith("sde-")
    if not (data or path.variance_preserving):
        raise request.refuse(
            f"algorithm_type {algorithm} is not one of its kinds", "use dpmsolver++ or sde-dpmsolver++"
        )
    if order == 3 and (algorithm == "sde-dpmsolver" or (sde and not path.variance_preserving)):
        raise request.refuse(f"solver_order 3 does not go with algorithm_type {algorithm}", "use solver_order 2")
    n, config = len(timesteps), request.config
    orders = np.minimum(request.age(n) + 1, order)
    few = bool(config["lower_order_final"]) and n < FEW_STEPS
    if config["euler_at_final"] or few or config["final_sigmas_type"] == "zero":
        orders[-1:] = 1
    if few:
        orders[-2:] = np.minimum(orders[-2:], 2)
    orders = path.defined(orders)
    outputs = [x_0 if data else eps, kept("output 1"), kept("output 2")]
    back = [path.before(path.lam, i) for i in range(3)]
    h, h_0, h_1 = path.lam[1:] - back[0], back[0] - back[1], back[1] - back[2]
    with np.errstate(all="ignore"):
        r_0, r_1 = h_0 / h, h_1 / h
        d_1_0, d_1_1 = (outputs[0] - outputs[1]) / r_0, (outputs[1] - outputs[2]) / r_1
        d_1 = d_1_0 + (r_0 / (r_0 + r_1)) * (d_1_0 - d_1_1)
        d_2 = (d_1_0 - d_1_1) / (r_0 + r_1)
        base, phi_1, phi_2, phi_3, noise = _phis(path, h, 0, data, sde)
        first = base + phi_1 * outputs[0]
        slope = phi_2 if config["solver_type"] == "heun" else phi_1 / 2
        latents = select(orders, {1: first, 2: first + slope * d_1_0, 3: first + phi_2 * d_1 + phi_3 * d_2})
    return Steps(
        timesteps=timesteps,
        input_scale=input_scale,
        latents=latents + noise * NOISE if sde else latents,
        keep={f"output {i}": outputs[i - 1] for i in range(1, order)},
        draws=sde,
        noise_scale=noise_scale,
        start=(path.alpha[:-1], path.sigma[:-1]),
    )


def _phis(
    path: Path, h: Array, back: int, data: bool, sde: bool, origin: Form = LATENTS
) -> tuple[Form, Array, Array, Array, Array]:
    """What an exponential step over h, begun ``back`` calls ago at ``origin``, is made of.

    The step is base + phi_1 D_0 + phi_2 D_1 + phi_3 D_2 + noise * n with D_k the k-th differences per h of what is
    interpolated (arXiv 2211.01095, eq. 9 and appendix B).
    """
    alpha, sigma = path.alpha[1:], path.sigma[1:]
    if data:
        z = -2 * h if sde else -h
        base = (sigma / path.before(path.sigma, back) * (np.exp(-h) if sde else 1)) * origin
        second = (np.expm1(z) - z) / z**2
        # the SDE's last term has diffusers' sign; only its third-order steps use it
        phi_3 = -alpha * (second + 0.5 if sde else second - 0.5)
        noise = sigma * np.sqrt(-np.expm1(-2 * h)) if sde else np.zeros_like(h)
        return base, -alpha * np.expm1(z), alpha * (1 - np.expm1(z) / z), phi_3, noise
    times = 2.0 if sde else 1.0
    base = (alpha / path.before(path.alpha, back)) * origin
    phi_1 = -times * sigma * np.expm1(h)
    phi_2 = -times * sigma * (np.expm1(h) / h - 1)
    phi_3 = -times * sigma * ((np.expm1(h) - h) / h**2 - 0.5)
    return base, phi_1, phi_2, phi_3, sigma * np.sqrt(np.expm1(2 * h)) if sde else np.zeros_like(h)


def _dpm_singlestep(request: Request) -> Steps:
    """Lu et al. 2022, arXiv 2211.01095, algorithm 1: steps of one, two and three calls in turn, each from its first."""
    config, schedule = request.config, NoiseSchedule(request.config)
    clipped = int(np.searchsorted(-schedule.log_sigmas[::-1], float(config["lambda_min_clipped"])))
    timesteps = request.timesteps
    if timesteps is None:
        timesteps = np.round(np.linspace(0, len(schedule) - 1 - clipped, request.steps + 1))[:0:-1]
    timesteps, ratios = _grid(request, schedule, timesteps, rounded=("use_karras_sigmas",))
    path = Path(np.append(ratios, _final(request, schedule)))
    algorithm, order = _algorithm(request)
    if algorithm == "sde-dpmsolver":
        raise request.refuse("algorithm_type sde-dpmsolver is not one of its kinds", "use sde-dpmsolver++")
    data, sde = algorithm.endswith("++"), algorithm.startswith("sde-")
    n = len(timesteps)
    orders = np.minimum(_order_list(request, n, order), request.age(n) + 1)
    x_0, eps = predict(config["prediction_type"], path.alpha[:-1], path.sigma[:-1])
    outputs = [x_0 if data else eps, kept("output 1"), kept("output 2")]
    origin = where(orders == 1, LATENTS, kept("latents"))
    forms = {}
    with np.errstate(all="ignore"):
        for one in range(1, order + 1):
            back = one - 1
            lam_s = path.before(path.lam, back)
            h = path.lam[1:] - lam_s
            base, phi_1, phi_2, phi_3, noise = _phis(path, h, back, data, sde, origin)
            step = base + phi_1 * outputs[back] + (noise * NOISE if sde else Form({}))
            if one >= 2:
                r_0 = (path.before(path.lam, 0) - lam_s) / h
                d_1_1 = (outputs[0] - outputs[back]) / r_0
            if one == 2:
                step = step + (phi_2 if config["solver_type"] == "heun" else phi_1 / 2) * d_1_1
            if one == 3 and config["solver_type"] != "heun":
                step = step + phi_2 * d_1_1
            elif one == 3:
                r_1 = (path.before(path.lam, 1) - lam_s) / h
                d_1_0 = (outputs[1] - outputs[2]) / r_1
                step = step + phi_2 * ((r_0 * d_1_0 - r_1 * d_1_1) / (r_0 - r_1))
                step = step + phi_3 * (2.0 * (d_1_1 - d_1_0) / (r_0 - r_1))
            forms[one] = step
        latents = select(orders, forms)
    return Steps(
        timesteps=timesteps,
        latents=latents,
        keep={**({"latents": origin} if order > 1 else {}), **{f"output {i}": outputs[i - 1] for i in range(1, order)}},
        draws=sde,
        start=(path.alpha[:-1], path.sigma[:-1]),
    )


def _order_list(request: Request, steps: int, order: int) -> NDArray[np.intp]:
    """The order of each call: 1, 2, 3, 1, 2, 3, ..., falling at the end where ``lower_order_final`` holds."""
    config = request.config
    final_zero = config["final_sigmas_type"] == "zero"
    orders = np.arange(steps) % order + 1
    if config["lower_order_final"] or steps % order or final_zero:  # the latter two force it, as in diffusers
        if order == 2 and steps % 2 == 0:
            orders[-1:] = 1
        elif order == 3 and steps % 3 == 0:
            orders[-3:] = [1, 2, 1]
    if final_zero:
        orders[-1:] = 1
    return orders


def _deis(request: Request) -> Steps:
    """Zhang & Chen 2023, arXiv 2204.13902: eps as a polynomial in log rho, rho = sigma / alpha, integrated over rho."""
    config, schedule = request.config, NoiseSchedule(request.config)
    timesteps, ratios = _grid(
        request, schedule, spaced_above_zero(config, request.steps, len(schedule)), rounded=("use_karras_sigmas",)
    )
    # a named sigma schedule ends where its last sigma is
    path = Path(np.append(ratios, schedule.sigmas[0] if sigma_schedule(config) is None else ratios[-1]))
    x_0, _ = predict(config["prediction_type"], path.alpha[:-1], path.sigma[:-1])
    eps = (LATENTS - path.alpha[:-1] * x_0) / path.sigma[:-1]
    order, n = int(request.config["solver_order"]), len(timesteps)
    orders = np.minimum(request.age(n) + 1, order)
    if config["lower_order_final"] and n < FEW_STEPS:
        orders[-2:] = np.minimum(orders[-2:], [2, 1][-n:])
    orders = path.defined(orders)
    outputs = [eps, kept("output 1"), kept("output 2")]
    rho = [path.before(path.ratios, i) for i in range(3)]
    target, forms = path.ratios[1:], {}
    with np.errstate(all="ignore"):
        for one in range(1, order + 1):
            step = LATENTS / path.alpha[:-1]
            for i in range(one):
                others = [rho[j] for j in range(one) if j != i]
                step = step + log_lagrange_integral(rho[i], others, rho[0], target) * outputs[i]
            forms[one] = path.alpha[1:] * step
        latents = select(orders, forms)
    return Steps(
        timesteps=timesteps,
        latents=latents,
        keep={f"output {i}": outputs[i - 1] for i in range(1, order)},
        start=(path.alpha[:-1], path.sigma[:-1]),
    )


def log_lagrange_integral(node: Array, others: list[Array], low: Array, high: Array) -> Array:
    """Integral over rho of the Lagrange polynomial in log rho that is 1 at ``node`` and 0 at up to two ``others``.

    By Gauss-Legendre quadrature in log rho, exact to rounding. The closed form is a difference of primitives that are
    alike: at steps of 1e-2 in log rho half the digits of three nodes' are lost, at 1e-5 all of them.
    """
    if not others:
        return high - low  # also where high is zero
    places, weights = _quadrature()
    width = np.log(high) - np.log(low)
    z = np.log(low) + width * (places[:, None] + 1) / 2
    values = np.exp(z)
    for other in others:
        values = values * (z - np.log(other)) / (np.log(node) - np.log(other))
    integral: Array = width / 2 * (weights @ values)
    return integral


@cache
def _quadrature() -> tuple[Array, Array]:
    """Places in [-1, 1] and weights, enough of them for any step: e^z times a square over a hundred."""
    return np.polynomial.legendre.leggauss(32)


def _unipc(request: Request) -> Steps:
    """Zhao et al. 2023, arXiv 2302.04867: UniP predictor (eq. 3), and UniC corrector (eq. 8) at no further call."""
    config, schedule = request.config, NoiseSchedule(request.config, finite=True)
    spread = sigma_schedule(config)
    timesteps, ratios = _grid(
        request, schedule, spaced_above_zero(config, request.steps, len(schedule)), rounded=("use_karras_sigmas",)
    )
    end = _final(request, schedule)
    path = Path(np.append(ratios, ratios[-1] if end and spread is not None else end))
    data = bool(config["predict_x0"])
    if not data and not end:
        raise request.refuse("predict_x0 False cannot end at sigma zero", "set final_sigmas_type sigma_min")
    if config["solver_type"] not in ("bh1", "bh2", "midpoint", "heun", "logrho"):
        raise UnknownNameError("solver_type", str(config["solver_type"]), ["bh1", "bh2"])
    order, n = int(request.config["solver_order"]), len(timesteps)
    age = request.age(n)
    orders = np.minimum(age + 1, order)
    if config["lower_order_final"]:
        orders = np.minimum(orders, n - np.arange(n))
    if orders[-1] > 1 and not end:
        raise request.refuse(
            f"an order of {orders[-1]} is not defined at a last step that ends at sigma zero",
            "set lower_order_final True",
        )
    orders = path.defined(orders)
    x_0, eps = predict(config["prediction_type"], path.alpha[:-1], path.sigma[:-1])
    current = x_0 if data else eps
    past = [kept(f"output {i}") for i in range(1, order + 1)]
    bh1 = config["solver_type"] == "bh1"

    # the corrector redoes the step before, now that the model's output at its end is known
    index = np.arange(n)
    corrects = (age > 0) & ~np.isin(index - 1, np.asarray(config["disable_corrector"], int))
    corrected = select(
        np.where(corrects, np.roll(orders, 1), 0),
        {one: _unified(path, index - 1, one, kept("latents"), past, current, data, bh1) for one in range(1, order + 1)},
    )
    latents = where(corrects, corrected, LATENTS)
    known = [current, *past]
    return Steps(
        timesteps=timesteps,
        latents=select(
            orders, {one: _unified(path, index, one, latents, known, None, data, bh1) for one in range(1, order + 1)}
        ),
        keep={"latents": latents, **{f"output {i}": known[i - 1] for i in range(1, order + 1)}},
        start=(path.alpha[:-1], path.sigma[:-1]),
    )


def _unified(
    path: Path,
    index: NDArray[np.intp],
    order: int,
    origin: Form,
    outputs: list[Form],
    reached: Form | None,
    data: bool,
    bh1: bool,
) -> Form:
    """The step from call ``index`` to the next: predicted, or corrected where the output ``reached`` is known.

    ``outputs`` are those at the calls index, index - 1, ...
    """
    at = np.maximum(index, 0)
    lam_s, lam_t = path.lam[at], path.lam[at + 1]
    with np.errstate(all="ignore"):
        h = lam_t - lam_s
        ratios = [(path.lam[np.maximum(at - i, 0)] - lam_s) / h for i in range(1, order)]
        z = -h if data else h
        b_h = z if bh1 else np.expm1(z)
        rate = path.alpha[at + 1] if data else path.sigma[at + 1]
        fade = path.sigma[at + 1] / path.sigma[at] if data else path.alpha[at + 1] / path.alpha[at]
        step: Form = fade * origin - rate * np.expm1(z) * outputs[0]
        differences = [(outputs[i] - outputs[0]) / ratios[i - 1] for i in range(1, order)]
        if reached is not None:
            ratios, differences = [*ratios, np.ones_like(h)], [*differences, reached - outputs[0]]
        for weight, difference in zip(_rhos(ratios, z, b_h), differences, strict=True):
            step = step - rate * b_h * weight * difference
    return step


def _rhos(ratios: list[Array], z: Array, b_h: Array) -> list[Array]:
    """The weights of the differences: eq. 4 of arXiv 2302.04867, solved for every step at once."""
    size = len(ratios)
    if size == 0:
        return []
    if size == 1:
        return [np.full_like(z, 0.5)]  # independent of B(h), by the paper's choice
    powers = np.stack(ratios, axis=-1)[:, None, :] ** np.arange(size)[None, :, None]
    right, phi, factorial = [], np.expm1(z) / z - 1, 1
    for i in range(1, size + 1):
        right.append(phi * factorial / b_h)
        factorial *= i + 1
        phi = phi / z - 1 / factorial
    vector = np.stack(right, axis=-1)
    weights = np.full((len(z), size), np.nan)
    finite = np.isfinite(powers).all((1, 2)) & np.isfinite(vector).all(1)
    solvable = np.nonzero(np.linalg.det(np.where(np.reshape(finite, (-1, 1, 1)), powers, 0)))[0]
    weights[solvable] = np.linalg.solve(powers[solvable], vector[solvable, :, None])[..., 0]
    return list(weights.T)


def _grid(
    request: Request, schedule: NoiseSchedule, timesteps: Array, *, rounded: tuple[str, ...]
) -> tuple[Array, Array]:
    """Whole timesteps and sigma over alpha at each call, each (steps,), without the end."""
    spread = sigma_schedule(request.config)
    if spread is None:
        return timesteps, schedule.sigma_at(timesteps)
    if request.timesteps is not None:
        raise request.refuse(f"timesteps cannot be given together with {spread}", "leave one of them out")

    def between(low: float, high: float) -> Array:
        bounded = spread != "use_lu_lambdas"
        return spread_sigmas(spread, request.config, low, high, request.steps, bounded=bounded)

    ratios = between(schedule.sigmas[0], schedule.sigmas[-1])
    if spread in rounded:
        return np.round(schedule.timestep_of(ratios)), ratios
    if spread == "use_lu_lambdas":
        low, high = np.log(schedule.single_sigmas[[0, -1]]).astype(np.float64)
        single = np.exp(high + np.linspace(0, 1, request.steps) * (low - high))
    else:
        single = between(*schedule.single_sigmas[[0, -1]].astype(np.float64))
    return schedule.cut_timestep_of(single), ratios


def _final(request: Request, schedule: NoiseSchedule) -> float:
    """Sigma over alpha where the run ends."""
    kind = request.config["final_sigmas_type"]
    if kind not in ("zero", "sigma_min"):
        raise UnknownNameError("final_sigmas_type", str(kind), ["zero", "sigma_min"])
    return 0.0 if kind == "zero" else float(schedule.sigmas[0])


def _algorithm(request: Request) -> tuple[str, int]:
    """Algorithm and order; names of other samplers' algorithms stand for the usual one, as in diffusers."""
    config = request.config
    algorithm = "dpmsolver++" if config["algorithm_type"] == "deis" else config["algorithm_type"]
    if algorithm not in ALGORITHMS:
        raise UnknownNameError("algorithm_type", str(algorithm), ALGORITHMS)
    if config["solver_type"] not in ("midpoint", "heun", "logrho", "bh1", "bh2"):
        raise UnknownNameError("solver_type", str(config["solver_type"]), ["midpoint", "heun"])
    if not algorithm.endswith("++") and config["final_sigmas_type"] == "zero":
        raise request.refuse(
            f"algorithm_type {algorithm} cannot end at sigma zero",
            "set final_sigmas_type sigma_min, or use dpmsolver++",
        )
    return algorithm, int(config["solver_order"])


_LAMBDA = {
    **BETAS,
    **SPREAD,
    **NO_THRESHOLD,
    **NO_FLOW,
    "solver_order": 2,
    "lower_order_final": True,
}
_SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
_DPM = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -np.inf,
}

SAMPLERS = (
    Sampler(
        name="DPMSolverMultistepScheduler",
        options={
            **_LAMBDA,
            **_SPACED,
            **_DPM,
            "euler_at_final": False,
            "use_lu_lambdas": False,
            "rescale_betas_zero_snr": False,
        },
        compile=_dpm_multistep,
        takes=frozenset({"timesteps"}),
    ),
    Sampler(
        name="DPMSolverSinglestepScheduler",
        options={**_LAMBDA, **_DPM, "lower_order_final": False},
        compile=_dpm_singlestep,
        takes=frozenset({"timesteps"}),
    ),
    Sampler(name="DEISMultistepScheduler", options={**_LAMBDA, **_SPACED}, compile=_deis),
    Sampler(
        name="UniPCMultistepScheduler",
        options={
            **_LAMBDA,
            **_SPACED,
            "solver_p": None,
            "predict_x0": True,
            "solver_type": "bh2",
            "disable_corrector": (),
            "final_sigmas_type": "zero",
            "rescale_betas_zero_snr": False,
        },
        compile=_unipc,
    ),
    Sampler(
        name="EDMDPMSolverMultistepScheduler",
        options={
            **EDM,
            **NO_THRESHOLD,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "lower_order_final": True,
            "euler_at_final": False,
        },
        compile=_edm_dpm_multistep,
    ),
)
