"""Checkpoints by hub id, from a hub that is a folder here: what of a repository is downloaded, and that it loads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects

from controlrt.export import checkpoint
from controlrt.runtime.errors import SourceError
from families import Family

pytestmark = pytest.mark.parametrize("family", ["shallow"], indirect=True, scope="module")
WEIGHTS = "diffusion_pytorch_model"


class Hub:
    """Stands in for the hub's client: repositories are folders, and patterns are the client's own."""

    def __init__(self, root: Path) -> None:
        self.repositories, self._downloads = root / "hub", root / "cache"

    def snapshot_download(
        self, repository: str, allow_patterns: Sequence[str] = ("*",), ignore_patterns: Sequence[str] = ()
    ) -> str:
        source, target = self.repositories / repository, self._downloads / repository
        if not source.is_dir():
            raise OSError(f"404: {repository}\nand much more")
        target.mkdir(parents=True, exist_ok=True)
        names = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
        for name in filter_repo_objects(
            names, allow_patterns=list(allow_patterns), ignore_patterns=list(ignore_patterns)
        ):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)

    def hf_hub_download(self, repository: str, file: str) -> str:
        return str(Path(self.snapshot_download(repository, [file])) / file)

    def downloaded(self, repository: str) -> set[str]:
        root = self._downloads / repository
        return {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(hub, name))
    return hub


def same_unet(found: Path, family: Family) -> bool:
    ours = checkpoint.load(found, {}).unet.state_dict()
    theirs = UNet2DConditionModel.from_pretrained(family.model / "unet").state_dict()
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_model(hub: Hub, family: Family) -> None:
    """Without what it holds beside the parts that are needed, or twice."""
    repository = shutil.copytree(family.model, hub.repositories / "owner/model")
    needed = {file.relative_to(family.model).as_posix() for file in family.model.rglob("*") if file.is_file()}
    others = (f"unet/{WEIGHTS}.fp16.safetensors", f"unet/{WEIGHTS}.bin", f"unet/{WEIGHTS}.non_ema.safetensors")
    for name in (*others, "safety_checker/model.safetensors", "pruned.safetensors", "README.md", "unet/README.md"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"not to be read")
    found = checkpoint.resolve("owner/model", "model")
    assert hub.downloaded("owner/model") == needed
    assert same_unet(found, family)


def test_a_model_in_half_precision_alone(hub: Hub, family: Family) -> None:
    repository = shutil.copytree(family.model, hub.repositories / "owner/half")
    for file in list(repository.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert same_unet(checkpoint.resolve("owner/half", "model"), family)


def test_a_controlnet(hub: Hub, family: Family) -> None:
    """A folder of the hub, and a file in one."""
    repository = shutil.copytree(family.controlnets["first"], hub.repositories / "owner/control")
    shutil.copy(repository / f"{WEIGHTS}.safetensors", repository / "other.safetensors")
    expected = ControlNetModel.from_pretrained(family.controlnets["first"]).state_dict()
    for source, downloaded in (
        ("owner/control", {"config.json", f"{WEIGHTS}.safetensors"}),
        ("owner/control/other.safetensors", {"config.json", f"{WEIGHTS}.safetensors", "other.safetensors"}),
    ):
        found = checkpoint.load(family.model, {"edges": checkpoint.resolve(source, "ControlNet")})
        assert hub.downloaded("owner/control") == downloaded
        for name, value in found.controlnets["edges"].state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_a_lora(hub: Hub, family: Family) -> None:
    del family
    repository = hub.repositories / "owner/lora"
    repository.mkdir(parents=True)
    for name in ("pytorch_lora_weights.safetensors", "adapter_config.json", "picture.png"):
        (repository / name).touch()
    found = checkpoint.resolve_lora("owner/lora")
    assert found.name == "pytorch_lora_weights.safetensors"
    assert hub.downloaded("owner/lora") == {"pytorch_lora_weights.safetensors", "adapter_config.json"}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "owner/absent",
            r"model owner/absent is no path here, and the hub and its local cache say: 404: owner/absent; name a f",
        ),
        ("owner/absent/x.safetensors", "is no path here, and the hub and its local cache say: 404"),
        ("owner/x.safetensors", "does not exist; a file on the hub is OWNER/NAME/FILE.safetensors"),
        ("./absent", "does not exist; give a diffusers folder, a .safetensors file or a hub id"),
        ("absent", "does not exist; give a diffusers folder, a .safetensors file or a hub id"),
    ],
)
def test_what_is_nowhere(hub: Hub, family: Family, source: str, says: str) -> None:
    del hub, family
    with pytest.raises(SourceError, match=says) as caught:
        checkpoint.resolve(source, "model")
    assert "\n" not in str(caught.value)
