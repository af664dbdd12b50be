"""Single files: written from small random pipelines in the original layout, read back without the hub."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from original_layout import checkpoint_tensors
from safetensors.torch import save_file

from controlrt.demo import MODEL_DIR
from controlrt.export import checkpoint
from controlrt.export.checkpoint.architectures import (
    empty_model,
    stable_diffusion_1,
    stable_diffusion_2,
    stable_diffusion_xl,
)
from controlrt.export.checkpoint.clip_tokenizer import END, clip_tokenizer
from controlrt.export.checkpoint.single_file import UNET, pipeline_parts, recognise
from controlrt.export.checkpoint.tensor_file import TensorFile
from controlrt.runtime.errors import SourceError
from families import FAMILIES, Family

one_family = pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")


@pytest.fixture
def config(family: Family, tmp_path: Path) -> Path:
    """The family's folder without its weights."""
    target = Path(shutil.copytree(family.model, tmp_path / "config"))
    for weights in target.rglob("*.safetensors"):
        weights.unlink()
    return target


@pytest.fixture(scope="module")
def tensors(family: Family) -> dict[str, torch.Tensor]:
    """The family's weights in the original layout."""
    return checkpoint_tensors(family.reference(), family.name)


def same_tensors(found: Any, expected: Any) -> None:
    theirs = {name: value for name, value in expected.state_dict().items() if not name.endswith("position_ids")}
    ours = {name: value for name, value in found.state_dict().items() if not name.endswith("position_ids")}
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("family", [*FAMILIES, "consistency"], indirect=True, scope="module")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_same_weights_as_the_folder(
    family: Family, tensors: dict[str, torch.Tensor], config: Path, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 1000}, file)
    else:
        save_file(tensors, file)
    found, expected = checkpoint.load(file, {}, config=config), checkpoint.load(family.model, {})
    for part in ("unet", "vae"):
        same_tensors(getattr(found, part), getattr(expected, part))
    for ours, theirs in zip(found.text_encoders, expected.text_encoders, strict=True):
        same_tensors(ours.model, theirs.model)
        ids = torch.tensor([[theirs.bos_token_id, 5, 6, theirs.eos_token_id]])
        torch.testing.assert_close(ours.model(ids)[0], theirs.model(ids)[0])
        facts = ("name", "max_length", "pad_token_id", "bos_token_id", "eos_token_id", "penultimate", "pooled")
        assert [getattr(ours, fact) for fact in facts] == [getattr(theirs, fact) for fact in facts]
        assert ours.tokenizer("a red star").input_ids == theirs.tokenizer("a red star").input_ids
    assert found.scheduler_config == expected.scheduler_config
    assert found.zero_empty_negative == expected.zero_empty_negative
    assert found.unet.config.attention_head_dim == expected.unet.config.attention_head_dim


@one_family
def test_half_precision_and_bare_text_encoders(
    family: Family, tensors: dict[str, torch.Tensor], config: Path, tmp_path: Path
) -> None:
    """Merges on model sites are float16, and some leave ``text_model`` out of the text encoder's names."""
    halves = {name.replace(".text_model.", "."): value.half() for name, value in tensors.items()}
    save_file(halves, tmp_path / "half.safetensors")
    loaded = checkpoint.load(tmp_path / "half.safetensors", {}, config=config)
    exact = checkpoint.load(family.model, {})
    assert loaded.unet.dtype == torch.float32
    for half, full in zip(loaded.unet.parameters(), exact.unet.parameters(), strict=True):
        assert torch.equal(half, full.half().float())


@one_family
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: {n: v for n, v in t.items() if n != UNET + "out.2.bias"},
            r"\(UNet\) lacks 1 of \d+ .* conv_out\.bias",
        ),
        (lambda t: {n: v for n, v in t.items() if not n.startswith("first")}, r"\(VAE\) lacks"),
        (lambda t: {n: v for n, v in t.items() if not n.startswith("cond_stage")}, r"\(text encoder\) lacks"),
        (lambda t: t | {UNET + "out.2.bias": torch.zeros(5)}, r"conv_out.bias has shape \(5,\), and .* has \(4,\)"),
        (lambda t: t | {UNET + "input_blocks.1.0.extra.weight": torch.zeros(5)}, r"has 1 tensors that .* has not"),
        (lambda t: t | {UNET + "out.2.scale_weight": torch.zeros(1)}, "quantised"),
        (lambda _: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "but a LoRA; merge it with --lora"),
        (
            lambda _: {"control_model.time_embed.0.weight": torch.zeros(1)},
            "but a ControlNet; give it with --controlnet",
        ),
        (lambda _: {"double_blocks.0.img_attn.proj.weight": torch.zeros(1)}, "but a Flux model"),
        (lambda _: {"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}, "but a VAE alone"),
        (lambda _: {"x": torch.zeros(1)}, "something else: 1 tensors such as x"),
    ],
)
def test_refusals(tensors: dict[str, torch.Tensor], config: Path, tmp_path: Path, change: Any, says: str) -> None:
    save_file(change(tensors), tmp_path / "bad.safetensors")
    with pytest.raises(SourceError, match=says) as caught:
        checkpoint.load(tmp_path / "bad.safetensors", {}, config=config)
    assert "\n" not in str(caught.value)


@one_family
def test_an_unknown_architecture_names_what_is_known(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "small.safetensors")
    with pytest.raises(SourceError, match=r"width 32; known are .* \(768\), .* give --config"):
        checkpoint.load(tmp_path / "small.safetensors", {})


@one_family
def test_options_of_single_files_on_a_folder(family: Family) -> None:
    with pytest.raises(SourceError, match="--prediction-type is for single files"):
        checkpoint.load(family.model, {}, prediction_type="epsilon")
    with pytest.raises(SourceError, match="--config is for single files"):
        checkpoint.load(family.model, {}, config=family.model)


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    mark, file = tmp_path / "ran", tmp_path / "evil.ckpt"
    content = {"state_dict": {UNET + "out.2.bias": torch.zeros(4)}, "callbacks": Malice(mark)}
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    for load in (
        lambda: checkpoint.load(file, {}),
        lambda: checkpoint.load(MODEL_DIR, {"edges": file}),
        lambda: checkpoint.load(MODEL_DIR, {}, [checkpoint.LoraSource(name="x", path=file, weight=1.0)]),
        lambda: checkpoint.load(MODEL_DIR, {}, adapters={"edges": file}),
        lambda: checkpoint.load(
            MODEL_DIR, {}, ip_adapters=[checkpoint.IPAdapterSource(name="x", file=file, image_encoder=tmp_path)]
        ),
    ):
        with pytest.raises(SourceError, match=r"evil\.ckpt .*(Python objects|damaged)") as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("part", "file"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_code_in_a_pickle_of_a_folder_does_not_run(tmp_path: Path, part: str, file: str) -> None:
    mark, model = tmp_path / "ran", Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    for weights in (model / part).glob("*.safetensors"):
        weights.unlink()
    torch.save({"weight": torch.zeros(4), "callbacks": Malice(mark)}, model / part / file)
    with pytest.raises(SourceError) as caught:
        checkpoint.load(model, {})
    assert "\n" not in str(caught.value)
    assert not mark.exists()


PUBLISHED = {  # parameters, as the models' papers and pages count them
    "1": (stable_diffusion_1, {}, 859_520_964, (123_060_480,)),
    "2": (stable_diffusion_2, {"prediction_type": "v_prediction"}, 865_910_724, (340_387_840,)),
    "xl": (
        stable_diffusion_xl,
        {"prediction_type": "epsilon", "zero_terminal_snr": False},
        2_567_463_684,
        (123_060_480, 694_659_840),
    ),
}


@pytest.mark.parametrize("which", list(PUBLISHED))
def test_the_published_sizes(which: str) -> None:
    make, options, unet, encoders = PUBLISHED[which]
    architecture = make(**options)

    def size(cls: str, config: Any) -> int:
        return sum(parameter.numel() for parameter in empty_model(cls, config).parameters())

    assert size("UNet2DConditionModel", architecture.unet) == unet
    assert size("AutoencoderKL", architecture.vae) == 83_653_863
    found = tuple(
        size("CLIPTextModelWithProjection" if encoder.projection else "CLIPTextModel", encoder.config)
        for encoder in architecture.text_encoders
    )
    assert found == encoders


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SETTINGS: dict[str, dict[str, Any]] = {  # of the folders that were published with the weights, as their configs have it
    "1": {
        "scheduler": {
            **BETAS,
            "_class_name": "PNDMScheduler",
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "prediction_type": "epsilon",
        },
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "use_linear_projection": False},
        "vae": {"sample_size": 512, "scaling_factor": 0.18215},
        "text": [{"hidden_act": "quick_gelu", "num_hidden_layers": 12, "layer_norm_eps": 1e-5}],
        "zero_empty_negative": False,
    },
    "2": {
        "scheduler": {
            **BETAS,
            "_class_name": "DDIMScheduler",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": False,
        },
        "unet": {"sample_size": 96, "cross_attention_dim": 1024, "use_linear_projection": True},
        "vae": {"sample_size": 768, "scaling_factor": 0.18215},
        "text": [{"hidden_act": "gelu", "num_hidden_layers": 23, "layer_norm_eps": 1e-5}],
        "zero_empty_negative": False,
    },
    "xl": {
        "scheduler": {
            **BETAS,
            "_class_name": "EulerDiscreteScheduler",
            "interpolation_type": "linear",
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "prediction_type": "epsilon",
            "use_karras_sigmas": False,
        },
        "unet": {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_time_embed_dim": 256,
            "transformer_layers_per_block": (1, 2, 10),
        },
        "vae": {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text": [
            {"hidden_act": "quick_gelu", "num_hidden_layers": 12, "projection_dim": 768, "layer_norm_eps": 1e-5},
            {"hidden_act": "gelu", "num_hidden_layers": 32, "projection_dim": 1280, "layer_norm_eps": 1e-5},
        ],
        "zero_empty_negative": True,
    },
}


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("which", list(PUBLISHED))
def test_published_files_fit(which: str, channels: int) -> None:
    """Names and shapes of whole files of the published sizes, also for inpainting, without memory for their values."""
    make, options, *_ = PUBLISHED[which]
    architecture = make(**options)
    encoders = [
        empty_model("CLIPTextModelWithProjection" if encoder.projection else "CLIPTextModel", encoder.config)
        for encoder in architecture.text_encoders
    ]
    pipeline = SimpleNamespace(
        unet=empty_model("UNet2DConditionModel", {**architecture.unet, "in_channels": channels}),
        vae=empty_model("AutoencoderKL", architecture.vae),
        text_encoder=encoders[0],
        text_encoder_2=encoders[-1],
    )
    with torch.device("meta"):
        tensors = checkpoint_tensors(pipeline, {"1": "sd15", "2": "sd21", "xl": "sdxl"}[which])
    file = TensorFile(path=Path("x.safetensors"), tensors=tensors)
    recognised = recognise(file, options.get("prediction_type"))
    assert recognised.name == architecture.name
    found = pipeline_parts(file, recognised)
    assert len(found.text_encoders) == len(found.tokenizers) == len(encoders)
    assert found.unet.config.attention_head_dim == {"1": 8, "2": (5, 10, 20, 20), "xl": (5, 10, 20)}[which]
    assert found.unet.config.in_channels == channels
    settings = SETTINGS[which]
    for part in ("scheduler", "unet", "vae"):
        configured = dict(getattr(found, part).config)
        assert {key: configured.get(key) for key in settings[part]} == settings[part]
    for encoder, expected in zip(found.text_encoders, settings["text"], strict=True):
        assert {key: getattr(encoder.config, key) for key in expected} == expected
    assert found.zero_empty_negative == settings["zero_empty_negative"]
    assert [tokenizer.pad_token_id for tokenizer in found.tokenizers] == {"1": [49407], "2": [0], "xl": [49407, 0]}[
        which
    ]


def header(width: int, *extra: str, **metadata: str) -> TensorFile:
    """The names and shapes by which a file is recognised."""
    names = [f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", *extra]
    return TensorFile(
        path=Path("x.safetensors"),
        tensors={name: torch.empty(1, width, device="meta") for name in names},
        metadata={"modelspec." + key: value for key, value in metadata.items()},
    )


LABELS = f"{UNET}label_emb.0.0.weight"


@pytest.mark.parametrize(
    ("file", "said", "name", "prediction_type"),
    [
        (header(768), None, "1.x", "epsilon"),
        (header(768), "v_prediction", "1.x", "v_prediction"),
        (header(1024), "epsilon", "2.x", "epsilon"),
        (header(1024, prediction_type="v"), None, "2.x", "v_prediction"),
        (header(2048, LABELS), None, "XL", "epsilon"),
        (header(2048, LABELS, "v_pred", "ztsnr"), None, "XL", "v_prediction"),
    ],
)
def test_recognised(file: TensorFile, said: str | None, name: str, prediction_type: str) -> None:
    architecture = recognise(file, said)
    assert architecture.name == f"Stable Diffusion {name}"
    assert architecture.scheduler.get("prediction_type", "epsilon") == prediction_type
    assert architecture.scheduler.get("rescale_betas_zero_snr", False) == ("ztsnr" in file.tensors)


def test_a_consistency_model_is_recognised() -> None:
    """By the layer that reads the guidance scale; it is drawn with its own sampler."""
    file = header(768, UNET + "time_embedding.cond_proj.weight")
    architecture = recognise(file, None)
    assert architecture.unet["time_cond_proj_dim"] == 768
    assert architecture.scheduler["_class_name"] == "LCMScheduler"
    assert architecture.scheduler["beta_schedule"] == "scaled_linear"
    assert recognise(file, "v_prediction").scheduler["prediction_type"] == "v_prediction"
    assert "time_cond_proj_dim" not in recognise(header(768), None).unet


def test_what_a_file_of_version_2_does_not_say() -> None:
    with pytest.raises(SourceError, match=r"give --prediction-type v_prediction .*768.* or epsilon"):
        recognise(header(1024), None)
    with pytest.raises(SourceError, match="is the refiner"):
        recognise(header(1280, LABELS), None)
    with pytest.raises(SourceError, match=r"Playground 2\.5"):
        recognise(header(2048, LABELS, "edm_mean"), None)


def test_the_tokenizer_is_clips() -> None:
    """Ids as published with CLIP: its README's picture of a cat, numbers, punctuation, accents, an emoji."""
    tokenizer = clip_tokenizer(END)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello, world!").input_ids == [49406, 3306, 267, 1002, 256, 49407]
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id) == (49408, 77, 49407)
    assert clip_tokenizer("!").pad_token_id == 0
