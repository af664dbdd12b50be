"""diffusers' own ControlNet pipelines in PyTorch: eager, or with their networks compiled by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from controlrt.export.checkpoint import resolve
from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.drawer import CallSeconds, Drawn, Stopwatch
from controlrt.runtime.samplers.names import find_sampler

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EagerDrawer:
    """See ``Drawer``.

    Networks are tuned as diffusers' guide to speed says: inference mode, scaled dot product attention (its default),
    channels last and torch.compile where asked for, the VAE's decoder with them.

    Args:
        model: diffusers folder, single file or hub id.
        controlnets: the same, by name, in the order of the calls' controls.
        xl: whether it is Stable Diffusion XL.
        precision: ``fp32``, ``fp16`` or ``bf16``, of weights and activations.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads.
        channels_last: whether convolutions get memory with channels last.
        compile_mode: torch.compile's mode; not compiled where None.
    """

    def __init__(
        self,
        model: str,
        controlnets: Mapping[str, str],
        *,
        xl: bool,
        precision: str,
        device: str,
        threads: int,
        channels_last: bool,
        compile_mode: str | None,
    ) -> None:
        for library in (diffusers, transformers):
            library.logging.set_verbosity_error()
            library.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._device, self._dtype = torch.device(device), DTYPES[precision]
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no CUDA device here")
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._pipeline = _load(resolve(model, "model"), controlnets, xl, self._dtype).to(self._device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._watch, self._boundaries = Stopwatch(), _Boundaries(self._synchronize, queues=self._device.type == "cuda")
        self._prepare(channels_last, compile_mode)

    def draw(self, call: Call, record: bool) -> Drawn:
        """See ``Drawer``."""
        pipeline = self._pipeline
        self._use_sampler(call.sampler)
        hints = [torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()) for pictures in call.hints().values()]
        noise = torch.from_numpy(call.latents(pipeline.unet.config.in_channels, pipeline.vae_scale_factor))
        latents: list[NDArray[np.float32]] = []

        def after_step(_: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
            self._boundaries.end_step()
            if record:
                latents.append(given["latents"].float().cpu().numpy())
            return {}

        self._watch.seconds.clear()
        self._boundaries.clear()
        self._synchronize()
        started = perf_counter()
        with torch.inference_mode():
            pictures = pipeline(
                call.prompts,
                image=hints if len(hints) > 1 else hints[0],
                width=call.width,
                height=call.height,
                num_inference_steps=call.steps,
                guidance_scale=call.guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in call.seeds],
                latents=noise.to(self._device, self._dtype),
                callback_on_step_end=after_step,
                output_type="np",
            ).images
        done = perf_counter()
        return Drawn(
            pictures=np.asarray(pictures, np.float32),
            latents=latents,
            seconds=CallSeconds(
                text=self._watch.of("text"),
                hint=self._watch.of("hint"),
                timestep_table=0.0,
                steps=tuple(self._boundaries.steps),
                host_steps=tuple(self._boundaries.host_steps),
                decode=done - self._boundaries.ended,
                total=done - started,
            ),
        )

    def peak_device_bytes(self) -> int | None:
        """See ``Drawer``."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    def _prepare(self, channels_last: bool, compile_mode: str | None) -> None:
        pipeline = self._pipeline
        nets = getattr(pipeline.controlnet, "nets", [pipeline.controlnet])
        networks = [*nets, pipeline.unet, pipeline.vae.decoder]
        for network in networks:
            network.eval().requires_grad_(False)
            if channels_last:
                network.to(memory_format=torch.channels_last)
            if compile_mode is not None:
                network.forward = torch.compile(network.forward, mode=compile_mode, dynamic=False)
        for network in (*nets, pipeline.unet):
            network.forward = self._boundaries.network(network.forward)
        pipeline.encode_prompt = self._watch.timed("text", self._synchronized(pipeline.encode_prompt))
        pipeline.prepare_image = self._watch.timed("hint", self._synchronized(self._laid_out(pipeline.prepare_image)))

    def _use_sampler(self, name: str) -> None:
        sampler, options = find_sampler(name)
        kind = getattr(diffusers, sampler.name)
        self._pipeline.scheduler = kind.from_config(self._pipeline.scheduler.config, **options)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _synchronized(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._synchronize()
            return result

        return run

    def _laid_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*args, **kwargs).contiguous(memory_format=self._layout)


class _Boundaries:
    """When steps begin and end, seen from the networks and diffusers' callback.

    Args:
        synchronize: waits for the device.
        queues: whether the host only queues work, so that its time is all until the step is queued.
    """

    def __init__(self, synchronize: Callable[[], None], *, queues: bool) -> None:
        self._synchronize, self._queues = synchronize, queues
        self.clear()

    def clear(self) -> None:
        """Before a call."""
        self.steps: list[float] = []
        self.host_steps: list[float] = []
        self.ended = 0.0
        self._begun: float | None = None
        self._networks = 0.0

    def network(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward``, its seconds counted as the network's; the first of a step marks its beginning."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            if self._begun is None:
                self._begun = started
            if self._networks == 0.0:
                torch.compiler.cudagraph_mark_step_begin()
            result = forward(*args, **kwargs)
            self._networks += perf_counter() - started
            return result

        return run

    def end_step(self) -> None:
        """Diffusers' callback: the step's last launch is out."""
        queued = perf_counter()
        self._synchronize()
        self.ended = perf_counter()
        begun = self.ended if self._begun is None else self._begun
        self.steps.append(self.ended - begun)
        self.host_steps.append(queued - begun - (0.0 if self._queues else self._networks))
        self._begun, self._networks = self.ended, 0.0


def _load(model: Path, controlnets: Mapping[str, str], xl: bool, dtype: torch.dtype) -> Any:
    """diffusers' ControlNet pipeline for a resolved checkpoint, as its documentation loads it."""
    nets = [_load_controlnet(resolve(source, "ControlNet"), dtype) for source in controlnets.values()]
    kind = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    options: dict[str, Any] = {"controlnet": nets if len(nets) > 1 else nets[0], "torch_dtype": dtype}
    if xl:
        options["add_watermarker"] = False
    else:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if model.is_file():
        return kind.from_single_file(str(model), **options)
    return kind.from_pretrained(model, **options, **_variant(model / "unet"))


def _load_controlnet(path: Path, dtype: torch.dtype) -> Any:
    if path.is_file():
        return diffusers.ControlNetModel.from_single_file(str(path), torch_dtype=dtype)
    return diffusers.ControlNetModel.from_pretrained(path, torch_dtype=dtype, **_variant(path))


def _variant(folder: Path) -> dict[str, Any]:
    """No network, and the fp16 files where a folder has no others."""
    weights = [file.name for file in folder.glob("*.safetensors")]
    only_half = bool(weights) and all(".fp16." in name for name in weights)
    return {"local_files_only": True, **({"variant": "fp16"} if only_half else {})}
