"""The plain export in one runtime: its programs as they were traced, launched from a loop on memory bound once."""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.device_programs import DeviceExecutor, HostPrograms, Programs, Tensor
from controlrt.perf.peers.drawer import CallSeconds, Drawn, Stopwatch
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors import HostExecutor, open_host_executor
from controlrt.runtime.manifest import Program, TensorSpec
from controlrt.runtime.prompts import Conditioning, PromptEncoder
from controlrt.runtime.samplers import compile_sampler

Arrays = dict[str, NDArray[Any]]


class PlainDrawer:
    """See ``Drawer``.

    Args:
        exported: what ``controlrt export`` wrote, with the backend that is to run it on a CPU.
        threads: CPU threads.
        device: ``cpu``, or ``cuda`` for ONNX Runtime on a GPU.
    """

    def __init__(self, exported: Bundle, threads: int, device: str) -> None:
        self._manifest = exported.manifest
        self._programs: Programs
        self._executor: HostExecutor | DeviceExecutor
        if device == "cpu":
            host = open_host_executor(exported, threads)
            self._executor, self._programs = host, HostPrograms(host)
        else:
            self._executor = self._programs = DeviceExecutor(exported, device)
        self._prompts = PromptEncoder(exported, self._executor)
        self._scheduler: dict[str, Any] = json.loads(exported.file("scheduler.json").read_text())
        self._loops: dict[tuple[Any, ...], _Loop] = {}
        for program in self._manifest.programs:
            if program.name != "vae_encoder":
                self._executor.load(program.name)

    def draw(self, call: Call, record: bool) -> Drawn:
        """See ``Drawer``."""
        hints = {name: pictures.transpose(0, 3, 1, 2) for name, pictures in call.hints().items()}
        if self._manifest.time_cond_proj_dim is not None:
            raise ValueError("the plain export tells no consistency model its guidance scale")
        model = self._manifest.model
        noise = call.latents(model.latent_channels, model.vae_scale_factor)
        latents: list[NDArray[np.float32]] = []
        watch = Stopwatch()
        started = perf_counter()
        table = compile_sampler(call.sampler, self._scheduler, call.steps)
        if table.draws.any():
            raise ValueError(f"the plain export draws no noise between steps, as sampler {call.sampler} wants")
        conditioning = watch.timed("text", self._encode)(call)
        loop = self._loop(call)
        loop.fill(conditioning, hints, noise * np.float32(table.initial[1]), call)
        steps, host = [], []
        for step in range(len(table)):
            begun = perf_counter()
            loop.set_step(table.timesteps[step], table.input_scale[step], table.update[step], table.clip[step])
            launches = loop.run()
            steps.append(perf_counter() - begun)
            host.append(steps[-1] - launches)
            if record:
                latents.append(loop.latents())
        begun = perf_counter()
        pictures = np.concatenate(
            [self._executor.run("vae_decoder", {"latents": row[None]})["picture"] for row in loop.latents()]
        )
        done = perf_counter()
        return Drawn(
            pictures=pictures,
            latents=latents,
            seconds=CallSeconds(
                text=watch.of("text"),
                hint=0.0,
                timestep_table=0.0,
                steps=tuple(steps),
                host_steps=tuple(host),
                host=sum(host),
                decode=done - begun,
                total=done - started,
            ),
        )

    def _encode(self, call: Call) -> Conditioning:
        """Rows: unconditional, then conditional, as eager diffusers encodes them: each time, and each picture's."""
        negative = self._prompts.encode(None if self._manifest.model.zero_empty_negative else "")
        rows = [negative] * call.batch + [self._prompts.encode(text) for text in call.prompts]
        return {name: np.concatenate([row[name] for row in rows]) for name in negative}

    def _loop(self, call: Call) -> _Loop:
        """The bound loop of a call's sizes; the last one is kept."""
        key = (call.width, call.height, call.batch, call.controls)
        if key not in self._loops:
            self._loops.clear()
            parts = {control.name: control.part for control in self._manifest.controls}
            programs = {name: self._manifest.program(parts[name]) for name in call.controls}
            self._loops[key] = _Loop(programs, self._manifest.program("unet"), call, self._programs)
        return self._loops[key]


class _Loop:
    """Memory for one step, and the launches of ControlNets and UNet on it."""

    def __init__(self, controls: dict[str, Program], unet: Program, call: Call, programs: Programs) -> None:
        self._dims, self._memory = _dimensions(call), programs
        self._tensors: dict[str, Tensor] = {}
        self._launches = []
        read = "zero"
        for name, program in controls.items():
            written = "b" if read == "a" else "a"
            self._launches.append(programs.launcher(program.name, *self._views(program, read, written, name)))
            read = written
        self._launches.append(programs.launcher(unet.name, *self._views(unet, read, read, "")))

    def latents(self) -> NDArray[np.float32]:
        """As they are now, a copy."""
        return np.array(self._tensors["latents"].read(), np.float32)

    def fill(self, conditioning: Conditioning, hints: Arrays, latents: NDArray[np.float32], call: Call) -> None:
        """Writes what holds for all steps."""
        pictures = np.arange(call.batch)
        guidance = np.zeros((call.batch, 2 * call.batch), np.float32)
        guidance[pictures, pictures] = 1 - call.guidance_scale
        guidance[pictures, call.batch + pictures] = call.guidance_scale
        size = np.array([call.height, call.width, 0, 0, call.height, call.width], np.float32)
        values: dict[str, Any] = {
            **conditioning,
            "latents": latents,
            "history": 0.0,
            "rows": np.tile(pictures, 2),
            "guidance": guidance,
            "time_ids": size,
            "noise": 0.0,
            "conditional": np.concatenate([np.zeros((call.batch, call.batch)), np.eye(call.batch)], axis=1),
            "mask": 1.0,
        }
        values |= {f"hint.{name}": hint for name, hint in hints.items()}
        values |= {f"conditioning_scale.{name}": 1.0 for name in hints}
        values |= {name: 1.0 for name in self._tensors if name.startswith("region_")}
        self._write(values)

    def set_step(self, timestep: Any, input_scale: Any, update: Any, clip: Any) -> None:
        """Writes what a step has of its own."""
        self._write({"timestep": timestep, "input_scale": input_scale, "update": update, "clip": clip})

    def run(self) -> float:
        """Runs one step; returns the seconds that the programs took."""
        started = perf_counter()
        for launch in self._launches:
            launch()
        seconds = perf_counter() - started
        for name in ("latents", "history"):
            self._tensors[name].write(self._tensors[f"next_{name}"].read())
        return seconds

    def _write(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name in self._tensors:
                self._tensors[name].write(value)

    def _views(self, program: Program, read: str, written: str, control: str) -> tuple[dict[str, Tensor], ...]:
        inputs = {spec.name: self._tensor(_name(spec, read, control), spec) for spec in program.inputs}
        outputs = {spec.name: self._tensor(_name(spec, written, control), spec) for spec in program.outputs}
        return inputs, outputs

    def _tensor(self, name: str, spec: TensorSpec) -> Tensor:
        if name not in self._tensors:
            shape = tuple(dim if isinstance(dim, int) else self._dims[dim] for dim in spec.shape)
            self._tensors[name] = self._memory.zeros(shape, spec.dtype)
        return self._tensors[name]


def _name(spec: TensorSpec, residuals: str, control: str) -> str:
    """What the tensor is called among the arrays of a loop."""
    if spec.name.startswith("residual_"):
        return f"{spec.name.removesuffix('_in')}.{residuals}"
    return f"{spec.name}.{control}" if spec.name.startswith(("hint", "conditioning_scale", "region_")) else spec.name


def _dimensions(call: Call) -> dict[str, int]:
    found = {"batch": call.batch, "rows": 2 * call.batch, "height": call.height, "width": call.width}
    for power in range(7):
        found |= {f"height/{2**power}": call.height // 2**power, f"width/{2**power}": call.width // 2**power}
    return found
