"""A bundle of ours, drawn from by its own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.drawer import CallSeconds, Drawn, Stopwatch
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.pipeline import Timings

TEXT_STAGES = ("prompt", "prompt_timestep")


class BundleDrawer:
    """See ``Drawer``.

    On a GPU the whole loop is one launch, and nothing may come between its parts: the pipeline's own timings, which are
    of the GPU's clock, are taken as they come.

    Args:
        path: of the bundle.
        threads: CPU threads.
        device: where its backend runs it, ``cpu`` or ``cuda``.
    """

    def __init__(self, path: Path, threads: int, device: str) -> None:
        self._pipeline = ControlNetPipeline.load(path, threads=threads)
        self._watch = Stopwatch()
        self._stages = stages(self._pipeline.bundle.manifest)
        executor = self._pipeline._executor  # nothing public says which program took how long
        self._run, self._bind = executor.run, executor.bind_call
        self._on_gpu = device == "cuda"
        executor.run = self._timed_run  # type: ignore[method-assign]
        if not self._on_gpu:
            executor.bind_call = self._timed_bind  # type: ignore[method-assign]

    def draw(self, call: Call, record: bool) -> Drawn:
        """See ``Drawer``."""
        model = self._pipeline.bundle.manifest.model
        hints = {name: list(pictures) for name, pictures in call.hints().items()}
        noise = call.latents(model.latent_channels, model.vae_scale_factor)
        latents: list[NDArray[np.float32]] = []
        self._watch.seconds.clear()
        self._launches: list[float] = []
        started = perf_counter()
        out = self._pipeline(
            call.prompts,
            hints,
            width=call.width,
            height=call.height,
            num_inference_steps=call.steps,
            guidance_scale=call.guidance_scale,
            scheduler=call.sampler,
            seed=list(call.seeds),
            latents=noise,
            callback_on_step_end=(lambda *given: latents.append(given[3]["latents"])) if record else None,
            output_type="np",
        )
        total = perf_counter() - started
        return Drawn(pictures=out.images, latents=latents, seconds=self._seconds(out.timings, total))

    def _seconds(self, timings: Timings, total: float) -> CallSeconds:
        hint, table = self._watch.of("hint"), self._watch.of("timestep_table")
        if self._on_gpu:
            host = float(getattr(timings, "host", 0.0))
            text, host_steps = timings.condition - hint - table, [host / len(timings.steps)] * len(timings.steps)
        else:
            launches = np.array(self._launches).reshape(len(timings.steps), -1).sum(axis=1)
            text, host_steps = self._watch.of("text"), (np.array(timings.steps) - launches).tolist()
        return CallSeconds(
            text=text,
            hint=hint,
            timestep_table=table,
            steps=timings.steps,
            host_steps=tuple(host_steps),
            host=sum(host_steps),
            decode=timings.decode,
            total=total,
        )

    def _timed_run(self, program: str, inputs: Any) -> Any:
        return self._watch.timed(self._stages.get(program, "other"), self._run)(program, inputs)

    def _timed_bind(self, program: str, inputs: Any, outputs: Any) -> Callable[[], None]:
        launch = self._bind(program, inputs, outputs)

        def timed() -> None:
            started = perf_counter()
            launch()
            self._launches.append(perf_counter() - started)

        return timed


def stages(manifest: Manifest) -> dict[str, str]:
    """Which stage of a call each program that runs before the loop counts for."""
    found = {encoder.program: "text" for encoder in manifest.text_encoders}
    for program in manifest.programs:
        if program.stage in TEXT_STAGES:
            found[program.name] = "text"
        elif program.stage == "timestep":
            found[program.name] = "timestep_table"
        elif program.stage == "hint":
            found[program.name] = "hint"
    return found
