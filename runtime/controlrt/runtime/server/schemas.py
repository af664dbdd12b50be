"""What the native interface takes and gives, as its OpenAPI document shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from controlrt.runtime.pipeline import DEFAULT_STEPS
from controlrt.runtime.server.jobs import Status
from controlrt.runtime.server.pictures_io import Encoding

PICTURE = {
    "type": "string",
    "contentEncoding": "base64",
    "description": "the bytes of a PNG, JPEG, WebP, BMP or GIF file, in base64 or as a data URL",
}
EXAMPLE_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxz"
    "AAAAFElEQVR4nGP8zwABTAyjjFEGyQwAzx8Bf2TeB3QAAAAASUVORK5CYII="
)
Picture = Annotated[str | bytes, WithJsonSchema(PICTURE)]
"""Text in JSON, bytes where a form brings a file."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=8)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Scale = float | list[float] | list[list[list[float]]]
ControlMode = str | int
LayerWeights = Literal["soft"] | list[float]
SERVERS_OWN = ("model", "timeout_ms", "response", "wait", "stream", "previews")
"""Fields that are no argument of a pipeline."""
PICTURES = ("image", "ip_adapter_image", "init_image", "mask_image", "control_region")
"""Fields that hold pictures."""


class GenerateRequest(BaseModel):
    """A call of the pipeline; names and defaults are those of ``ControlNetPipeline`` and diffusers."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {
                    "prompt": "a lighthouse at dusk",
                    "image": {"canny": EXAMPLE_PICTURE},
                    "num_inference_steps": 20,
                    "controlnet_conditioning_scale": 0.8,
                    "scheduler": "DPM++ 2M Karras",
                    "seed": 42,
                }
            ]
        },
    )

    prompt: str | list[str] = Field(description="one prompt, or several drawn together")
    negative_prompt: str | list[str] | None = Field(None, description="what to steer away from; one, or one per prompt")
    prompt_syntax: Literal["plain", "webui"] = Field(
        "plain", description="webui: weights in brackets and prompts that change, as the web UI has them"
    )
    clip_skip: int | None = Field(None, ge=0, description="how many of the text encoder's last layers are left out")
    image: Picture | list[Picture] | dict[str, Picture | list[Picture]] | None = Field(
        None,
        description="control pictures by the name of their control; a bare picture where the model has one control",
    )
    ip_adapter_image: Picture | list[Picture | list[Picture]] | dict[str, Picture | list[Picture]] | None = Field(
        None, description="pictures as prompts, for models with IP-Adapters: one, several at once, or by name"
    )
    ip_adapter_scale: float | list[Scale] | dict[str, Scale] = Field(
        1.0, description="how strongly they act, 0 to 10; one number, a list with one for each adapter, or by name"
    )
    init_image: Picture | list[Picture] | None = Field(
        None, description="a picture to start from; one, or one per prompt"
    )
    mask_image: Picture | list[Picture] | None = Field(
        None, description="where it is drawn anew, white on black; one, or one per prompt"
    )
    strength: Fraction | None = Field(
        None, description="how much of init_image is changed; 0.8 where not given, 1 with a mask"
    )
    width: Size | None = Field(None, description="pixels; the model's own where not given")
    height: Size | None = Field(None, description="pixels; the model's own where not given")
    num_inference_steps: int | None = Field(
        None, ge=1, le=1000, description=f"denoising steps; {DEFAULT_STEPS} where not given"
    )
    timesteps: list[int] | None = Field(None, description="custom timesteps, descending, for schedulers that take them")
    sigmas: list[float] | None = Field(None, description="custom sigmas, descending, for schedulers that take them")
    guidance_scale: float = Field(
        7.5, description="classifier-free guidance; 1 or less turns it off; a consistency model is told it instead"
    )
    guidance_rescale: Fraction = Field(0.0, description="how far guidance keeps the contrast of the conditional output")
    guidance_start: Fraction = Field(0.0, description="the fraction of the steps at which guidance begins")
    guidance_end: Fraction = Field(1.0, description="and at which it ends")
    controlnet_conditioning_scale: float | list[Scale] | dict[str, Scale] = Field(
        1.0,
        description="how strongly controls act: one number, a list in the order of image, or by name; within these "
        "also one number per step",
    )
    control_guidance_start: float | list[float] | dict[str, float] = Field(
        0.0, description="the fraction of the steps at which control begins: for all, a list, or by name"
    )
    control_guidance_end: float | list[float] | dict[str, float] = Field(1.0, description="and at which it ends")
    control_mode: ControlMode | list[ControlMode] | dict[str, ControlMode] = Field(
        "balanced",
        description="balanced, prompt or controlnet, or as the web UI's extension calls them: for all, or by name",
    )
    control_layer_weights: LayerWeights | dict[str, LayerWeights | None] | None = Field(
        None, description="one number for each residual of a ControlNet, or soft: for all, or by name"
    )
    control_region: Picture | dict[str, Picture] | None = Field(
        None, description="where control acts, white on black: for all, or by name"
    )
    guess_mode: bool | Literal["diffusers", "original"] = Field(
        False, description="control acts on the conditional half only and rises over the layers"
    )
    eta: Fraction = Field(0.0, description="noise that DDIM and TCD add at each step")
    seed: Seed | list[Seed] | None = Field(
        None, description="one for all pictures, or one for each; drawn and told where not given"
    )
    noise: Literal["cpu", "gpu"] = Field("cpu", description="PyTorch's generator that the seed is for")
    num_images_per_prompt: int = Field(1, ge=1, description="pictures of each prompt")
    scheduler: str | dict[str, Any] | None = Field(
        None, description="a sampler by name, or options of one with _class_name; the model's own where not given"
    )
    resize: str | int | None = Field(
        None, description="how pictures of another size are fitted: stretch, crop, pad or fill; refused where not given"
    )
    vae_tiling: bool = Field(
        False, description="decode in tiles where the model's VAE takes no whole picture of this size"
    )

    model: str | None = Field(None, description="a bundle of GET /v1/bundles; the first where not given")
    timeout_ms: int | None = Field(
        None, ge=1, description="after which nobody waits any more; the server's limit by default"
    )
    response: Encoding = Field("png", description="the pictures' format")
    wait: bool = Field(True, description="false: answer 202 with a job at once, to be fetched from /v1/jobs")
    stream: bool = Field(False, description="answer with server-sent events: progress, previews, then the result")
    previews: bool = Field(False, description="progress carries small previews, JPEG files in base64")


class Generated(BaseModel):
    """Drawn pictures."""

    id: str = Field(description="of the job", examples=["7f9c2ba4e88f827d616045507605853e"])
    model: str = Field(description="the bundle that drew them")
    images: list[str] = Field(description="the pictures' files in base64, in the order of the prompts")
    media_type: str = Field(description="of the files", examples=["image/png"])
    seeds: list[int] = Field(description="the seed of each picture, or the one seed of all")
    seconds: dict[str, float] = Field(
        description="until the first step, of the steps, of decoding, and all together",
        examples=[{"queued": 0.01, "steps": 1.9, "decode": 0.1, "total": 2.02}],
    )


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="to branch on", examples=["queue_full"])
    message: str = Field(description="to read: what failed, what was found, what mends it")
    parameter: str | None = Field(description="what in the request is wrong, where one thing is")
    request_id: str | None = Field(description="as in the header X-Request-ID and in the server's log")


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class JobState(BaseModel):
    """Where a job is."""

    id: str
    status: Status
    url: str = Field(description="where to ask again, and to cancel it with DELETE")
    step: int = Field(description="steps done")
    steps: int = Field(description="of so many; 0 before it runs")
    previews: list[str] = Field([], description="small JPEG files in base64, one per picture, where asked for")
    result: Generated | None = Field(None, description="once its status is done")
    error: ErrorDetail | None = Field(None, description="once its status is failed or cancelled")


class ControlDescription(BaseModel):
    """A control of a bundle."""

    name: str = Field(description="in image and other mappings by name")
    kind: Literal["controlnet", "adapter"]


class BundleDescription(BaseModel):
    """A bundle that the server draws with."""

    name: str = Field(description="for the field model")
    controls: list[ControlDescription]
    sizes: list[str] = Field(description="widths x heights, in pixels", examples=[["512x512", "512-1024x768"]])
    default_size: str = Field(description="where a request names none", examples=["512x512"])
    backend: str
    precision: str


def multipart_schema() -> dict[str, Any]:
    """The schema of ``GenerateRequest`` as a form: files for pictures."""
    schema = GenerateRequest.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream", "format": "binary"}
    properties = {name: file if name in PICTURES else value for name, value in schema["properties"].items()}
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": {r"^(image|control_region)\.[A-Za-z0-9_.-]+$": file},
        "additionalProperties": False,
        "required": ["prompt"],
    }
