"""A bundle of ours, drawn from by its own pipeline."""

from __future__ import annotations

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

TEXT_STAGES = ("prompt", "prompt_timestep", "image")


class BundleDrawer:
    """See ``Drawer``.

    Args:
        path: of the bundle.
        threads: CPU threads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._pipeline = ControlNetPipeline.load(path, threads=threads)
        self._watch = Stopwatch()
        self._stages = stages(self._pipeline.bundle.manifest)
        executor = self._pipeline._executor  # nothing public says which program took how long
        self._run = executor.run
        executor.run = self._timed_run  # type: ignore[method-assign]

    def draw(self, call: Call, record: bool) -> Drawn:
        """See ``Drawer``."""
        model = self._pipeline.bundle.manifest.model
        hints = {name: list(pictures) for name, pictures in call.hints().items()}
        noise = call.latents(model.latent_channels, model.vae_scale_factor)
        latents: list[NDArray[np.float32]] = []
        self._watch.seconds.clear()
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
        return CallSeconds(
            text=self._watch.of("text"),
            hint=self._watch.of("hint"),
            timestep_table=self._watch.of("timestep_table"),
            steps=timings.steps,
            host_steps=(timings.host / len(timings.steps),) * len(timings.steps),
            host=timings.host,
            decode=timings.decode,
            total=total,
        )

    def _timed_run(self, program: str, inputs: Any) -> Any:
        return self._watch.timed(self._stages.get(program, "other"), self._run)(program, inputs)


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
