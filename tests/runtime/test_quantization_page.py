"""The page of what is in int8 or fp8: every block and layer is on it, it is sound, and no name can break it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from controlrt.runtime.commands import main
from controlrt.runtime.inspection.quantization_page import quantization_document
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.page.markup import NOTHING
from page_checker import HOSTILE, Checker

RECORDED = Path(__file__).parent / "quantized_manifest.json"


def recorded(precision: str = "int8", hostile: str = "", **changes: object) -> Manifest:
    """The manifest of a build of the demo model, shortened; what its blocks cost and save is made up."""
    found = json.loads(RECORDED.read_text())
    found["precision"] = found["quantization"]["precision"] = precision
    found["quantization"] |= changes
    found["provenance"]["command"] += hostile
    for each in (*found["quantization"]["layers"], *found["quantization"]["blocks"]):
        each["name"] += hostile
        each["part"] += hostile
    return msgspec.convert(found, Manifest)


def page_of(manifest: Manifest, name: str = "bundle") -> str:
    assert manifest.quantization is not None
    return quantization_document(name, manifest, manifest.quantization)


def cells(text: str, name: str) -> list[str]:
    """Of the first row that is called so."""
    row = re.findall(rf'<tr><th scope="row">{re.escape(name)}</th>(.*?)</tr>', text)[0]
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


def test_every_block_says_what_it_costs_and_why_it_was_chosen_or_not() -> None:
    manifest = recorded()
    text, found = page_of(manifest), manifest.quantization
    assert found is not None
    assert {block.kept for block in found.blocks} == {None, "it is no faster here", "the quality budget was spent"}
    for block in found.blocks:
        part, error, saved, precision, why = cells(text, block.name)
        assert (part, float(error)) == (block.part, pytest.approx(block.latent_error, rel=0.01))
        assert float(saved.removesuffix(" ms")) == pytest.approx(block.seconds_saved * 1e3, abs=0.01)
        assert precision == ("int8" if block.chosen else "as it was")
        assert why == (block.kept or "it saves the most time for its error")


@pytest.mark.parametrize(("precision", "largest"), [("int8", 127), ("fp8", 448)])
def test_every_layer_says_what_it_is_in(precision: str, largest: int) -> None:
    manifest = recorded(precision, blocks=[], budget=None)
    text = page_of(manifest)
    assert manifest.quantization is not None
    for layer in manifest.quantization.layers:
        form, amax, scale, why = cells(text, layer.name)
        assert float(amax) == pytest.approx(layer.amax, rel=1e-3)
        assert form == (precision if layer.kept is None else "as it was")
        assert why == (layer.kept or "")
        if layer.kept is None:
            assert float(scale) == pytest.approx(layer.amax / largest, rel=1e-3)
    assert "No block was measured by itself" in text


def test_the_gate_s_numbers_are_on_it() -> None:
    manifest = recorded()
    page, found = Checker(page_of(manifest)), manifest.quantization
    assert found is not None
    quality = found.quality
    for text in (f"{quality.psnr_db:.2f} dB on average", f"{quality.lowest_psnr_db:.2f} dB the worst"):
        assert text in page.words
    for text in (f"{quality.ssim:.4f}", f"{found.budget:g}:", found.statistics, manifest.provenance.command):
        assert text in page.words
    for step, error in enumerate(quality.latent_errors, 1):
        assert f"step {step}: {error:.2e}" in page.words
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert pictures[0] == "Error of the latents after each step"
    assert len(pictures) == 2
    assert page.elements["circle"] == len(quality.latent_errors) + len(found.blocks)


def test_nothing_points_outside_and_links_lead_somewhere() -> None:
    text = page_of(recorded())
    assert not re.search(r"https?://|//[a-z]|url\(|@import|<script|<link|<img", text)
    page = Checker(text)
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    links = {value.removeprefix("#") for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links <= set(identifiers)


def test_names_cannot_break_the_page() -> None:
    hostile = Checker(page_of(recorded(hostile=HOSTILE), HOSTILE))
    assert hostile.elements == Checker(page_of(recorded())).elements
    assert HOSTILE in hostile.words


def test_a_page_needs_something_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 2
    assert "--html is for --quantization" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_weights_alone_are_quantized_inputs_have_no_scale() -> None:
    manifest = msgspec.structs.replace(recorded(), backend="tensorrt-rtx")
    assert manifest.quantization is not None
    layer = next(layer for layer in manifest.quantization.layers if layer.kept is None)
    both, weights = (cells(page_of(each), layer.name) for each in (recorded(), manifest))
    assert both[:2] == weights[:2]
    assert both[2] != weights[2] == NOTHING
    assert "Weights alone are quantized" in page_of(manifest)
    assert "Weights alone are quantized" not in page_of(recorded())
