"""The schema of ``manifest.json``: what a bundle holds. Writers import it from here, its leanest reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from controlrt.runtime.errors import BundleError
from controlrt.runtime.profile import ShapeProfile

SCHEMA_VERSION = 8
MANIFEST_NAME = "manifest.json"

DType = Literal["float32", "float16", "int64", "int32", "uint8"]
Backend = Literal["onnxruntime", "openvino", "cuda", "tensorrt", "tensorrt-rtx"]
QuantizedPrecision = Literal["int8", "fp8"]
Precision = Literal["fp32", "fp16", "bf16", QuantizedPrecision]
"""What programs compute in. ``bf16`` is a matter of the backend that runs them, the others of the graph; with ``int8``
and ``fp8`` some layers are in that and the rest in ``Program.unquantized``."""
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the schema: immutable, unknown keys are refused."""


class TensorSpec(_Record, frozen=True, kw_only=True):
    """One input or output. A dimension is a number, or the name of one that varies from call to call."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


Stage = Literal["timestep", "prompt", "prompt_timestep", "image", "hint", "encode", "step"]
"""When a program runs: once per schedule, per prompt, per both, per image prompt, per control picture, or every step.
``encode`` is what a UNet's step does before it needs the ControlNets, where the backend runs both at the same time."""


class Cost(_Record, frozen=True, kw_only=True):
    """What a program is made of, and what one run of it takes."""

    nodes: int
    parameters: int
    weight_bytes: int
    """Bytes of its weights; programs may share them."""
    flops: int
    """Of its matrix products, a multiply-add being two: one picture of the default size, with two rows unless guidance
    takes none, or one entry."""


class Loss(_Record, frozen=True, kw_only=True):
    """How far outputs are from those of the float32 export on seeded inputs, run by the bundle's backend.

    What becomes an engine is measured before, as ONNX on the CPU.
    """

    max_relative_error: float
    """Largest difference, relative to the output's largest value."""
    rms_relative_error: float
    """Root mean square of the difference, relative to that of the output."""


class Engine(_Record, frozen=True, kw_only=True):
    """How TensorRT built a program, and what it takes to run it."""

    builder: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    """Of the builder; without ``version_compatible`` the runtime must have the same."""
    compute_capabilities: tuple[str, ...]
    """Of the GPUs that it was built for, as in "8.9"; empty for TensorRT-RTX's default, 8.0 and later."""
    gpu: str | None
    """The one GPU that it was built on and for; None where it runs on any with such a compute capability."""
    build_seconds: float
    optimization_profiles: int
    refittable: bool
    stripped: bool
    """Whether it has no weights, and ``controlrt refit`` must give it some before it runs."""
    version_compatible: bool
    refit_seconds: float | None = None
    """What it took to give it other weights; None where it has those that it was built with."""


class Program(_Record, frozen=True, kw_only=True):
    """One compiled program."""

    name: str
    part: str
    """What it was cut from: ``unet``, ``controlnet.NAME``, or itself where it is whole."""
    stage: Stage | None
    """None for a program that is no part of the denoising loop."""
    file: str
    cost: Cost | None
    """None in an export, which is not compiled yet."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_relative_error: float
    """Largest error against eager PyTorch on random inputs, relative to the output's largest value."""
    export_seconds: float
    precision: Precision = "fp32"
    unquantized: Precision | None = None
    """Of a program with layers in 8 bits: what all else in it is computed in."""
    loss: Loss | None = None
    """Of the part that it was cut from; None where nothing was given up and nothing was verified."""
    engine: Engine | None = None
    """None where the program is ONNX."""


class TextEncoder(_Record, frozen=True, kw_only=True):
    """One text encoder and its tokenizer."""

    program: str
    tokenizer: str
    """Tokenizer file, relative to the bundle."""
    max_length: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    vocab_size: int
    """Entries of its token table; larger ids are rows of the input ``extra_embeddings``."""
    max_clip_skip: int
    """How many of its last layers can be left out."""
    pooled: bool
    """Whether its pooled output feeds the UNet's added conditioning (SDXL)."""


class Control(_Record, frozen=True, kw_only=True):
    """One ControlNet or T2I-Adapter."""

    name: Name
    kind: Literal["controlnet", "adapter"]
    part: str
    """What its programs are cut from."""
    source: str
    layers: int
    """Residuals of a ControlNet, one per skip connection and one for the middle block; features of an adapter."""
    channels: int = 3
    """Of the control picture."""
    global_pool: bool = False
    """Whether its residuals are averaged over the picture, so that they say what and not where (shuffle)."""
    control_types: dict[Name, int] = {}
    """Of a ControlNet Union: the numbers of the types of control pictures that it knows, by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """What a call says to use it: its name, or for a ControlNet Union NAME.TYPE for each type."""
        return tuple(f"{self.name}.{each}" for each in self.control_types) or (self.name,)


class IPAdapter(_Record, frozen=True, kw_only=True):
    """One IP-Adapter: pictures as prompts (Ye et al. 2023, arXiv 2308.06721)."""

    name: Name
    program: str
    """Its image encoder and the projection to tokens, which depend on the picture alone."""
    source: str
    side: int
    """Of the square picture that its image encoder sees, in pixels."""
    tokens: int
    """Of one picture."""
    layers: int
    """The UNet's cross-attentions; each has a scale."""
    image_encoder: str | None = None
    """Its source; None where it lies beside the adapter."""


class Fusion(_Record, frozen=True, kw_only=True):
    """ControlNets and the UNet in one program, for the steps at which exactly these are on."""

    part: str
    controls: tuple[str, ...]


class Hint(_Record, frozen=True, kw_only=True):
    """What a control expects to see: the contents of ``hints/NAME.json``, NAME being what a call says."""

    annotator: str | None
    """What makes its control pictures (``controlrt annotate``); None where the names do not tell."""
    channels: int
    """Channels of the control picture, each in [0, 1]."""


class Lora(_Record, frozen=True, kw_only=True):
    """A LoRA that was merged into the model's weights."""

    name: str
    source: str
    weight: float
    """What its differences were multiplied by."""
    sha256: Sha256
    """Of its file."""


class Model(_Record, frozen=True, kw_only=True):
    """What the runtime must know of the checkpoint."""

    source: str
    latent_channels: int
    vae_scale_factor: int
    time_ids: bool
    """Whether the UNet takes SDXL's size and crop conditioning."""
    zero_empty_negative: bool
    """Whether a missing negative prompt means zero embeddings (SDXL's force_zeros_for_empty_prompt)."""
    vae_float32: bool = False
    """Whether the VAE's activations leave the range of float16, as SDXL's do (diffusers' force_upcast)."""
    loras: tuple[Lora, ...] = ()
    config: str | None = None
    """The ``--config`` of a single file."""
    prediction_type: str | None = None
    """The ``--prediction-type`` of a single file."""


class PassCheck(_Record, frozen=True, kw_only=True):
    """A compiler pass checked on seeded inputs, before against after (``build-engines --verify``)."""

    program: str
    compiler_pass: str
    max_relative_error: float
    """Largest difference, relative to the output's largest value."""


class QuantizedLayer(_Record, frozen=True, kw_only=True):
    """A layer that could be computed in 8 bits."""

    part: str
    name: str
    amax: float
    """The largest magnitude that its input keeps in 8 bits; of an input that is smoothed, before that."""
    kept: str | None
    """Why it stays as it was; None where it is in 8 bits."""


class QuantizedBlock(_Record, frozen=True, kw_only=True):
    """What 8 bits cost and give in one block of layers, all others being as they were (``--quality-budget``)."""

    part: str
    name: str
    latent_error: float
    """Root mean square error of the final latents, relative to theirs."""
    seconds_saved: float
    """Of one run of the part's step: a lower bound, at 98%, of the median; negative where 8 bits may be slower."""
    chosen: bool

    @property
    def kept(self) -> str | None:
        """Why it stays as it was; None where it was chosen."""
        if self.chosen:
            return None
        return "it is no faster here" if self.seconds_saved <= 0 else "the quality budget was spent"


class SceneQuality(_Record, frozen=True, kw_only=True):
    """How well pictures of the demo model follow their scenes, in 8 bits and in float32 (``controlrt.demo.scores``)."""

    iou: float
    """Of outlines; the mean over the pictures."""
    float32_iou: float
    colours: float
    """The share of pictures in which both colours are those of the prompt."""
    float32_colours: float


class Quality(_Record, frozen=True, kw_only=True):
    """Pictures in 8 bits beside those of float32, of prompts and controls that the calibration left out."""

    pictures: int
    latent_errors: tuple[float, ...]
    """Root mean square error of the latents after each step, relative to theirs; the mean over the pictures."""
    psnr_db: float
    """The mean over the pictures."""
    lowest_psnr_db: float
    ssim: float
    """The mean over the pictures (Wang et al. 2004)."""
    scenes: SceneQuality | None = None
    """Of the demo model, on scenes of its own."""


class Quantization(_Record, frozen=True, kw_only=True):
    """How layers were chosen for 8 bits, and what is given up (``--precision int8`` or ``fp8``)."""

    precision: QuantizedPrecision = "int8"
    """What they are in."""
    statistics: Sha256
    """Of the file of ``controlrt calibrate``."""
    method: str
    """How ``amax`` was found."""
    smoothing: float | None
    """How much of the outliers of channels was moved into weights (Xiao et al. 2023, arXiv 2211.10438)."""
    reduced_range: bool
    """Whether weights in int8 take 7 bits of the 8, so that CPUs without VNNI do not overflow."""
    unquantized: Precision | None = None
    """What all else in these programs is computed in; None where the build did not say."""
    budget: float | None
    """Of the error of the final latents; None where layers were not measured."""
    layers: tuple[QuantizedLayer, ...]
    blocks: tuple[QuantizedBlock, ...]
    """Empty without a budget."""
    quality: Quality


class Provenance(_Record, frozen=True, kw_only=True):
    """Where the bundle came from."""

    created: str
    command: str
    sources: dict[str, Sha256]
    """Digest of each checkpoint's files, by what it is: ``model``, ``controlnet.NAME``, ``lora.NAME``, ..."""
    versions: dict[str, str]


class Manifest(_Record, frozen=True, kw_only=True):
    """A whole bundle."""

    schema_version: int
    key: Sha256
    """Digest of everything that decides the contents: checkpoints, options, builder versions."""
    backend: Backend
    precision: Precision
    profile: ShapeProfile
    model: Model
    text_encoders: tuple[TextEncoder, ...]
    controls: tuple[Control, ...]
    ip_adapters: tuple[IPAdapter, ...] = ()
    fusion: Fusion | None
    """None unless built with --fuse."""
    programs: tuple[Program, ...]
    checks: tuple[PassCheck, ...]
    """Empty unless built with --verify."""
    quantization: Quantization | None = None
    """None unless built with --precision int8 or fp8."""
    files: dict[str, Sha256]
    """Every file of the bundle but the manifest, with its digest."""
    provenance: Provenance
    refitted_from: Sha256 | None = None
    """The key of the bundle whose engines these are, with other weights; None for a bundle as it was built."""

    @property
    def on_gpu(self) -> bool:
        """Whether its programs run on a GPU."""
        return self.backend in ("cuda", "tensorrt", "tensorrt-rtx")

    @property
    def time_cond_proj_dim(self) -> int | None:
        """Channels of the embedding by which a consistency model's UNet is told the guidance scale (diffusers' name);
        None for a model that takes classifier-free guidance."""
        inputs = (spec for program in self.programs if program.part == "unet" for spec in program.inputs)
        return next((int(spec.shape[1]) for spec in inputs if spec.name == "timestep_cond"), None)

    def fused(self, controls: Sequence[str]) -> str | None:
        """The part that is the UNet fused with exactly these controls, if the bundle has one."""
        if self.fusion is None or set(self.fusion.controls) != set(controls):
            return None
        return self.fusion.part

    def stage(self, part: str, stage: Stage) -> Program | None:
        """The program of one stage of ``part``, if it has that stage."""
        return next((program for program in self.programs if (program.part, program.stage) == (part, stage)), None)

    def program(self, name: str) -> Program:
        """The program called ``name``.

        Raises:
            BundleError: the manifest lists none.
        """
        for program in self.programs:
            if program.name == name:
                return program
        raise BundleError(f"the bundle has no program {name!r}; build it again with build-engines")
