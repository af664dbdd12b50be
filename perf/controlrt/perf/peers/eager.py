"""diffusers' own ControlNet pipelines in PyTorch: eager, or with their networks compiled by torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from controlrt.perf.peers.drawer import CallSeconds, Drawn
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
        if self._device.type == "cuda":
            _tune(precision, compile_mode)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._pipeline = _load(resolve(model, "model"), controlnets, xl, self._dtype).to(self._device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._boundaries = _Boundaries(on_gpu=self._device.type == "cuda")
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

        self._synchronize()
        self._boundaries.clear()
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
        total = perf_counter() - started
        self._synchronize()
        return Drawn(
            pictures=np.asarray(pictures, np.float32), latents=latents, seconds=self._boundaries.seconds(total)
        )

    def _prepare(self, channels_last: bool, compile_mode: str | None) -> None:
        pipeline = self._pipeline
        nets = getattr(pipeline.controlnet, "nets", [pipeline.controlnet])
        networks = [*nets, pipeline.unet, pipeline.vae.decoder]
        for network in networks:
            network.eval().requires_grad_(False)
            if channels_last:
                network.to(memory_format=torch.channels_last)
            if compile_mode is not None:
                network.forward = torch.compile(network.forward, mode=compile_mode, dynamic=False, fullgraph=True)
        for network in (*nets, pipeline.unet):
            network.forward = self._boundaries.network(network.forward)
        pipeline.encode_prompt = self._boundaries.stage("text", pipeline.encode_prompt)
        pipeline.prepare_image = self._boundaries.stage("hint", self._laid_out(pipeline.prepare_image))

    def _use_sampler(self, name: str) -> None:
        sampler, options = find_sampler(name)
        kind = getattr(diffusers, sampler.name)
        self._pipeline.scheduler = kind.from_config(self._pipeline.scheduler.config, **options)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _laid_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*args, **kwargs).contiguous(memory_format=self._layout)


def _tune(precision: str, compile_mode: str | None) -> None:
    """Settings of the process, as diffusers' guide to speed gives them for a GPU.

    Float32 is the measure of all pictures, so nothing of it is rounded to TensorFloat-32, which PyTorch's convolutions
    are unless they are told otherwise.
    """
    exact = precision == "fp32"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = not exact
    torch.set_float32_matmul_precision("highest" if exact else "high")
    if compile_mode is not None:
        import torch._inductor.config as inductor

        inductor.conv_1x1_as_mm = True


@dataclass(frozen=True)
class _Mark:
    """A moment on the host, and on a GPU the same place in the stream of its work."""

    host: float
    event: Any = None

    def until(self, later: _Mark) -> float:
        """Seconds from here to there, by the GPU's clock where there is one. Its work must be done by now."""
        if self.event is None:
            return later.host - self.host
        return float(self.event.elapsed_time(later.event)) / 1000


class _Boundaries:
    """When stages and steps begin and end, seen from the networks and diffusers' callback.

    On a GPU the host only queues work and runs ahead of it, and nothing here waits: events mark the stream, and are
    read when the picture is there.

    Args:
        on_gpu: whether work is queued on a GPU.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.clear()

    def clear(self) -> None:
        """Before a call."""
        self._begun = self.mark()
        self._stages: dict[str, list[tuple[_Mark, _Mark]]] = {}
        self._ends: list[_Mark] = []
        self._first: _Mark | None = None
        self._networks: list[float] = []
        self._in_step = 0.0

    def mark(self) -> _Mark:
        """Now."""
        if not self._on_gpu:
            return _Mark(perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return _Mark(perf_counter(), event)

    def stage(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, marked as part of a stage before the loop."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begun = self.mark()
            result = function(*args, **kwargs)
            self._stages.setdefault(name, []).append((begun, self.mark()))
            return result

        return run

    def network(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward``, its seconds on the host counted; the first one marks the beginning of the first step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._first is None:
                self._first = self.mark()
            started = perf_counter()
            if self._in_step == 0.0:
                torch.compiler.cudagraph_mark_step_begin()
            result = forward(*args, **kwargs)
            self._in_step += perf_counter() - started
            return result

        return run

    def end_step(self) -> None:
        """Diffusers' callback: the step's last launch is out."""
        self._ends.append(self.mark())
        self._networks.append(self._in_step)
        self._in_step = 0.0

    def seconds(self, total: float) -> CallSeconds:
        """What the stages of a call took, once its work is done.

        Args:
            total: seconds of the whole call on the host's clock.
        """
        marks = [self._begun if self._first is None else self._first, *self._ends]
        pairs = list(itertools.pairwise(marks))
        steps = tuple(begun.until(ended) for begun, ended in pairs)
        in_networks = [0.0] * len(pairs) if self._on_gpu else self._networks  # queueing them is the host's work too
        host = tuple(b.host - a.host - busy for (a, b), busy in zip(pairs, in_networks, strict=True))
        return CallSeconds(
            text=self._of("text"),
            hint=self._of("hint"),
            timestep_table=0.0,
            steps=steps,
            host_steps=host,
            host=sum(host),
            decode=total - self._begun.until(marks[-1]),
            total=total,
        )

    def _of(self, stage: str) -> float:
        return sum(begun.until(ended) for begun, ended in self._stages.get(stage, []))


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
