from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BundleError
from controlrt.runtime.manifest import SCHEMA_VERSION, Hint

pytestmark = pytest.mark.bundle


@pytest.fixture
def copy(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        change(manifest)
        (bundle / "manifest.json").write_text(json.dumps(manifest))

    return apply


def flip_one_bit(bundle: Path) -> None:
    weights = bundle / "programs" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_one_bit, r"weights\.bin was changed"),
        (lambda bundle: (bundle / "programs" / "unet.step.onnx").unlink(), "missing"),
        (lambda bundle: (bundle / "manifest.json").unlink(), "not a bundle"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), "damaged"),
        (lambda bundle: (bundle / "manifest.json").write_text("[]"), "damaged"),
        (lambda bundle: (bundle / "manifest.json").write_bytes(b"\xff\xfe"), "damaged"),
        (edit(lambda manifest: manifest.update(schema_version=99)), f"schema 99, .* reads schema {SCHEMA_VERSION}"),
        (
            edit(lambda manifest: manifest.update(schema_version=SCHEMA_VERSION - 1)),
            f"schema {SCHEMA_VERSION - 1}, this .* build it again with build-engines",
        ),
        (edit(lambda manifest: manifest.pop("schema_version")), "schema None"),
        (edit(lambda manifest: manifest.update(surprise=1)), "surprise"),
        (edit(lambda manifest: manifest["files"].update({"../../etc/passwd": "0" * 64})), "not a file of the bundle"),
    ],
)
def test_damage_is_refused(copy: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(copy)
    with pytest.raises(BundleError, match=says):
        Bundle.open(copy)


def test_a_program_outside_the_bundle_is_refused(copy: Path) -> None:
    edit(lambda manifest: manifest["programs"][0].update(file="../other.onnx"))(copy)
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match="not a file of the bundle"):
        bundle.file(bundle.manifest.programs[0].file)


def test_a_whole_bundle_opens(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    assert [control.name for control in manifest.controls] == ["canny", "mask"]
    assert max(program.max_relative_error for program in manifest.programs) < 1e-4


def test_what_a_control_expects_to_see(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    assert bundle.hint("canny") == Hint(annotator="canny", channels=3)
    assert bundle.hint("mask") == Hint(annotator=None, channels=3)
    with pytest.raises(BundleError, match="not a file of the bundle"):
        bundle.hint("depth")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist; make one with: build-engines"):
        Bundle.open(tmp_path / "absent")
