"""T2I-Adapters: loaded as they are, and refused where their features would not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file, save_file

from controlrt.export import checkpoint
from controlrt.export.exporter import ExportOptions
from controlrt.runtime.errors import ParameterError, SourceError
from controlrt.runtime.profile import ShapeProfile
from families import Family

pytestmark = pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")


def test_an_adapter_is_loaded_as_it_is(family: Family) -> None:
    loaded = checkpoint.load(family.model, {}, adapters=family.adapters)
    for name, path in family.adapters.items():
        hint = torch.rand(1, loaded.adapters[name].config.in_channels, 128, 128)
        expected = T2IAdapter.from_pretrained(path)(hint)
        for found, wanted in zip(loaded.adapters[name](hint), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"adapter_type": "full_adapter_xl", "downscale_factor": 16}, "was made for SDXL, but the model is not"),
        ({"channels": (32, 64, 64, 64)}, r"channels are \[32, 64, 64, 64\], the UNet's \[32, 32, 64, 64\]"),
    ],
)
def test_an_adapter_of_another_model(family: Family, tmp_path: Path, config: dict[str, object], says: str) -> None:
    settings = {"channels": (32, 32, 64, 64), "num_res_blocks": 1, "adapter_type": "full_adapter", **config}
    T2IAdapter(**settings).save_pretrained(tmp_path / "other")
    with pytest.raises(SourceError, match=rf"adapter depth .*{says}"):
        checkpoint.load(family.model, {}, adapters={"depth": tmp_path / "other"})


def test_what_is_no_adapter(family: Family, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"adapter depth .* is a ControlNetModel; supported: T2IAdapter"):
        checkpoint.load(family.model, {}, adapters={"depth": family.controlnets["first"]})
    with pytest.raises(SourceError, match=r"ControlNet edges .* is a T2IAdapter; supported: ControlNetModel"):
        checkpoint.load(family.model, {"edges": family.adapters["depth"]})
    weights = tmp_path / "adapter.safetensors"
    save_file(load_file(family.adapters["depth"] / "diffusion_pytorch_model.safetensors"), weights)
    with pytest.raises(SourceError, match="single file; give a diffusers folder"):
        checkpoint.load(family.model, {}, adapters={"depth": weights})
    with pytest.raises(SourceError, match=r"a T2I-Adapter.*--adapter"):
        checkpoint.load(family.model, {"edges": weights})


def test_a_name_is_of_one_control(family: Family) -> None:
    with pytest.raises(ParameterError, match="control name is 'depth'"):
        ExportOptions(
            model=str(family.model),
            controlnets={"depth": "a"},
            adapters={"depth": "b"},
            profile=ShapeProfile.parse("128x128"),
        )
