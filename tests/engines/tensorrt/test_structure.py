"""What another checkpoint may differ in, and what it may not."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from controlrt.engines.tensorrt.structure import Structure, read_structure, structure_of, write_structure
from controlrt.runtime.errors import BundleError

GRAPH = """
<ir_version: 10, opset_import: ["" : 23]>
scaled (float[rows, 2] x) => (float[rows, 3] y)
<float[2, 3] weight = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[3] bias = {1.0, 2.0, 3.0},
 float[1] scale = {0.5}, int64[2] shape = {-1, 3}>
{
    product = MatMul(x, weight)
    scaled = Mul(product, scale)
    sum = Add(scaled, bias)
    y = Reshape(sum, shape)
}
"""


def structure(text: str = GRAPH) -> Structure:
    return structure_of(ir.from_onnx_text(text))


def test_weights_are_real_numbers_that_are_more_than_one() -> None:
    found = structure()
    assert {name: str(weight) for name, weight in found.weights.items()} == {
        "weight": "float32 (2, 3)",
        "bias": "float32 (3,)",
    }
    assert found.difference(found) is None
    assert found.changed(found) == []


def test_other_values_of_weights_are_no_difference() -> None:
    other = structure(GRAPH.replace("5.0, 6.0", "5.0, 7.0"))
    assert structure().difference(other) is None
    assert structure().changed(other) == ["weight"]
    assert structure().digest != other.digest


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "float[3] bias = {1.0, 2.0, 3.0}",
            "float[1, 3] bias = {1.0, 2.0, 3.0}",
            "bias is float32 (1, 3), and float32 (3,)",
        ),
        ("float[3] bias = {1.0, 2.0, 3.0}", "float16[3] bias = {1, 2, 3}", "bias is float16 (3,), and float32 (3,)"),
        ("bias", "offset", "weight bias is in the engine alone"),
        ("Add(", "Sub(", "its operators or constants are others"),
        ("{0.5}", "{0.25}", "its operators or constants are others"),
        ("{-1, 3}", "{3, -1}", "its operators or constants are others"),
        ("rows, 3] y", "rows, depth] y", "its operators or constants are others"),
    ],
    ids=["shape", "type", "name", "operator", "single number", "integers", "output"],
)
def test_differences(old: str, new: str, says: str) -> None:
    found = structure().difference(structure(GRAPH.replace(old, new)))
    assert found is not None
    assert says in found


def test_a_file_that_is_not_whole(tmp_path: Path) -> None:
    file = tmp_path / "unet.step.structure.json"
    write_structure(file, structure())
    assert read_structure(file) == structure()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(BundleError, match=r"unet\.step\.structure\.json cannot be read"):
        read_structure(file)
