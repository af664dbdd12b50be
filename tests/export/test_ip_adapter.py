"""IP-Adapters: what loads, and the refusals by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from ip_adapters import (
    EMBEDDING,
    SIDE,
    TOKENS,
    Kind,
    ip_adapter_tensors,
    save_image_encoder,
    save_ip_adapter,
)
from transformers import CLIPVisionModelWithProjection

from controlrt.export import checkpoint
from controlrt.export.checkpoint import resolve_ip_adapter
from controlrt.export.image_prompts import IPAdapterProgram
from controlrt.runtime.errors import SourceError
from families import Family

pytestmark = pytest.mark.parametrize("family", ["shallow"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def unet(family: Family) -> Any:
    return UNet2DConditionModel.from_pretrained(family.model / "unet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an image encoder in it."""
    folder = tmp_path_factory.mktemp("adapters")
    save_image_encoder(folder / "image_encoder")
    return folder


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_tokens_are_those_of_diffusers(family: Family, unet: Any, folder: Path, kind: Kind, suffix: str) -> None:
    tensors = ip_adapter_tensors(unet, kind)
    file = save_ip_adapter(folder / f"{kind}{suffix}", tensors)
    source = resolve_ip_adapter("it", str(file), None)
    (parts,) = checkpoint.load(family.model, {}, ip_adapters=[source]).ip_adapters
    assert (parts.program, parts.tokens, parts.layers, parts.side) == ("ip_adapter.it", TOKENS[kind], 4, SIDE)
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    projection = unet._convert_ip_adapter_image_proj_to_diffusers(tensors["image_proj"])
    outputs, nothing = encoder(pixels, output_hidden_states=True), encoder(0 * pixels, output_hidden_states=True)
    given, absent = (
        (outputs.image_embeds, 0 * outputs.image_embeds)
        if kind == "plain"
        else (outputs.hidden_states[-2], nothing.hidden_states[-2])
    )
    program = IPAdapterProgram(parts.image_encoder, parts.projection, penultimate=parts.penultimate)
    torch.testing.assert_close(program(pixels, torch.ones(2)), projection(given))
    torch.testing.assert_close(program(0 * pixels, torch.zeros(2)), projection(absent))


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors["image_proj"] = {name.replace(old, new): value for name, value in tensors["image_proj"].items()}

    return change


def face_lora(tensors: dict[str, Any]) -> None:
    tensors["ip_adapter"]["0.to_k_lora.down.weight"] = torch.zeros(4, 32)


def another_width(tensors: dict[str, Any]) -> None:
    tensors["ip_adapter"]["3.to_v_ip.weight"] = torch.zeros(48, 32)


def fewer_layers(tensors: dict[str, Any]) -> None:
    for kind in "kv":
        del tensors["ip_adapter"][f"7.to_{kind}_ip.weight"]


def another_encoder(tensors: dict[str, Any]) -> None:
    tensors["image_proj"]["proj.weight"] = torch.zeros(4 * 32, 2 * EMBEDDING)


def wider_tokens(tensors: dict[str, Any]) -> None:
    proj = {"proj.weight": torch.zeros(4 * 48, EMBEDDING), "proj.bias": torch.zeros(4 * 48)}
    tensors["image_proj"] = proj | {"norm.weight": torch.ones(48), "norm.bias": torch.zeros(48)}


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("plain", rename("proj.weight", "proj.0.weight"), "is an IP-Adapter FaceID, which needs a network that recog"),
        ("plus", rename("proj_in", "perceiver_resampler.proj_in"), "is an IP-Adapter FaceID"),
        ("plain", face_lora, "is an IP-Adapter FaceID"),
        (
            "plain",
            another_width,
            r"another model: its 3.to_v_ip.weight is \(48, 32\), for the UNet .* \(32, 32",
        ),
        ("plain", fewer_layers, "another model: it is for 3 cross-attentions, the UNet has 4"),
        ("plain", another_encoder, "another image encoder: it reads 48 channels, .* gives 24; .* --image-encoder"),
        ("plain", wider_tokens, "another model: its tokens have 48 channels, the UNet's cross-attention reads 32"),
        ("plus", rename("layers.0.0.to_q", "layers.0.0.to_p"), "cannot load .*broken.safetensors"),
    ],
)
def test_what_is_refused(
    family: Family, unet: Any, folder: Path, kind: Kind, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    tensors = ip_adapter_tensors(unet, kind)
    change(tensors)
    source = resolve_ip_adapter("it", str(save_ip_adapter(folder / "broken.safetensors", tensors)), None)
    with pytest.raises(SourceError, match=says):
        checkpoint.load(family.model, {}, ip_adapters=[source])


def test_another_file(family: Family, folder: Path) -> None:
    weights = folder / "another.safetensors"
    save_ip_adapter(weights, {"unet": {"conv_in.weight": torch.zeros(1)}})
    with pytest.raises(SourceError, match=r"is no IP-Adapter: it has no tensors named image_proj\.\* and ip_adapter"):
        checkpoint.load(family.model, {}, ip_adapters=[resolve_ip_adapter("it", str(weights), None)])


def test_finding_it(family: Family, unet: Any, tmp_path: Path) -> None:
    tensors = ip_adapter_tensors(unet, "plain")
    models = tmp_path / "models"
    models.mkdir()
    with pytest.raises(SourceError, match="models holds no file of weights"):
        resolve_ip_adapter("it", str(models), None)
    file = save_ip_adapter(models / "one.safetensors", tensors)
    save_ip_adapter(models / "one.bin", tensors)
    with pytest.raises(SourceError, match=r"it needs an image encoder, and .*image_encoder holds no config.json; name"):
        resolve_ip_adapter("it", str(models), None)
    elsewhere = save_image_encoder(tmp_path / "vit")
    assert resolve_ip_adapter("it", str(models), str(elsewhere)).image_encoder == elsewhere
    beside = save_image_encoder(models / "image_encoder")
    found = resolve_ip_adapter("it", str(models), None)
    assert (found.file, found.image_encoder) == (file, beside)
    save_ip_adapter(models / "two.safetensors", tensors)
    with pytest.raises(SourceError, match=r"several files; name one of them: one\.safetensors, two\.safetensors"):
        resolve_ip_adapter("it", str(models), None)
    source = resolve_ip_adapter("it", str(file), str(family.model / "unet"))
    with pytest.raises(SourceError, match=r"the image encoder .* is a UNet2DConditionModel; supported: CLIPVision"):
        checkpoint.load(family.model, {}, ip_adapters=[source])


def test_on_the_hub(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image encoder beside the file is asked for with it."""
    asked: list[object] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        (tmp_path / "models").mkdir()
        return str(tmp_path / file)

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, *allow_patterns))
        (tmp_path / "models" / "image_encoder").mkdir()
        (tmp_path / "models" / "image_encoder" / "config.json").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = resolve_ip_adapter("it", "owner/name/models/plus.bin", None)
    assert (found.file, found.image_encoder) == (tmp_path / "models/plus.bin", tmp_path / "models/image_encoder")
    assert asked == [
        ("owner/name", "models/plus.bin"),
        ("owner/name", "models/image_encoder/config.json", "models/image_encoder/*.safetensors"),
    ]
    monkeypatch.undo()
    with pytest.raises(SourceError, match="image encoder owner/name/vit is no path here, and the hub"):
        resolve_ip_adapter("it", str(family.controlnets["first"]), "owner/name/vit")
