"""The pipeline: prompts, control pictures and a seed in, pictures out. Names are those of diffusers."""

from __future__ import annotations

import json
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.conditioning import Conditioner
from controlrt.runtime.control import ControlUse, PerControl, Pictures, check_window, in_window, resolve_controls
from controlrt.runtime.errors import ParameterError
from controlrt.runtime.executors import BoundPlan, open_executor
from controlrt.runtime.fitting import Resize
from controlrt.runtime.noise import Draws
from controlrt.runtime.pictures import to_pil
from controlrt.runtime.plan import UNGUIDED, Layout, StepLayout, plan_denoising
from controlrt.runtime.samplers import SamplerTable, SchedulerChoice, compile_sampler

StepCallback = Callable[["ControlNetPipeline", int, float, dict[str, NDArray[np.float32]]], Mapping[str, Any] | None]
DEFAULT_STEPS = 50
_KEPT_PLANS = 4


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds spent in each stage of one call."""

    bind: float
    """Laying out the plan and binding memory; next to nothing when the layout was used before."""
    condition: float
    """Text encoders, and what depends on prompt, schedule or control picture alone."""
    noise: float
    """Drawing all noise, and the sampler's coefficients."""
    steps: tuple[float, ...]
    decode: float

    @property
    def total(self) -> float:
        """The whole call."""
        return self.bind + self.condition + self.noise + sum(self.steps) + self.decode


@dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """What a call returns."""

    images: Any
    """PIL pictures, or (batch, height, width, 3) float32 in [0, 1] for "np", or latents for "latent"."""
    seed: int | tuple[int, ...] | None
    """What the noise was drawn from; None where latents were given and the sampler drew none."""
    timings: Timings


class ControlNetPipeline:
    """Draws controlled pictures from a bundle, without PyTorch.

    One call runs at a time; calls from several threads wait for each other.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.bundle = bundle
        self._executor = open_executor(bundle, threads)
        self._conditioner = Conditioner(bundle, self._executor)
        self._scheduler: dict[str, Any] = json.loads(bundle.file("scheduler.json").read_text())
        self._bound: OrderedDict[Layout, BoundPlan] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: str | Path, *, threads: int | None = None, verify: bool = True) -> Self:
        """Opens the bundle at ``path`` and all programs that drawing needs.

        Args:
            path: bundle directory, as written by ``build-engines``.
            threads: CPU threads per program; all cores by default.
            verify: compare every file with its SHA-256 first. Leave it on unless the place is trusted.

        Raises:
            BundleError: the bundle is missing, damaged or of another schema version.
        """
        pipeline = cls(Bundle.open(path, verify=verify), threads=threads)
        manifest = pipeline.bundle.manifest
        fused = manifest.fusion.controls if manifest.fusion else ()
        rare = {"unet", *(control.part for control in manifest.controls if control.name in fused)} if fused else set()
        for program in manifest.programs:
            if program.name != "vae_encoder" and program.part not in rare:
                pipeline._executor.load(program.name)
        return pipeline

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the bundle's ControlNets."""
        return tuple(control.name for control in self.bundle.manifest.controls)

    def sampler_table(
        self,
        scheduler: SchedulerChoice | None = None,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
    ) -> SamplerTable:
        """The table that a call with these arguments runs; one row per model call. See ``compile_sampler``."""
        if num_inference_steps is None and timesteps is None and sigmas is None:
            num_inference_steps = DEFAULT_STEPS
        return compile_sampler(
            scheduler, self._scheduler, num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Pictures | Mapping[str, Pictures] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        controlnet_conditioning_scale: PerControl = 1.0,
        control_guidance_start: PerControl = 0.0,
        control_guidance_end: PerControl = 1.0,
        guess_mode: bool = False,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        noise: Literal["cpu", "gpu"] = "cpu",
        num_images_per_prompt: int = 1,
        latents: NDArray[np.float32] | None = None,
        scheduler: SchedulerChoice | None = None,
        resize: Resize | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
    ) -> PipelineOutput:
        """Draws ``len(prompt) * num_images_per_prompt`` pictures.

        Args:
            prompt: one prompt or a list.
            image: control pictures by control name; a bare picture where the bundle has one control; None for no
                control. A list gives one picture per prompt. PIL, uint8 or float arrays (height, width[, channels]).
            negative_prompt: what to steer away from, one or one per prompt.
            width, height: pixels, within the bundle's profile; its default size where not given.
            num_inference_steps: denoising steps, 1 to 1000; 50 where not given. Second-order samplers call the model
                twice a step.
            timesteps, sigmas: custom ones, descending, in place of a number of steps, for samplers that take them.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); 1 or less turns it off.
            guidance_start, guidance_end: the fractions of the steps between which guidance acts (Kynkäänniemi et al.
                2024, arXiv 2404.07724); outside, a step runs the conditional rows alone and costs half.
            controlnet_conditioning_scale, control_guidance_start, control_guidance_end: one number for all controls,
                a list in the order of ``image``, or a mapping by name. The window is in fractions of the steps.
            guess_mode: diffusers' guess mode: control rises over the layers and acts on the conditional half only.
            eta: how much noise DDIM and TCD add at each step, 0 to 1.
            seed: draws the noise that diffusers draws from ``torch.Generator("cpu").manual_seed(seed)``, at the start
                and at every step; a list gives each picture its own generator. None picks one; it is in the output.
            noise: whose generator the seed is for: "cpu", or "gpu" for CUDA's.
            latents: (batch, channels, height/8, width/8) float32 standard normal noise to start from, instead of the
                seed's.
            scheduler: the sampler, by a name ("DPM++ 2M Karras", "Euler a", "UniPC", a diffusers class, ...) or as a
                mapping of scheduler options, ``_class_name`` among them; by default the checkpoint's.
            resize: how to fit control pictures of another size: "stretch", "crop", "pad", "fill", or a name or number
                of the web UI's; refused by default.
            callback_on_step_end: called as in diffusers with (pipeline, step, timestep, {"latents": array}); may return
                a mapping with new "latents".
            output_type: "pil", "np" for (batch, height, width, 3) float32 in [0, 1], or "latent".

        Raises:
            UserError: one of its kinds for each argument that cannot be; nothing has run then.
        """
        manifest = self.bundle.manifest
        prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ParameterError("prompt", prompt, "a string or a list of at least one")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ParameterError("num_images_per_prompt", num_images_per_prompt, "a whole number of at least 1")
        if not isinstance(guidance_scale, (int, float)) or not math.isfinite(guidance_scale):
            raise ParameterError("guidance_scale", guidance_scale, "a finite number")
        for name, value in (("guidance_start", guidance_start), ("guidance_end", guidance_end)):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ParameterError(name, value, "a fraction of the steps, from 0 to 1")
        check_window("guidance", guidance_start, guidance_end)
        if output_type not in ("pil", "np", "latent"):
            raise ParameterError("output_type", output_type, "pil, np or latent")
        default_width, default_height = manifest.profile.default_size
        width = default_width if width is None else width
        height = default_height if height is None else height
        batch = len(prompts) * num_images_per_prompt
        manifest.profile.check(width, height, batch)
        table = self.sampler_table(scheduler, num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta)
        uses = resolve_controls(
            manifest.controls,
            image,
            scale=controlnet_conditioning_scale,
            start=control_guidance_start,
            end=control_guidance_end,
            width=width,
            height=height,
            prompts=len(prompts),
            images_per_prompt=num_images_per_prompt,
            resize=resize,
        )
        negatives = self._negatives(negative_prompt, len(prompts))
        draws_later = bool(table.draws.any())
        if seed is None and (latents is None or draws_later):
            seed = secrets.randbits(32)
        draws = Draws(0 if seed is None else seed, batch, noise)
        start = self._starting_noise(draws, latents, batch, width, height)
        count = len(table)
        layout = Layout(
            width=width,
            height=height,
            batch=batch,
            draws=draws_later,
            steps=tuple(
                StepLayout(
                    controls=tuple(use.control.name for use in uses if use.active(step, count)),
                    guided=guidance_scale > 1 and in_window(step, count, guidance_start, guidance_end),
                )
                for step in range(count)
            ),
        )
        conditional: list[str | None] = [text for text in prompts for _ in range(num_images_per_prompt)]
        unconditional = [text for text in negatives for _ in range(num_images_per_prompt)]

        with self._lock:
            started = time.perf_counter()
            bound = self._bind(layout)
            bound_at = time.perf_counter()
            self._conditioner.fill(
                bound.plan,
                bound.buffers,
                prompts=[*unconditional, *conditional] if layout.guided else conditional,
                timesteps=table.timesteps.astype(np.float32),
                hints={use.control.name: use.hint for use in uses},
                size=(width, height),
            )
            conditioned = time.perf_counter()
            _fill(bound, layout, table, uses, start, draws, guidance_scale, guess_mode)
            prepared = time.perf_counter()
            step_seconds = self._denoise(bound, table, callback_on_step_end)
            denoised = time.perf_counter()
            images = self._decode(bound.buffers[bound.plan.result], output_type)
            done = time.perf_counter()
        return PipelineOutput(
            images=images,
            seed=tuple(seed) if isinstance(seed, Sequence) else seed,
            timings=Timings(
                bind=bound_at - started,
                condition=conditioned - bound_at,
                noise=prepared - conditioned,
                steps=step_seconds,
                decode=done - denoised,
            ),
        )

    def _denoise(self, bound: BoundPlan, table: SamplerTable, callback: StepCallback | None) -> tuple[float, ...]:
        """Runs every step; returns the seconds each took, callback included."""
        seconds = []
        for step in range(len(table)):
            started = time.perf_counter()
            bound.run_step(step)
            if callback is not None:
                latents = bound.buffers[bound.plan.latents(step + 1)]
                returned = callback(self, step, float(table.timesteps[step]), {"latents": latents.copy()})
                if returned and "latents" in returned:
                    latents[...] = returned["latents"]
            seconds.append(time.perf_counter() - started)
        return tuple(seconds)

    def _decode(self, latents: NDArray[np.float32], output_type: str) -> Any:
        """Pictures of the wanted kind, decoded one at a time to keep memory flat."""
        if output_type == "latent":
            return latents.copy()
        images = np.concatenate(
            [self._executor.run("vae_decoder", {"latents": row[None]})["picture"] for row in latents]
        )
        return to_pil(images) if output_type == "pil" else images

    def close(self) -> None:
        """Releases sessions and buffers; safe to call twice."""
        self._bound.clear()
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _negatives(self, negative_prompt: str | Sequence[str] | None, prompts: int) -> list[str | None]:
        """One negative prompt per prompt; None where the model takes zeros for a missing one."""
        if negative_prompt is None:
            return [None if self.bundle.manifest.model.zero_empty_negative else ""] * prompts
        negatives = [negative_prompt] * prompts if isinstance(negative_prompt, str) else negative_prompt
        listed = isinstance(negatives, Sequence) and all(isinstance(text, str) for text in negatives)
        if not listed or len(negatives) != prompts:
            raise ParameterError("negative_prompt", negative_prompt, f"one string or {prompts}, one for each prompt")
        return list(negatives)

    def _starting_noise(
        self, draws: Draws, latents: NDArray[np.float32] | None, batch: int, width: int, height: int
    ) -> NDArray[np.float32]:
        model = self.bundle.manifest.model
        shape = (batch, model.latent_channels, height // model.vae_scale_factor, width // model.vae_scale_factor)
        if latents is None:
            return draws.randn(shape)
        if not isinstance(latents, np.ndarray) or latents.shape != shape or not np.isfinite(latents).all():
            found = f"shape {latents.shape}" if isinstance(latents, np.ndarray) else type(latents).__name__
            raise ParameterError("latents", found, f"an array of finite values of shape {shape}")
        return latents.astype(np.float32)

    def _bind(self, layout: Layout) -> BoundPlan:
        """The bound plan of ``layout``; the last few are kept."""
        if layout not in self._bound:
            self._bound[layout] = self._executor.bind(plan_denoising(self.bundle.manifest, layout))
            if len(self._bound) > _KEPT_PLANS:
                self._bound.popitem(last=False)
        self._bound.move_to_end(layout)
        return self._bound[layout]


def _fill(
    bound: BoundPlan,
    layout: Layout,
    table: SamplerTable,
    uses: Sequence[ControlUse],
    start: NDArray[np.float32],
    draws: Draws,
    guidance_scale: float,
    guess_mode: bool,
) -> None:
    """Writes one call's inputs into the buffers of its plan."""
    pictures = np.arange(layout.batch)
    guidance = np.zeros((layout.batch, layout.rows), np.float32)
    guidance[pictures, pictures] = 1 - guidance_scale if layout.guided else 1
    if layout.guided:
        guidance[pictures, layout.batch + pictures] = guidance_scale
    values = {
        "latents.0": start * np.float32(table.initial[1]),
        "history.0": np.float32(0),
        "rows": np.tile(pictures, layout.rows // layout.batch),
        "input_scale": table.input_scale[:, None],
        "update": table.update[:, None],
        "clip": table.clip[:, None],
        "guidance": guidance,
        UNGUIDED: np.eye(layout.batch, dtype=np.float32),
    }
    for use in uses:
        values[f"conditioning_scale.{use.control.name}"] = use.conditioning_scale(
            layout.batch, layout.guided, guess_mode
        )
    if layout.draws:
        for step in range(len(table)):
            bound.buffers["noise"][step] = draws.randn(start.shape) if table.draws[step] else 0
    for name, value in values.items():
        if name in bound.buffers:  # a control that never runs has no buffers
            bound.buffers[name][...] = value
