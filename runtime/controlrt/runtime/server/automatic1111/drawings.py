"""What a request of the web UI draws: one call of the pipeline for each iteration, two with hires fix."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageOps

from controlrt.runtime.errors import ParameterError, RequestError, UnknownNameError, UserError
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.samplers import MAX_STEPS
from controlrt.runtime.server.automatic1111.fields import PARAMETERS, Call, Img2Img, Txt2Img
from controlrt.runtime.server.automatic1111.options import Options, find_bundle
from controlrt.runtime.server.automatic1111.repainting import Masking, Repainting, flatten, prepare, read_mask
from controlrt.runtime.server.automatic1111.samplers import Sampling, find_sampling, fraction, steps_for, steps_from
from controlrt.runtime.server.automatic1111.units import (
    Around,
    Controls,
    Pass,
    Unit,
    control_arguments,
    read_units,
)
from controlrt.runtime.server.jobs import Pixels, Request
from controlrt.runtime.server.pictures_io import PictureReader
from controlrt.runtime.server.refusals import renamed
from controlrt.runtime.server.settings import Settings

UPSCALERS: Mapping[str, Image.Resampling] = {
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
    "None": Image.Resampling.LANCZOS,
}
"""What enlarges the picture between the passes of hires fix. Those of the latents are not here."""
SAME = ("", "None", "Use same checkpoint", "Use same sampler", "Use same scheduler")
"""What says that the second pass has the first one's."""
_NETWORK = re.compile(r"<(?P<kind>[A-Za-z_]+):(?P<name>[^:<>]*)(?::(?P<weight>[^:<>]*))?(?::[^<>]*)?>")


@dataclass(frozen=True, kw_only=True)
class Second:
    """The second pass of hires fix."""

    request: Request
    """Without the picture that it starts from."""
    enlarged: tuple[int, int]
    """To what size the first pass's picture is brought; what is more than the second pass's is cut off."""
    resampling: Image.Resampling

    def starting_from(self, pictures: tuple[Pixels, ...]) -> Request:
        """The request, from what the first pass drew."""
        size = (self.request.arguments["width"], self.request.arguments["height"])
        left, top = (self.enlarged[0] - size[0]) // 2, (self.enlarged[1] - size[1]) // 2
        box = (left, top, left + size[0], top + size[1])
        starts = [Image.fromarray(each).resize(self.enlarged, self.resampling).crop(box) for each in pictures]
        return replace(self.request, arguments={**self.request.arguments, "init_image": starts})


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One batch of pictures."""

    seeds: tuple[int, ...]
    first: Request
    second: Second | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A whole request, checked as far as the web UI's fields go."""

    bundle: str
    options: Options
    sampling: Sampling
    iterations: tuple[Iteration, ...]
    units: tuple[Unit, ...] = ()
    repaintings: tuple[Repainting, ...] = ()
    """What is done with the pictures when they are drawn, one of each batch; empty where nothing is."""
    detected: tuple[Image.Image, ...] = ()
    comments: tuple[str, ...] = ()
    extra: Mapping[str, Any] | None = None
    """What the line of parameters says besides, by the web UI's names."""


def read_drawing(
    call: Txt2Img | Img2Img, options: Options, bundles: Mapping[str, Manifest], settings: Settings
) -> Drawing:
    """Reads a request: decodes its pictures and runs annotators, so it is work for a thread.

    Args:
        call: its fields.
        options: what is set.
        bundles: the service's.
        settings: the server's limits.

    Raises:
        RequestError: something that cannot be drawn, naming the field.
    """
    call.refuse()
    reading = _Reading(call, options, bundles, settings)
    return reading.repainted(call) if isinstance(call, Img2Img) else reading.drawn(call)


class _Reading:
    """The reading of one request."""

    def __init__(self, call: Call, options: Options, bundles: Mapping[str, Manifest], settings: Settings) -> None:
        self._call, self._settings, self._bundles = call, settings, bundles
        self._reader = PictureReader(settings.max_pixels)
        """Of all pictures that the request brings."""
        self._options = options.changed(call.override_settings, bundles)
        self._units = read_units(call.alwayson_scripts)
        self._sampling = find_sampling(call.sampler_name or call.sampler_index, call.scheduler, call.eta)
        pictures = call.n_iter * call.batch_size
        if pictures > settings.max_pictures:
            allowed = f"at most {settings.max_pictures} together with batch_size"
            raise RequestError(str(ParameterError("n_iter", call.n_iter, allowed)), "n_iter")
        seed = secrets.randbelow(2**32 - 1) if call.seed == -1 else call.seed
        self._seeds = [
            tuple(seed + first + picture for picture in range(call.batch_size))
            for first in range(0, pictures, call.batch_size)
        ]

    def drawn(self, call: Txt2Img) -> Drawing:
        """Text to image."""
        bundle = self._options.bundle
        self._check_size(bundle, call.width, call.height, "width")
        around = Around(width=call.width, height=call.height, max_pixels=self._settings.max_pixels)
        controls = self._controls(bundle, around, self._reader, "low" if call.enable_hr else None)
        first = self._arguments(bundle, self._sampling, call.prompt, call.negative_prompt, controls)
        second, extra = self._second(call) if call.enable_hr else (None, None)
        return self._drawing(first, controls, second=second, extra=extra)

    def repainted(self, call: Img2Img) -> Drawing:
        """Picture to picture and inpainting."""
        if len(call.init_images) not in (1, call.batch_size):
            found, allowed = f"{len(call.init_images)} pictures", f"one, or batch_size ({call.batch_size})"
            raise RequestError(str(ParameterError("init_images", found, allowed)), "init_images")
        for name, value, known in (
            ("resize_mode", call.resize_mode, "0 (just resize), 1 (crop and resize) or 2 (resize and fill)"),
            ("inpainting_fill", call.inpainting_fill, "0 (fill) or 1 (original)"),
            ("inpainting_mask_invert", call.inpainting_mask_invert, "0 or 1"),
        ):
            if value not in ((0, 1, 2) if name == "resize_mode" else (0, 1)):
                raise RequestError(str(ParameterError(name, value, known)), name)
        bundle = self._options.bundle
        self._check_size(bundle, call.width, call.height, "width")
        pictures = [self._reader.decode_text(each, "init_images") for each in call.init_images]
        mask = self._reader.decode_text(call.mask, "mask") if call.mask else None
        blur = (call.mask_blur_x, call.mask_blur_y) if call.mask_blur is None else (call.mask_blur, call.mask_blur)
        masking = Masking(
            invert=bool(call.inpainting_mask_invert),
            blur=blur,
            filled=call.inpainting_fill == 0,
            alone=call.inpaint_full_res,
            padding=call.inpaint_full_res_padding,
        )
        repaintings = [prepare(each, mask, masking, call.resize_mode, call.width, call.height) for each in pictures]
        around = Around(
            width=call.width,
            height=call.height,
            max_pixels=self._settings.max_pixels,
            picture=flatten(pictures[0]),
            mask=None if mask is None else _unit_mask(mask, pictures[0], invert=masking.invert),
            crop=repaintings[0].crop,
        )
        controls = self._controls(bundle, around, self._reader)
        run = steps_from(call.denoising_strength, call.steps)
        start: dict[str, Any] = {
            "init_image": _one_or_all([each.picture for each in repaintings]),
            "strength": fraction(run, call.steps),
        }
        if all(each.mask is not None for each in repaintings):
            start["mask_image"] = _one_or_all([each.mask for each in repaintings])
        arguments = self._arguments(bundle, self._sampling, call.prompt, call.negative_prompt, controls)
        laid = repaintings if repaintings[0].original is not None else []
        extra: dict[str, Any] = {"Denoising strength": call.denoising_strength}
        if mask is not None:
            extra |= {"Mask blur": blur[0], "Masked content": ("fill", "original")[call.inpainting_fill]}
            extra |= {"Inpaint area": "Only masked"} if masking.alone else {}
        return self._drawing({**arguments, **start}, controls, repaintings=tuple(laid), extra=extra)

    def _second(self, call: Txt2Img) -> tuple[Second, dict[str, Any]]:
        """The second pass of hires fix, and what is said of it."""
        if call.denoising_strength == 0:
            raise RequestError(
                str(ParameterError("denoising_strength", 0, "more than 0 with enable_hr")), "denoising_strength"
            )
        upscaler = call.hr_upscaler or "Lanczos"
        if upscaler not in UPSCALERS:
            hint = "the latents are not enlarged here" if upscaler.startswith("Latent") else ""
            raise RequestError(str(UnknownNameError("hr_upscaler", upscaler, UPSCALERS, hint)), "hr_upscaler")
        enlarged, (width, height) = hires_sizes(call)
        bundle = self._options.bundle
        if call.hr_checkpoint_name not in SAME:
            bundle = find_bundle(call.hr_checkpoint_name, self._bundles, "hr_checkpoint_name")
        self._check_size(bundle, width, height, "hr_resize_x" if call.hr_resize_x or call.hr_resize_y else "hr_scale")
        sampling = self._sampling
        if call.hr_sampler_name not in SAME or call.hr_scheduler not in SAME:
            name = self._sampling.sampler if call.hr_sampler_name in SAME else call.hr_sampler_name
            schedule = self._sampling.schedule if call.hr_scheduler in SAME else call.hr_scheduler
            sampling = find_sampling(name, schedule, call.eta)
        wanted = call.hr_second_pass_steps or call.steps
        steps = steps_for(call.denoising_strength, wanted)
        if steps > MAX_STEPS:
            allowed = f"more: to run {wanted} steps at it takes a schedule of more than {MAX_STEPS}"
            error = ParameterError("denoising_strength", call.denoising_strength, allowed)
            raise RequestError(str(error), "denoising_strength")
        around = Around(width=width, height=height, max_pixels=self._settings.max_pixels)
        again = PictureReader(self._settings.max_pixels)  # the same pictures
        controls = self._controls(bundle, around, again, "high")
        arguments = {
            **self._arguments(
                bundle,
                sampling,
                call.hr_prompt or call.prompt,
                call.hr_negative_prompt or call.negative_prompt,
                controls,
            ),
            "width": width,
            "height": height,
            "num_inference_steps": steps,
            "strength": fraction(wanted, steps),
        }
        with renamed(PARAMETERS):
            self._settings.check({**arguments, "num_inference_steps": wanted})
        extra = {
            "Denoising strength": call.denoising_strength,
            "Hires upscale": call.hr_scale,
            "Hires steps": wanted,
            "Hires upscaler": upscaler,
        }
        request = self._request(bundle, arguments)
        return Second(request=request, enlarged=enlarged, resampling=UPSCALERS[upscaler]), extra

    def _check_size(self, bundle: str, width: int, height: int, field: str) -> None:
        """Refuses a size or a batch that the bundle does not draw, before pictures are brought to it."""
        try:
            self._bundles[bundle].profile.check(width, height, self._call.batch_size)
        except ParameterError as error:
            raise RequestError(f"batch_size: {error}", "batch_size") from None
        except UserError as error:
            raise RequestError(f"{field}: {error}", field) from None

    def _controls(self, bundle: str, around: Around, reader: PictureReader, drawn: Pass | None = None) -> Controls:
        return control_arguments(self._units, self._bundles[bundle], reader, around, drawn)

    def _arguments(
        self, bundle: str, sampling: Sampling, prompt: str, negative_prompt: str, controls: Controls
    ) -> dict[str, Any]:
        """The pipeline's arguments that all calls have, but for the seeds."""
        call = self._call
        arguments = {
            "prompt": strip_networks(prompt, self._bundles[bundle], "prompt"),
            "prompt_syntax": "webui",
            "width": call.width,
            "height": call.height,
            "num_inference_steps": call.steps,
            "guidance_scale": call.cfg_scale,
            "num_images_per_prompt": call.batch_size,
            "scheduler": sampling.scheduler,
            "noise": self._options.noise,
            **controls.arguments,
        }
        if self._bundles[bundle].profile.vae_tile is not None:
            arguments["vae_tiling"] = True  # the web UI has no field for it
        if negative_prompt:  # without one, XL has zeros, as in the web UI
            arguments["negative_prompt"] = strip_networks(negative_prompt, self._bundles[bundle], "negative_prompt")
        if sampling.eta is not None:
            arguments["eta"] = sampling.eta
        if self._options.last_layers > 1:
            arguments["clip_skip"] = self._options.last_layers - 1
        return arguments

    def _request(self, bundle: str, arguments: Mapping[str, Any]) -> Request:
        return Request(arguments=arguments, bundle=bundle, timeout=self._settings.timeout, previews=True)

    def _drawing(
        self,
        arguments: Mapping[str, Any],
        controls: Controls,
        *,
        second: Second | None = None,
        repaintings: tuple[Repainting, ...] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> Drawing:
        with renamed(PARAMETERS):
            self._settings.check(arguments)
        iterations = []
        for seeds in self._seeds:
            seeded = {"seed": list(seeds)}
            following = second and replace(
                second, request=replace(second.request, arguments={**second.request.arguments, **seeded})
            )
            first = self._request(self._options.bundle, {**arguments, **seeded})
            iterations.append(Iteration(seeds=seeds, first=first, second=following))
        return Drawing(
            bundle=self._options.bundle,
            options=self._options,
            sampling=self._sampling,
            iterations=tuple(iterations),
            units=tuple(self._units),
            repaintings=repaintings,
            detected=controls.detected if self._options.show_control else (),
            comments=controls.comments,
            extra=extra,
        )


def hires_sizes(call: Txt2Img) -> tuple[tuple[int, int], tuple[int, int]]:
    """To what size the first picture is brought for the second pass, and the part of it that is drawn."""
    width, height, to = call.width, call.height, (call.hr_resize_x, call.hr_resize_y)
    if to == (0, 0):
        enlarged = (int(width * call.hr_scale), int(height * call.hr_scale))
        return enlarged, enlarged
    by_width = (to[0], to[0] * height // width)
    by_height = (to[1] * width // height, to[1])
    if to[1] == 0:
        return by_width, by_width
    if to[0] == 0:
        return by_height, by_height
    return (by_width if width * to[1] < to[0] * height else by_height), to


def strip_networks(prompt: str, manifest: Manifest, where: str) -> str:
    """The prompt without ``<lora:NAME:WEIGHT>`` of those that are part of the bundle, at their weight.

    Raises:
        RequestError: another network.
    """

    def checked(match: re.Match[str]) -> str:
        kind, name, weight = match["kind"].lower(), match["name"], match["weight"] or "1"
        if kind not in ("lora", "lyco", "hypernet"):
            return match.group()
        for lora in manifest.model.loras if kind != "hypernet" else ():
            if lora.name == name and _number(weight) == lora.weight:
                return ""
        known = ", ".join(f"<lora:{lora.name}:{lora.weight:g}>" for lora in manifest.model.loras) or "none"
        raise RequestError(
            f"{where} has {match.group()}, which is not in the bundle; it was built with: {known}", where
        )

    return _NETWORK.sub(checked, prompt)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _unit_mask(mask: Image.Image, picture: Image.Image, *, invert: bool) -> Image.Image:
    """The mask as units see it: of the picture's size, white where it is drawn anew."""
    read = read_mask(mask).resize(picture.size)
    return ImageOps.invert(read) if invert else read


def _one_or_all(pictures: list[Any]) -> Any:
    return pictures[0] if len(pictures) == 1 else pictures
