"""Draw controlled pictures from a bundle."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from controlrt.runtime.canvas import run_strength
from controlrt.runtime.commands import named_values
from controlrt.runtime.commands.control_option import DRAWING_FORM, parse_control
from controlrt.runtime.commands.ip_adapter_option import IMAGE_FORM, parse_images
from controlrt.runtime.errors import UnknownNameError, UserError
from controlrt.runtime.fitting import EXTENSION_MODES, RESIZES, resize_named
from controlrt.runtime.hires import HIRES_STRENGTH, hires_fix
from controlrt.runtime.noise import KINDS as NOISE_KINDS
from controlrt.runtime.pictures import check_picture_path, open_control, open_picture, save_picture
from controlrt.runtime.pipeline import ControlNetPipeline, PipelineOutput
from controlrt.runtime.prompt_syntax import SYNTAXES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt")
    parser.add_argument(
        "--prompt-syntax", choices=SYNTAXES, default="plain", help="webui: weights in brackets, as in (word:1.3)"
    )
    parser.add_argument("--clip-skip", type=int, help="how many of the text encoder's last layers are left out")
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="TOKEN=FILE",
        help="a textual inversion and the word in prompts that stands for it; may be repeated",
    )
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar=DRAWING_FORM,
        help="a control of the bundle and its picture; may be repeated",
    )
    parser.add_argument(
        "--ip-adapter-image",
        action="append",
        default=[],
        metavar=IMAGE_FORM,
        help="a picture as a prompt, for a bundle with an IP-Adapter; may be repeated",
    )
    parser.add_argument("--init", type=Path, metavar="IMAGE", help="a picture to start from: picture to picture")
    parser.add_argument("--mask", type=Path, metavar="IMAGE", help="where it is drawn anew, white on black: inpainting")
    parser.add_argument(
        "--strength", type=float, help="how much of it is changed, 0 to 1; 0.8 where not given, 1 with a mask"
    )
    parser.add_argument(
        "--resize",
        metavar="MODE",
        help=f"how to fit pictures of another size: {', '.join((*RESIZES, *map(repr, EXTENSION_MODES)))}",
    )
    parser.add_argument("--size", metavar="WxH", help="picture size; the bundle's default where not given")
    parser.add_argument(
        "--first-size", metavar="WxH", help="draw at this size first, then from there at --size, changed by --strength"
    )
    parser.add_argument(
        "--vae-tiling",
        action="store_true",
        help="decode a picture that is larger than the VAE takes in tiles that overlap (build-engines --vae-tile)",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument(
        "--guidance-rescale", type=float, default=0.0, help="how far guidance keeps the contrast of the output, 0 to 1"
    )
    parser.add_argument(
        "--guidance-start", type=float, default=0.0, help="fraction of the steps at which guidance begins"
    )
    parser.add_argument(
        "--guidance-end", type=float, default=1.0, help="and at which it ends; without it a step costs half"
    )
    parser.add_argument(
        "--guess-mode",
        nargs="?",
        const="diffusers",
        choices=("diffusers", "original"),
        help="control of the conditional half only, rising over the layers as diffusers or the original code has it",
    )
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help="sampler, such as 'DPM++ 2M Karras' or UniPC (list them: controlrt samplers); the checkpoint's by default",
    )
    parser.add_argument("--eta", type=float, default=0.0, help="noise that DDIM and TCD add at each step, 0 to 1")
    parser.add_argument("--seed", type=int, help="random where not given, and printed")
    parser.add_argument("--noise", choices=NOISE_KINDS, default="cpu", help="PyTorch's generator that the seed is for")
    parser.add_argument("--images", type=int, default=1, help="pictures to draw, numbered where more than one")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores where not given")
    parser.add_argument("--device", type=int, help="which GPU, for a bundle that runs on one (0)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.png"))


def run(arguments: argparse.Namespace) -> int:
    """Draws, writes the pictures and prints the times."""
    started = time.perf_counter()
    check_picture_path(arguments.output)
    controls = [parse_control(text) for text in arguments.control]
    sources = named_values([f"{name}={path}" for name, path, _ in controls], "--control", "NAME=IMAGE")
    embeddings = named_values(arguments.embedding, "--embedding", "TOKEN=FILE")
    width, height = parse_size(arguments.size, "--size") if arguments.size else (None, None)
    first_size = parse_size(arguments.first_size, "--first-size") if arguments.first_size else None
    if first_size is not None and width is None:
        raise UserError("--first-size goes with --size: the size of the picture")
    resize = None if arguments.resize is None else resize_named(arguments.resize)
    with ControlNetPipeline.load(arguments.bundle, threads=arguments.threads, device=arguments.device) as pipeline:
        for name in sources:
            if name not in pipeline.controls:
                raise UnknownNameError("control", name, pipeline.controls, "add it with: build-engines --controlnet")
        for token, file in embeddings.items():
            pipeline.load_textual_inversion(file, token)
        images = {name: open_control(path) for name, path in sources.items()}
        regions = {name: open_picture(options["region"]) for name, _, options in controls if options["region"]}
        start, mask = (None if path is None else open_picture(path) for path in (arguments.init, arguments.mask))
        prompts = parse_images(arguments.ip_adapter_image, pipeline.ip_adapters)
        shown = {name: [open_picture(path) for path in paths] for name, paths in prompts.paths.items()}
        loaded = time.perf_counter()
        draw: Callable[..., PipelineOutput] = pipeline
        if first_size is not None:
            draw = partial(hires_fix, pipeline, first_size=first_size)
        strengths = [run_strength(start is not None, mask is not None, arguments.strength)]
        if first_size is not None:
            strengths = [None, HIRES_STRENGTH if arguments.strength is None else arguments.strength]
        tables = [
            pipeline.sampler_table(arguments.scheduler, arguments.steps, eta=arguments.eta, strength=strength)
            for strength in strengths
        ]
        watched = sys.stderr.isatty()  # steps that nobody sees are one launch on a GPU
        with tqdm(total=sum(map(len, tables)), desc="draw", unit="step", leave=False, disable=not watched) as bar:

            def advance(_: object, __: int, ___: float, ____: dict[str, NDArray[np.float32]]) -> None:
                bar.update()

            output = draw(
                arguments.prompt,
                images or None,
                ip_adapter_image=shown or None,
                ip_adapter_scale=prompts.scales,
                negative_prompt=arguments.negative_prompt,
                prompt_syntax=arguments.prompt_syntax,
                clip_skip=arguments.clip_skip,
                init_image=start,
                mask_image=mask,
                **({} if arguments.strength is None else {"strength": arguments.strength}),
                width=width,
                height=height,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance_scale,
                guidance_rescale=arguments.guidance_rescale,
                guidance_start=arguments.guidance_start,
                guidance_end=arguments.guidance_end,
                guess_mode=arguments.guess_mode or False,
                eta=arguments.eta,
                seed=arguments.seed,
                noise=arguments.noise,
                num_images_per_prompt=arguments.images,
                scheduler=arguments.scheduler,
                resize=resize,
                vae_tiling=arguments.vae_tiling,
                callback_on_step_end=advance if watched else None,
                controlnet_conditioning_scale=_per_control(controls, "scale"),
                control_guidance_start=_per_control(controls, "start"),
                control_guidance_end=_per_control(controls, "end"),
                control_mode=_per_control(controls, "mode"),
                control_layer_weights=_per_control(controls, "weights"),
                control_region=regions,
            )
    paths = numbered(arguments.output, len(output.images))
    for picture, path in zip(output.images, paths, strict=True):
        save_picture(picture, path)
    elapsed = time.perf_counter() - started
    timings = output.timings
    names = ", ".join(str(path) for path in paths)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{names}: seed {output.seed}, {1000 * float(np.median(timings.steps)):.0f} ms per step, "
        f"{timings.total:.2f} s drawn, {loaded - started:.2f} s loading, {elapsed:.2f} s to the first picture, "
        f"peak memory {peak:.0f} MiB"
    )
    return 0


def parse_size(text: str, option: str) -> tuple[int, int]:
    """``768x512``, which ``option`` was given, as width and height."""
    width, _, height = text.partition("x")
    if not (text.isascii() and width.isdigit() and height.isdigit()):
        raise UserError(f"{option} {text!r} is not WIDTHxHEIGHT, such as 512x512")
    return int(width), int(height)


def numbered(path: Path, count: int) -> list[Path]:
    """``out.png`` for one picture, ``out-0.png``, ``out-1.png``, ... for several."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


def _per_control(controls: list[tuple[str, str, dict[str, Any]]], option: str) -> dict[str, Any]:
    return {name: options[option] for name, _, options in controls}
