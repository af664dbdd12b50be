"""Two passes for large pictures: composed at the size that the model was trained for, then drawn out (hires fix)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL import Image

from controlrt.runtime.control import Pictures
from controlrt.runtime.errors import ParameterError
from controlrt.runtime.interpolation import resize_bilinear
from controlrt.runtime.pipeline import ControlNetPipeline, PipelineOutput
from controlrt.runtime.vae import check_finite, check_vae_tiling

Upscaler = Literal["latent", "lanczos"]
HIRES_STRENGTH = 0.7
"""How much of the first picture the second pass changes, where nobody says."""


def hires_fix(
    pipeline: ControlNetPipeline,
    prompt: str | Sequence[str],
    image: Pictures | Mapping[str, Pictures] | None = None,
    *,
    first_size: tuple[int, int],
    width: int,
    height: int,
    strength: float = HIRES_STRENGTH,
    upscaler: Upscaler = "latent",
    **options: Any,
) -> PipelineOutput:
    """Draws at ``first_size``, enlarges, and draws again from there at ``width`` x ``height``.

    Args:
        pipeline: of a bundle whose profile has both sizes.
        prompt, image: as the pipeline's. Control pictures of the second size are shrunk for the first pass.
        first_size: width and height of the first pass.
        width, height: of the second.
        strength: how much of the first picture the second pass changes.
        upscaler: "latent" enlarges the latents by bilinear interpolation, "lanczos" the picture.
        options: whatever else the pipeline takes, for both passes.

    Returns:
        The second pass's output; its timings are of that pass alone.

    Raises:
        UserError: as the pipeline; the second size is refused before the first pass is drawn.
    """
    if upscaler not in ("latent", "lanczos"):
        raise ParameterError("upscaler", upscaler, "latent or lanczos")
    for name in ("init_image", "mask_image"):
        if options.get(name) is not None:
            raise ParameterError(name, "a picture", "left out: the second pass starts from the first one's picture")
        options.pop(name, None)
    manifest = pipeline.bundle.manifest
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    manifest.profile.check(width, height, prompts * options.get("num_images_per_prompt", 1))
    check_vae_tiling(manifest.profile, width, height, options.get("vae_tiling", False))
    first = pipeline(
        prompt,
        image,
        width=first_size[0],
        height=first_size[1],
        **{
            **options,
            "resize": options.get("resize") or "stretch",
            "output_type": "latent" if upscaler == "latent" else "pil",
        },
    )
    if upscaler == "latent":
        check_finite(first.images)
    factor = manifest.model.vae_scale_factor
    start: Any = (
        resize_bilinear(first.images, height // factor, width // factor)
        if upscaler == "latent"
        else [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in first.images]
    )
    return pipeline(
        prompt,
        image,
        width=width,
        height=height,
        init_image=start,
        strength=strength,
        **{**options, "seed": first.seed},
    )
