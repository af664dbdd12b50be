"""The file of statistics: what is read back, what is refused, and which checkpoint it is of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from controlrt.compiler.quantization.statistics import (
    BINS,
    BUCKETS,
    About,
    Case,
    LayerStatistics,
    Statistics,
    weights_of,
)
from controlrt.runtime.errors import UserError
from controlrt.runtime.manifest import Manifest

RNG = np.random.default_rng(0)
RECORDED = Path(__file__).parents[2] / "runtime" / "quantized_manifest.json"


@pytest.fixture
def statistics() -> Statistics:
    layer = LayerStatistics(
        channel_amax=RNG.random(4, np.float32),
        bucket_amax=RNG.random(BUCKETS, np.float32),
        histogram=RNG.integers(0, 9, (BUCKETS, BINS)),
        limit=2.0,
    )
    case = Case(
        arguments={"prompt": "a star", "seed": 3},
        hints={"canny": RNG.integers(0, 256, (64, 64, 3), np.uint8)},
        latents=RNG.random((2, 1, 4, 8, 8), np.float32),
        pictures=RNG.integers(0, 256, (1, 64, 64, 3), np.uint8),
        scene=(0, 3),
    )
    about = About(
        parts={"unet": "0" * 64},
        data="demo",
        cases=1,
        steps=2,
        samplers=("DDIM",),
        guidance_scales=(1.0,),
        size=(64, 64),
        seed=0,
        versions={},
    )
    unseen = (case, dataclasses.replace(case, scene=None))
    return Statistics(about=about, layers={"unet": {"unet.conv1": layer}}, unseen=unseen)


def test_what_is_written_is_read(statistics: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    statistics.save(file)
    found = Statistics.load(file)
    assert found.about == statistics.about
    expected, layer = (each.layers["unet"]["unet.conv1"] for each in (statistics, found))
    assert layer.limit == expected.limit
    for name in ("channel_amax", "bucket_amax", "histogram"):
        np.testing.assert_array_equal(getattr(layer, name), getattr(expected, name))
    for case, its in zip(found.unseen, statistics.unseen, strict=True):
        assert (case.arguments, case.scene) == (its.arguments, its.scene)
        for name in ("latents", "pictures"):
            np.testing.assert_array_equal(getattr(case, name), getattr(its, name))
        np.testing.assert_array_equal(case.hints["canny"], its.hints["canny"])


def test_files_that_are_none_are_refused(statistics: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    with pytest.raises(UserError, match=r"there are no statistics at .*; make them with: controlrt calibrate"):
        Statistics.load(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read as statistics"):
        Statistics.load(file)
    statistics.save(file)
    with safe_open(file, "numpy") as opened:
        (name, header), arrays = next(iter(opened.metadata().items())), load_file(file)
    save_file(arrays, file)
    with pytest.raises(UserError, match="holds no statistics of controlrt"):
        Statistics.load(file)
    for changed, message in (
        (header.replace('"format":', '"format":1'), "is of another version of controlrt; make it again"),
        (header.replace('"limits":', '"edges":'), "is damaged; make it again"),
        (header[1:], "is damaged; make it again"),
    ):
        save_file(arrays, file, {name: changed})
        with pytest.raises(UserError, match=message):
            Statistics.load(file)


def test_weights_are_those_of_the_checkpoint() -> None:
    """Each part has the digest of its own source, and a source that is not there is no digest of nothing."""
    manifest = msgspec.json.decode(RECORDED.read_bytes(), type=Manifest)
    digests = {"model": "1" * 64, "controlnet.canny": "2" * 64, "controlnet.mask": "3" * 64}

    def of(**changed: str) -> dict[str, str]:
        sources = {**digests, **{name.replace("_", "."): digest for name, digest in changed.items()}}
        origin = msgspec.structs.replace(manifest.provenance, sources=sources)
        return weights_of(msgspec.structs.replace(manifest, provenance=origin))

    before = of()
    parts = {"model": "unet", "controlnet_canny": "controlnet.canny", "controlnet_mask": "controlnet.mask"}
    assert set(before) == set(parts.values())
    assert len(set(before.values())) == 3
    for source, part in parts.items():
        after = of(**{source: "4" * 64})
        assert [name for name in before if before[name] != after[name]] == [part]
    with pytest.raises(KeyError):
        weights_of(
            msgspec.structs.replace(manifest, provenance=msgspec.structs.replace(manifest.provenance, sources={}))
        )
