"""Runs the stages before the loop: once per schedule, prompt and control picture, and keeps what they gave.

The compiler has cut from every step what does not depend on the latents (``controlrt.compiler.binding``). Here those
programs run, and their results become bytes in the buffers of a plan. Results are kept by what they depend on, the
least recently used ones dropped first, so a prompt or a schedule that comes again costs nothing.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.control_use import ControlUse
from controlrt.runtime.errors import BundleError
from controlrt.runtime.executors import Executor
from controlrt.runtime.guidance_embedding import embed_guidance_scale
from controlrt.runtime.image_prompts import ImagePrompt
from controlrt.runtime.manifest import IPAdapter, Program, Stage
from controlrt.runtime.plan import Plan, adapter_buffer, stage_buffer
from controlrt.runtime.prompts import Conditioning, Encoding, Prompt, PromptEncoder

KEPT_BYTES = 256 * 2**20
"""How much is kept: some twenty prompts of Stable Diffusion 1.5 with one ControlNet."""

Arrays = dict[str, NDArray[Any]]
PromptKey = tuple[str | None, Encoding, int]
"""A prompt, how it is read, and how many words were learned when it was."""


class Conditioner:
    """Fills a plan's buffers with what its earlier stages compute."""

    def __init__(self, bundle: Bundle, executor: Executor, kept_bytes: int = KEPT_BYTES) -> None:
        self._manifest, self._executor = bundle.manifest, executor
        self.prompts = PromptEncoder(bundle, executor)
        self._kept = _Kept(kept_bytes)

    def fill(
        self,
        plan: Plan,
        buffers: Mapping[str, NDArray[Any]],
        *,
        prompts: Sequence[Prompt],
        timesteps: NDArray[np.float32],
        uses: Sequence[ControlUse],
        image_prompts: Sequence[ImagePrompt] = (),
        unconditional: int = 0,
        size: tuple[int, int],
        guidance_scale: float,
    ) -> None:
        """Writes the outputs of every earlier stage of the plan's parts.

        Args:
            plan, buffers: what reads them.
            prompts: one per row, and how it is read; None is SDXL's empty embedding of zeros.
            timesteps: (steps,).
            uses: the call's controls; of an adapter, the scale of each feature is that of the first step.
            image_prompts: one for each of the bundle's IP-Adapters.
            unconditional: how many of the rows, the first ones, are shown no picture.
            size: width and height of the pictures.
            guidance_scale: what a consistency model is told.
        """
        keys = {prompt: (*prompt, len(self.prompts.embeddings)) for prompt in prompts}
        embeds = {prompt: self._embed(key) for prompt, key in keys.items()}
        by_name = {use.control.name: use for use in uses}
        types = {use.control.part: {"control_types": use.control_types[None]} for use in uses}
        added = self._added_conditioning(size, guidance_scale)
        for part in plan.parts:
            for name, table in self._timestep(part, timesteps).items():
                buffers[stage_buffer(name, part)][...] = table[:, None]  # every picture of a step has its timestep
            for row, prompt in enumerate(prompts):
                for name, value in self._prompt(part, keys[prompt], embeds[prompt]).items():
                    buffers[stage_buffer(name, part)][row] = value[0]
                rows = {**embeds[prompt], **added, **types.get(part, {})}
                for name, value in self._prompt_timestep(part, rows, timesteps).items():
                    buffers[stage_buffer(name, part)][:, row] = value
            self._fill_image_prompts(part, buffers, image_prompts, unconditional)
            self._fill_hints(part, buffers, by_name)
        self._fill_adapters(plan, buffers, by_name)

    def _embed(self, key: PromptKey) -> Conditioning:
        """The prompt's embeddings, one row each."""
        prompt, encoding, _ = key
        return self._kept.get(("embeds", *key), lambda: self.prompts.encode(prompt, encoding))

    def _timestep(self, part: str, timesteps: NDArray[np.float32]) -> Arrays:
        """(steps, ...)."""
        return self._stage(part, "timestep", (timesteps.tobytes(),), lambda: {"timestep": timesteps})

    def _prompt(self, part: str, key: PromptKey, embeds: Conditioning) -> Arrays:
        """(1, ...)."""
        return self._stage(part, "prompt", key, lambda: dict(embeds))

    def _added_conditioning(self, size: tuple[int, int], guidance_scale: float) -> Arrays:
        """What is embedded beside the timestep for every prompt, by name, (1, ...): SDXL's original size, crop corner
        and target size (Podell et al. 2023, arXiv 2307.01952, 2.2), and the guidance scale of a consistency model."""
        width, height = size
        added = {"time_ids": np.array([[height, width, 0, 0, height, width]], np.float32)}
        if (channels := self._manifest.time_cond_proj_dim) is not None:
            added["timestep_cond"] = embed_guidance_scale(guidance_scale, channels)[None]
        return added

    def _prompt_timestep(
        self, part: str, rows: Mapping[str, NDArray[np.float32]], timesteps: NDArray[np.float32]
    ) -> Arrays:
        """(steps, ...), from what is the same at every step, (1, ...) by name: the pooled prompt, a ControlNet Union's
        control types and the added conditioning."""
        program = self._manifest.stage(part, "prompt_timestep")
        if program is None:
            return {}
        read = {spec.name: rows[spec.name] for spec in program.inputs if spec.name != "timestep"}

        def inputs() -> Arrays:
            return {name: row.repeat(len(timesteps), axis=0) for name, row in read.items()} | {"timestep": timesteps}

        key = (timesteps.tobytes(), *(row.tobytes() for row in read.values()))
        return self._stage(part, "prompt_timestep", key, inputs)

    def _fill_image_prompts(
        self, part: str, buffers: Mapping[str, NDArray[Any]], image_prompts: Sequence[ImagePrompt], unconditional: int
    ) -> None:
        """Keys and values of the pictures; zeros, which add nothing to the attention, where there are none at all."""
        program = self._manifest.stage(part, "image")
        if program is None:
            return
        shown = any(prompt.digests for prompt in image_prompts)
        for spec in program.outputs if not shown else ():
            buffers[stage_buffer(spec.name, part)][...] = 0
        for rows, seen in ((slice(unconditional), False), (slice(unconditional, None), True)) if shown else ():
            if not seen and not unconditional:
                continue
            for name, value in self._image(part, image_prompts, seen).items():
                buffers[stage_buffer(name, part)][rows] = value

    def _image(self, part: str, image_prompts: Sequence[ImagePrompt], seen: bool) -> Arrays:
        """(1, ...). Where the pictures are not ``seen``, what guidance leads away from stands in for each."""
        key = tuple(prompt.digests if seen else len(prompt.digests) for prompt in image_prompts)

        def inputs() -> Arrays:
            return {f"ip_embeds.{prompt.adapter.name}": self._image_embeds(prompt, seen) for prompt in image_prompts}

        return self._stage(part, "image", key, inputs)

    def _image_embeds(self, prompt: ImagePrompt, seen: bool) -> NDArray[np.float32]:
        """The tokens of an IP-Adapter's pictures, one after the other: (1, images * tokens, channels)."""
        adapter = prompt.adapter
        if not prompt.digests:
            (spec,) = self._manifest.program(adapter.program).outputs
            return np.zeros((1, *(int(extent) for extent in spec.shape[1:])), np.float32)
        keys = prompt.digests if seen else (None,) * len(prompt.digests)
        pictures = zip(keys, prompt.pictures, strict=True)
        return np.concatenate([self._tokens(adapter, key, picture) for key, picture in pictures], axis=1)

    def _tokens(self, adapter: IPAdapter, digest: bytes | None, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """The tokens of one picture, or where ``digest`` is None of its absence: (1, tokens, channels)."""
        seen = np.full(1, digest is not None, np.float32)

        def make() -> Arrays:
            return self._executor.run(adapter.program, {"picture": picture[None] * seen, "seen": seen})

        return self._kept.get((adapter.program, digest), make)["ip_embeds"]

    def _fill_hints(self, part: str, buffers: Mapping[str, NDArray[Any]], uses: Mapping[str, ControlUse]) -> None:
        """What the ControlNets of a part make of their control pictures: of each mixture of a union, the sum."""
        program = self._manifest.stage(part, "hint")
        if program is None or self._manifest.stage(part, "step") is None:
            return
        mixtures = next((use.mixtures for use in uses.values() if use.control.part == part), ((0,),))
        for number, mixture in enumerate(mixtures):
            made = [self._hint_features(program, uses, place) for place in mixture]
            for picture, features in enumerate(zip(*made, strict=True)):
                for name in features[0]:
                    total = reduce(np.add, (each[name][0] for each in features))
                    buffers[stage_buffer(name, part, number)][picture] = total

    def _fill_adapters(self, plan: Plan, buffers: Mapping[str, NDArray[Any]], uses: Mapping[str, ControlUse]) -> None:
        """The weighted sum of the features of every set of adapters that are on together (diffusers' MultiAdapter)."""
        features, weights = {}, {}
        for name in dict.fromkeys(name for names in plan.adapter_sets for name in names):
            program = self._manifest.stage(f"adapter.{name}", "hint")
            if program is None:
                raise BundleError(f"the bundle has no program of adapter {name}; build it again with build-engines")
            features[name] = self._hint_features(program, uses)
            weights[name] = uses[name].scale[0, 0].astype(np.float32)
        for names in plan.adapter_sets:
            for level in range(len(weights[names[0]])):
                buffer = buffers[adapter_buffer(f"adapter_{level}", names)]
                for picture in range(len(buffer)):
                    buffer[picture] = sum(
                        weights[name][level] * features[name][picture][f"feature_{level}"][0] for name in names
                    )

    def _hint_features(self, program: Program, uses: Mapping[str, ControlUse], place: int = 0) -> list[Arrays]:
        """What a hint program makes of the control pictures at ``place`` of their controls: for each picture that is
        drawn (1, ...) by output name."""
        own = {}
        for spec in program.inputs:
            kind, _, name = spec.name.partition(".")
            own[spec.name] = uses[name or self._control(program.part)].hint_inputs(place)[kind]
        found = []
        for row in zip(*own.values(), strict=True):
            pictures = dict(zip(own, row, strict=True))
            digests = tuple((value.shape, hashlib.sha256(value.tobytes()).digest()) for value in row)
            found.append(self._stage(program.part, "hint", digests, partial(_single, pictures)))
        return found

    def _control(self, part: str) -> str:
        """The control that ``part`` is."""
        return next(control.name for control in self._manifest.controls if control.part == part)

    def _stage(self, part: str, stage: Stage, key: tuple[Any, ...], inputs: Callable[[], Arrays]) -> Arrays:
        program = self._manifest.stage(part, stage)
        if program is None:
            return {}
        return self._kept.get((program.name, *key), lambda: self._run(program, inputs()))

    def _run(self, program: Program, inputs: Arrays) -> Arrays:
        return self._executor.run(program.name, {spec.name: inputs[spec.name] for spec in program.inputs})


class _Kept:
    """Results by key, up to a number of bytes; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._entries: OrderedDict[tuple[Any, ...], Arrays] = OrderedDict()

    def get(self, key: tuple[Any, ...], make: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
        """What is kept under ``key``, made first if need be."""
        if key not in self._entries:
            self._entries[key] = made = dict(make())
            self._bytes += _size(made)
        self._entries.move_to_end(key)
        found = self._entries[key]
        while self._bytes > self._max_bytes and len(self._entries) > 1:
            self._bytes -= _size(self._entries.popitem(last=False)[1])
        return found


def _single(pictures: Arrays) -> Arrays:
    """Batches of one."""
    return {name: value[None] for name, value in pictures.items()}


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
