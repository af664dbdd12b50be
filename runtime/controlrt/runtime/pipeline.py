"""The pipeline: prompts, control pictures and a seed in, pictures out. Names are those of diffusers."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.canvas import prepare_canvas, read_source, run_strength
from controlrt.runtime.conditioning import Conditioner
from controlrt.runtime.control import (
    Guidance,
    PerControl,
    PerControlScale,
    Pictures,
    resolve_controls,
)
from controlrt.runtime.control_use import check_window, in_window
from controlrt.runtime.drawing import Drawing
from controlrt.runtime.errors import ControlRTError, DeviceMemoryError, ParameterError, UnknownNameError, about
from controlrt.runtime.executors import AfterStep, BoundPlan, Executor, open_executor
from controlrt.runtime.filling import fill_buffers
from controlrt.runtime.fitting import Resize, resize_named
from controlrt.runtime.image_prompts import ImagePrompts, ImageScale, resolve_image_prompts
from controlrt.runtime.noise import Draws
from controlrt.runtime.pictures import Picture, to_pil
from controlrt.runtime.plan import Layout, Plan, Planner, StepLayout
from controlrt.runtime.profile import CHUNK_TOKENS
from controlrt.runtime.prompt_syntax import SYNTAXES, Syntax
from controlrt.runtime.prompts import Prompt
from controlrt.runtime.samplers import SamplerTable, SchedulerChoice, compile_sampler
from controlrt.runtime.scales import GuessMode, LayerWeights, is_float32, is_number
from controlrt.runtime.vae import Vae, check_finite, check_vae_tiling

StepCallback = Callable[["ControlNetPipeline", int, float, dict[str, NDArray[np.float32]]], Mapping[str, Any] | None]
DEFAULT_STEPS = 50
ON_FIRST_USE = ("vae_encoder", "adapter.", "ip_adapter.")
"""How the parts begin that are opened when a call first needs them."""
_KEPT_PLANS = 4
"""With memory behind them."""
_KEPT_LAYOUTS = 16


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds spent in each stage of one call."""

    bind: float
    """Laying out the plan and binding memory; next to nothing when the layout was used before."""
    condition: float
    """Text encoders, and what depends on prompt, schedule or control picture alone."""
    noise: float
    """Drawing all noise, encoding the pictures to start from, and the sampler's coefficients."""
    steps: tuple[float, ...]
    host: float
    """What the host took of the steps: to launch all at once on a GPU, or what networks waited for it between them."""
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

    Args:
        bundle: an opened bundle.
        threads, device: as ``load`` takes them.
        executor: what runs the programs instead of the executor of the bundle's backend.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, device: int | None = None, executor: Executor | None = None
    ) -> None:
        self.bundle = bundle
        self._executor = executor or open_executor(bundle, threads, device)
        self._conditioner = Conditioner(bundle, self._executor)
        self._vae = Vae(bundle.manifest, self._executor)
        self._scheduler: dict[str, Any] = json.loads(bundle.file("scheduler.json").read_text())
        self.plan = lru_cache(_KEPT_LAYOUTS)(Planner(bundle.manifest).plan)
        """The plan of a layout: laying one out takes milliseconds, and calls have much in common."""
        self._bound: OrderedDict[Layout, BoundPlan] = OrderedDict()
        self._lock = threading.Lock()
        self._drawing: int | None = None
        """The thread whose call runs."""

    @classmethod
    def load(
        cls, path: str | Path, *, threads: int | None = None, device: int | None = None, verify: bool = True
    ) -> Self:
        """Opens the bundle at ``path`` and all programs that drawing needs.

        Args:
            path: bundle directory, as written by ``build-engines``.
            threads: CPU threads per program; all cores by default.
            device: which GPU, as CUDA counts them, for a bundle that runs on one; the first where not given.
            verify: compare every file with its SHA-256 first. Leave it on unless the place is trusted.

        Raises:
            BundleError: the bundle is missing, damaged or of another schema version.
            DeviceError: it runs on a GPU, and there is none.
            ParameterError: threads that no CPU has, or a GPU for a bundle that runs on the CPU.
        """
        pipeline = cls(Bundle.open(path, verify=verify), threads=threads, device=device)
        manifest = pipeline.bundle.manifest
        fused = manifest.fusion.controls if manifest.fusion else ()
        rare = {"unet", *(control.part for control in manifest.controls if control.name in fused)} if fused else set()
        for program in manifest.programs:
            if program.part not in rare and not program.part.startswith(ON_FIRST_USE):
                pipeline._executor.load(program.name)
        return pipeline

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the bundle's ControlNets and T2I-Adapters; of a ControlNet Union, NAME.TYPE for each type."""
        return tuple(name for control in self.bundle.manifest.controls for name in control.names)

    @property
    def ip_adapters(self) -> tuple[str, ...]:
        """Names of the bundle's IP-Adapters."""
        return tuple(adapter.name for adapter in self.bundle.manifest.ip_adapters)

    def load_textual_inversion(self, file: str | Path, token: str) -> None:
        """Lets ``token`` in prompts stand for what a ``.safetensors`` file of a textual inversion learned.

        Raises:
            SourceError: a file that cannot be read or was made for another model.
            ParameterError: a token that the vocabulary has already.
        """
        with self._lock:
            self._conditioner.prompts.load_textual_inversion(Path(file), token)

    def sampler_table(
        self,
        scheduler: SchedulerChoice | None = None,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        strength: float | None = None,
    ) -> SamplerTable:
        """The table that a call with these arguments runs; one row per model call. See ``compile_sampler``."""
        if num_inference_steps is None and timesteps is None and sigmas is None:
            num_inference_steps = DEFAULT_STEPS
        return compile_sampler(
            scheduler,
            self._scheduler,
            num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            strength=strength,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Pictures | Mapping[str, Pictures] | None = None,
        *,
        ip_adapter_image: ImagePrompts | None = None,
        ip_adapter_scale: ImageScale = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_syntax: Syntax = "plain",
        clip_skip: int | None = None,
        init_image: Picture | Sequence[Picture] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        controlnet_conditioning_scale: PerControlScale = 1.0,
        control_guidance_start: PerControl = 0.0,
        control_guidance_end: PerControl = 1.0,
        control_mode: str | Sequence[str] | Mapping[str, str] = "balanced",
        control_layer_weights: LayerWeights | Mapping[str, LayerWeights | None] | None = None,
        control_region: Picture | Mapping[str, Picture] | None = None,
        guess_mode: GuessMode = False,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        noise: Literal["cpu", "gpu"] = "cpu",
        num_images_per_prompt: int = 1,
        latents: NDArray[np.float32] | None = None,
        scheduler: SchedulerChoice | None = None,
        resize: Resize | None = None,
        vae_tiling: bool = False,
        callback_on_step_end: StepCallback | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
    ) -> PipelineOutput:
        """Draws ``len(prompt) * num_images_per_prompt`` pictures.

        Args:
            prompt: one prompt or a list.
            image: control pictures by control name, for a ControlNet Union by NAME.TYPE, such as ``union.depth``; a
                bare picture where the bundle has one control; None for no control. A list gives one picture per prompt.
                PIL, uint8 or float arrays (height, width[, channels]).
            ip_adapter_image: pictures as prompts, where the bundle has IP-Adapters: a picture or several that the only
                one is shown at once; a list of that for each adapter, or a mapping by name. None draws without.
            ip_adapter_scale: how strongly they act, 0 to 10; one for all adapters, a list with one for each, or a
                mapping by name. Each may be a curve, as a control's, or an array (steps, pictures, cross-attentions).
            negative_prompt: what to steer away from, one or one per prompt.
            prompt_syntax: "plain", or "webui" for weights in brackets as the web UI has them; see docs/prompts.md.
            clip_skip: how many of the text encoders' last layers are left out; for the negative prompt in the web UI's
                syntax alone, as it and diffusers have it.
            init_image: a picture to start from (picture to picture), one or one per prompt; or latents, an array of
                four axes.
            mask_image: where that picture is drawn anew, white on black (inpainting), one or one per prompt.
            strength: how much of the picture is changed: the fraction of the steps that is run. 0.8 where not given, 1
                with a mask.
            width, height: pixels, within the bundle's profile; its default size where not given.
            num_inference_steps: denoising steps, 1 to 1000; 50 where not given. Second-order samplers call the model
                twice a step.
            timesteps, sigmas: custom ones, descending, in place of a number of steps, for samplers that take them.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); 1 or less turns it off. A
                consistency model is told it instead, whatever it is, and draws without a negative prompt.
            guidance_rescale: how far the guided output gets the standard deviation of the conditional one, 0 to 1 (Lin
                et al. 2023, arXiv 2305.08891).
            guidance_start, guidance_end: the fractions of the steps between which guidance acts (Kynkäänniemi et al.
                2024, arXiv 2404.07724); outside, a step runs the conditional rows alone and costs half.
            controlnet_conditioning_scale: one for all controls, a list in the order of ``image``, or a mapping by name.
                Each is a number, a function of the fraction of the steps that are done, a list with one number per step
                (inside a mapping or a list), or an array that broadcasts to (steps, pictures, layers).
            control_guidance_start, control_guidance_end: the window, in fractions of the steps; one number for all
                controls, a list or a mapping likewise.
            control_mode: as in the web UI's extension: "balanced"; "prompt", control weaker in the outer layers; or
                "controlnet", that and control of the conditional half only. For all controls, a list or a mapping.
            control_layer_weights: one number for each residual of a ControlNet, the middle block's last, or "soft",
                0.825 to the power of 12 - i for residual i. For all controls, or a mapping by name.
            control_region: where control acts, a picture, white on black; for all controls, or a mapping by name.
            guess_mode: control acts on the conditional half only and rises over the layers: True or "diffusers" from
                0.1 to 1 on a log scale, "original" as the soft weights do.
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
            vae_tiling: let a picture that is larger than the bundle's VAE takes go through it in tiles that overlap, as
                diffusers' ``enable_vae_tiling`` has it (``build-engines --vae-tile``).
            callback_on_step_end: called as in diffusers with (pipeline, step, timestep, {"latents": array}); may return
                a mapping with new "latents".
            output_type: "pil", "np" for (batch, height, width, 3) float32 in [0, 1], or "latent".

        Raises:
            UserError: one of its kinds for each argument that cannot be; nothing has run then.
            NotFiniteError: what was drawn is no picture; latents are given as they are.
        """
        if output_type not in ("pil", "np", "latent"):
            raise ParameterError("output_type", output_type, "pil, np or latent")
        drawing = self.prepare(
            prompt,
            image,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_scale=ip_adapter_scale,
            negative_prompt=negative_prompt,
            prompt_syntax=prompt_syntax,
            clip_skip=clip_skip,
            init_image=init_image,
            mask_image=mask_image,
            strength=strength,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=control_guidance_start,
            control_guidance_end=control_guidance_end,
            control_mode=control_mode,
            control_layer_weights=control_layer_weights,
            control_region=control_region,
            guess_mode=guess_mode,
            eta=eta,
            seed=seed,
            noise=noise,
            num_images_per_prompt=num_images_per_prompt,
            latents=latents,
            scheduler=scheduler,
            resize=resize,
            vae_tiling=vae_tiling,
        )
        with self._lock:
            started = time.perf_counter()
            bound = self._bind(drawing.layout)
            bound_at = time.perf_counter()
            conditioned = self._fill(drawing, bound.plan, bound.buffers)
            prepared = time.perf_counter()
            self._drawing = threading.get_ident()
            try:
                after_step = self._after_step(drawing.table, callback_on_step_end)
                decodes, tiles = output_type != "latent", self._vae.tile is not None
                ran = bound.run(decode=decodes and not tiles, after_step=after_step)
                ran_at = time.perf_counter()
                if output_type != "latent":
                    check_finite(ran.latents)
                tiled = self._vae.decode(ran.latents) if decodes and tiles else None
                decoded_at = time.perf_counter()
            finally:
                self._drawing = None
        pictures = ran.pictures if tiled is None else tiled
        images = ran.latents if pictures is None else pictures
        seed = drawing.seed
        return PipelineOutput(
            images=to_pil(images) if output_type == "pil" else images,
            seed=tuple(seed) if isinstance(seed, Sequence) else seed,
            timings=Timings(
                bind=bound_at - started,
                condition=conditioned - bound_at,
                noise=prepared - conditioned,
                steps=ran.steps,
                host=ran.host,
                decode=ran.decode if tiled is None else decoded_at - ran_at,
            ),
        )

    def prepare(
        self,
        prompt: str | Sequence[str],
        image: Pictures | Mapping[str, Pictures] | None = None,
        *,
        ip_adapter_image: ImagePrompts | None = None,
        ip_adapter_scale: ImageScale = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_syntax: Syntax = "plain",
        clip_skip: int | None = None,
        init_image: Picture | Sequence[Picture] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        controlnet_conditioning_scale: PerControlScale = 1.0,
        control_guidance_start: PerControl = 0.0,
        control_guidance_end: PerControl = 1.0,
        control_mode: str | Sequence[str] | Mapping[str, str] = "balanced",
        control_layer_weights: LayerWeights | Mapping[str, LayerWeights | None] | None = None,
        control_region: Picture | Mapping[str, Picture] | None = None,
        guess_mode: GuessMode = False,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        noise: Literal["cpu", "gpu"] = "cpu",
        num_images_per_prompt: int = 1,
        latents: NDArray[np.float32] | None = None,
        scheduler: SchedulerChoice | None = None,
        resize: Resize | None = None,
        vae_tiling: bool = False,
    ) -> Drawing:
        """Checks a call and lays it out; runs nothing. Arguments and errors are those of a call."""
        manifest = self.bundle.manifest
        prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ParameterError("prompt", prompt, "a string or a list of at least one")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ParameterError("num_images_per_prompt", num_images_per_prompt, "a whole number of at least 1")
        if not isinstance(guidance_scale, (int, float)) or not is_float32(guidance_scale):
            raise ParameterError("guidance_scale", guidance_scale, "a finite number of float32")
        told = manifest.time_cond_proj_dim is not None
        for name, value, whole in (("guidance_start", guidance_start, 0), ("guidance_end", guidance_end, 1)):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ParameterError(name, value, "a fraction of the steps, from 0 to 1")
            if told and value != whole:
                raise ParameterError(name, value, f"{whole}: a consistency model has its guidance at every step")
        check_window("guidance", guidance_start, guidance_end)
        if not is_number(guidance_rescale) or not 0 <= guidance_rescale <= 1:
            raise ParameterError("guidance_rescale", guidance_rescale, "a number from 0 to 1")
        default_width, default_height = manifest.profile.default_size
        width = default_width if width is None else width
        height = default_height if height is None else height
        batch = len(prompts) * num_images_per_prompt
        manifest.profile.check(width, height, batch)
        if resize is not None:
            with about("resize"):
                resize_named(resize)
        check_vae_tiling(manifest.profile, width, height, vae_tiling)
        source = read_source(
            init_image,
            mask_image,
            strength=strength,
            latents=self._latent_shape(batch, width, height),
            width=width,
            height=height,
            prompts=len(prompts),
            resize=resize,
        )
        inpaints = source is not None and source.masks is not None
        if self.sees_mask and not inpaints:
            raise ParameterError("mask_image", None, "given, with init_image: this model was made for inpainting")
        strength = run_strength(source is not None, inpaints, strength)
        table = self.sampler_table(
            scheduler,
            num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            strength=strength,
        )
        uses = resolve_controls(
            manifest.controls,
            image,
            Guidance(
                scale=controlnet_conditioning_scale,
                start=control_guidance_start,
                end=control_guidance_end,
                mode=control_mode,
                weights=control_layer_weights,
                region=control_region,
                guess_mode=guess_mode,
            ),
            steps=len(table),
            width=width,
            height=height,
            prompts=len(prompts),
            images_per_prompt=num_images_per_prompt,
            resize=resize,
        )
        image_prompts = resolve_image_prompts(
            manifest.ip_adapters, ip_adapter_image, ip_adapter_scale, steps=len(table), batch=batch
        )
        negatives = self._negatives(negative_prompt, len(prompts))
        if prompt_syntax not in SYNTAXES:
            with about("prompt_syntax"):
                raise UnknownNameError("prompt syntax", str(prompt_syntax), SYNTAXES)
        read = prompts if told else [*prompts, *negatives]
        encoding = self._conditioner.prompts.encoding(read, prompt_syntax, clip_skip)
        draws_later = bool(table.draws.any())
        if seed is None and (latents is None or draws_later):
            seed = secrets.randbits(32)
        draws = Draws(0 if seed is None else seed, batch, noise)
        latents = self._checked_latents(latents, batch, width, height)
        count = len(table)
        adapters = [use for use in uses if use.control.kind == "adapter"]
        nets = [use for use in uses if use.control.kind == "controlnet"]
        layout = Layout(
            width=width,
            height=height,
            batch=batch,
            tokens=CHUNK_TOKENS * encoding.chunks,
            images=tuple(max(1, len(prompt.digests)) for prompt in image_prompts),
            draws=draws_later,
            steps=tuple(
                StepLayout(
                    controls=tuple(use.control.name for use in nets if use.active(step)),
                    conditional=tuple(use.control.name for use in nets if use.active(step) and use.conditional),
                    adapters=tuple(use.control.name for use in adapters if use.active(step)),
                    mixtures=tuple(
                        (use.control.name, number)
                        for use in nets
                        if use.active(step) and (number := use.mixtures.index(use.mixture(step)))
                    ),
                    guided=guidance_scale > 1 and not told and in_window(step, count, guidance_start, guidance_end),
                )
                for step in range(count)
            ),
        )
        conditional: list[Prompt] = [(text, encoding) for text in prompts for _ in range(num_images_per_prompt)]
        unconditional = [(text, encoding.of_negatives) for text in negatives for _ in range(num_images_per_prompt)]
        return Drawing(
            layout=layout,
            table=table,
            uses=tuple(uses),
            image_prompts=tuple(image_prompts),
            prompts=(*unconditional, *conditional) if layout.guided else tuple(conditional),
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            source=source,
            pure_noise=strength is None,
            latents=latents,
            draws=draws,
            seed=seed,
        )

    def fill(self, drawing: Drawing, plan: Plan, buffers: MutableMapping[str, NDArray[Any]]) -> None:
        """Runs what comes before the first step, and writes a drawing into the buffers of its plan."""
        with self._lock:
            self._fill(drawing, plan, buffers)

    def _fill(self, drawing: Drawing, plan: Plan, buffers: MutableMapping[str, NDArray[Any]]) -> float:
        """See ``fill``; returns the moment when text encoders and the like had run."""
        layout = drawing.layout
        self._conditioner.fill(
            plan,
            buffers,
            prompts=drawing.prompts,
            timesteps=drawing.table.timesteps.astype(np.float32),
            uses=drawing.uses,
            image_prompts=drawing.image_prompts,
            unconditional=layout.batch if layout.guided else 0,
            size=(layout.width, layout.height),
            guidance_scale=drawing.guidance_scale,
        )
        conditioned = time.perf_counter()
        canvas = prepare_canvas(
            self.bundle.manifest.model,
            drawing.source,
            drawing.table,
            drawing.draws,
            self._vae.encode,
            self._latent_shape(layout.batch, layout.width, layout.height),
            drawing.latents,
            pure_noise=drawing.pure_noise,
            sees_mask=self.sees_mask,
        )
        fill_buffers(buffers, drawing, canvas)
        return conditioned

    def _after_step(self, table: SamplerTable, callback: StepCallback | None) -> AfterStep | None:
        """The caller's callback, for one step of a plan."""
        if callback is None:
            return None

        def after_step(step: int, latents: NDArray[np.float32]) -> NDArray[np.float32] | None:
            returned = callback(self, step, float(table.timesteps[step]), {"latents": latents})
            return None if not returned else returned.get("latents")

        return after_step

    def close(self) -> None:
        """Releases sessions and buffers, when a call of another thread is done; safe to call twice. On a CPU, what
        ONNX Runtime worked in stays with the process, for the next sessions.

        Raises:
            ControlRTError: called from within a callback.
        """
        if self._drawing == threading.get_ident():
            raise ControlRTError("close() from a callback would free what the call draws with; close after the call")
        with self._lock:
            for bound in self._bound.values():
                bound.close()
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

    @property
    def sees_mask(self) -> bool:
        """Whether the UNet was made for inpainting."""
        unet = self.bundle.manifest.stage("unet", "step")
        return unet is not None and any(spec.name == "inpaint" for spec in unet.inputs)

    def _latent_shape(self, batch: int, width: int, height: int) -> tuple[int, ...]:
        model = self.bundle.manifest.model
        return batch, model.latent_channels, height // model.vae_scale_factor, width // model.vae_scale_factor

    def _checked_latents(
        self, latents: NDArray[np.float32] | None, batch: int, width: int, height: int
    ) -> NDArray[np.float32] | None:
        if latents is None:
            return None
        shape = self._latent_shape(batch, width, height)
        if not isinstance(latents, np.ndarray) or latents.shape != shape or not np.isfinite(latents).all():
            found = f"shape {latents.shape}" if isinstance(latents, np.ndarray) else type(latents).__name__
            raise ParameterError("latents", found, f"an array of finite values of shape {shape}")
        return latents.astype(np.float32)

    def encode(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """The mean of the latents of a picture (1, height, width, 3) in [0, 1]: (1, channels, height/8, width/8)."""
        with self._lock:
            return self._vae.encode(picture)[0]

    def _bind(self, layout: Layout) -> BoundPlan:
        """The bound plan of ``layout``; the last few are kept."""
        if layout not in self._bound:
            plan, decodes = self.plan(layout), self._vae.tile is None
            while len(self._bound) >= _KEPT_PLANS:
                self._bound.popitem(last=False)[1].close()
            while True:
                try:
                    beside = tuple(reversed(self._bound.values()))
                    self._bound[layout] = self._executor.bind(plan, decodes=decodes, beside=beside)
                    break
                except DeviceMemoryError:
                    if not self._bound:
                        raise
                    self._bound.popitem(last=False)[1].close()  # its memory may be enough
        self._bound.move_to_end(layout)
        self._bound[layout].settle()
        return self._bound[layout]
