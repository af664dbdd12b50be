import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlrt.runtime.errors import OutputError, PictureError
from controlrt.runtime.pictures import open_control, open_picture, save_control, save_picture, to_depth, to_hint, to_rgb


def gradient(width: int = 12, height: int = 8) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 20, y * 30, (x + y) * 10], axis=-1).astype(np.uint8)


def png_of(width: int, height: int) -> bytes:
    """A few bytes that claim to be a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def test_plain_modes(tmp_path: Path) -> None:
    rgb = Image.fromarray(gradient())
    for mode in ("RGB", "L", "1", "CMYK"):
        rgb.convert(mode).save(path := tmp_path / f"{mode}.tiff")
        assert open_picture(path).mode == "RGB"
        np.testing.assert_array_equal(np.asarray(open_picture(path)), np.asarray(rgb.convert(mode).convert("RGB")))


def test_transparency_lies_over_black(tmp_path: Path) -> None:
    rgba = np.full((4, 4, 4), 200, np.uint8)
    rgba[..., 3] = [0, 64, 128, 255]
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    found = np.asarray(open_picture(tmp_path / "rgba.png"))[0, :, 0]
    np.testing.assert_allclose(found, 200 * np.array([0, 64, 128, 255]) / 255, atol=1)


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(open_picture(tmp_path / "p.png"))[0].tolist() == [[0, 0, 0], [0, 255, 0]]


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_picture(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_undone(tmp_path: Path, orientation: int, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "turned.png")), np.rot90(gradient(), turn))


def test_refusals(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(png, "png")
    (tmp_path / "cut.png").write_bytes(png.getvalue()[:-2000])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "bomb.png").write_bytes(png_of(60_000, 60_000))
    (tmp_path / "large.png").write_bytes(png_of(9_000, 9_000))
    for name, says in [
        ("cut.png", "cut short"),
        ("text.png", "not a picture"),
        ("bomb.png", "pixels"),
        ("large.png", "pixels"),
        ("absent.png", "does not exist"),
        (".", "directory"),
    ]:
        with pytest.raises(PictureError, match=says):
            open_picture(tmp_path / name)


def test_hints_from_arrays_and_pictures_agree() -> None:
    array = gradient(64, 64)
    expected = array.transpose(2, 0, 1) / np.float32(255)
    for picture in (array, Image.fromarray(array), array.astype(np.float32) / 255):
        np.testing.assert_array_equal(to_hint(picture, 64, 64, "canny"), expected)
    assert to_hint(array[..., 0], 64, 64, "canny").shape == (3, 64, 64)
    fine = np.random.default_rng(0).random((64, 64)).astype(np.float32)  # depth maps keep their precision
    np.testing.assert_array_equal(to_hint(fine, 64, 64, "depth"), np.stack([fine] * 3))
    assert to_hint(array[..., :1], 64, 64, "canny").shape == (3, 64, 64)


@pytest.mark.parametrize(
    "picture",
    [
        "edges.png",
        np.zeros((64, 64, 2), np.uint8),
        np.zeros((64, 64), np.int32),
        np.full((64, 64), np.nan, np.float32),
        np.full((64, 64), 2.0),
        np.full((64, 64, 3), -0.5),
        np.full((64, 64, 4), -1.0),
        np.where(np.eye(64), -1, 1.5),
        np.zeros((0, 64), np.uint8),
    ],
)
def test_bad_hints(picture: object) -> None:
    with pytest.raises(PictureError, match="canny"):
        to_hint(picture, 64, 64, "canny")


def test_size_is_refused_or_fitted() -> None:
    array = gradient(100, 50)
    with pytest.raises(PictureError, match="100x50, the output is 64x64"):
        to_hint(array, 64, 64, "canny")
    for resize in ("stretch", "crop", "pad", "fill", "Crop and Resize", 2):
        assert to_hint(array, 64, 64, "canny", resize).shape == (3, 64, 64)
    padded = to_hint(np.full((50, 100), 255, np.uint8), 64, 64, "canny", "pad")
    assert padded[:, 0].max() == 0
    assert padded[:, 32].min() == 1


def masked(height: int, width: int) -> np.ndarray:
    hint = np.random.default_rng(0).random((height, width, 3)).astype(np.float32)
    hint[height // 4 : height // 2, width // 4 : width // 2] = -1
    return hint


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_hints_may_hold_minus_one(kind: type) -> None:
    hint = masked(64, 96).astype(kind)
    found = to_hint(hint, 96, 64, "inpaint")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, hint.transpose(2, 0, 1).astype(np.float32))
    grey = to_hint(hint[..., 0], 96, 64, "inpaint")
    np.testing.assert_array_equal(grey, np.stack([hint[..., 0].astype(np.float32)] * 3))


def test_a_hint_with_minus_one_may_be_fitted() -> None:
    hint = masked(64, 96)
    with pytest.raises(PictureError, match="96x64, the output is 48x32"):
        to_hint(hint, 48, 32, "inpaint")
    found = to_hint(hint, 48, 32, "inpaint", "stretch")
    expected = np.zeros((32, 48), np.bool_)
    expected[8:16, 12:24] = True
    np.testing.assert_array_equal(found == -1, np.stack([expected] * 3))
    assert found[:, ~expected].min() >= 0
    hint[0, 0, 1] = -1  # a pixel is masked where one channel is
    assert (to_hint(hint, 192, 128, "inpaint", "crop")[:, :2, :2] == -1).all()


def test_control_pictures_are_written_and_read(tmp_path: Path) -> None:
    hint = masked(16, 24)
    save_control(hint, tmp_path / "hint.npy")
    np.testing.assert_array_equal(open_control(tmp_path / "hint.npy"), hint)
    save_control(Image.fromarray(gradient()), tmp_path / "hint.png")
    np.testing.assert_array_equal(np.asarray(open_control(tmp_path / "hint.png")), gradient())
    for name in ("hint.png", "hint", "absent/hint.npy"):
        with pytest.raises(OutputError):
            save_control(hint, tmp_path / name)
    (tmp_path / "text.npy").write_text("not an array")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    for name, says in (("absent.npy", "does not exist"), ("text.npy", "NumPy"), ("object.npy", "NumPy")):
        with pytest.raises(PictureError, match=says):
            open_control(tmp_path / name)


def test_a_picture_may_keep_its_mode(tmp_path: Path) -> None:
    levels = np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)
    Image.fromarray(levels).save(tmp_path / "depth.png")
    kept = open_picture(tmp_path / "depth.png", keep_mode=True)
    np.testing.assert_array_equal(np.asarray(kept), levels)
    np.testing.assert_allclose(to_depth(kept), levels / 65535, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(to_rgb(kept)), np.asarray(open_picture(tmp_path / "depth.png")))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    turned = open_picture(tmp_path / "turned.png", keep_mode=True)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(gradient(), 3))
    np.testing.assert_array_equal(np.asarray(to_rgb(turned)), np.rot90(gradient(), 3))  # and not once more


@pytest.mark.parametrize(
    ("picture", "depth"),
    [
        (np.array([[0, 65535]], np.uint16), [[0, 1]]),
        (np.array([[0, 51]], np.uint8), [[0, 0.2]]),
        (np.array([[[0.25], [1.0]]]), [[0.25, 1]]),
        (np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), [[0.299, 0.114]]),
        (Image.fromarray(np.array([[0, 51]], np.int32)), [[0, 0.2]]),
        (Image.fromarray(np.array([[0, 127.5]], np.float32)), [[0, 0.5]]),
        (Image.fromarray(np.array([[0, 51]], np.uint8)).convert("P"), [[0, 0.2]]),
    ],
)
def test_depth(picture: np.ndarray | Image.Image, depth: list[list[float]]) -> None:
    found = to_depth(picture)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, depth, atol=1e-6)
    with pytest.raises(PictureError):
        to_depth(np.full((2, 2), 1.5))


def test_saving_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(gradient())
    save_picture(picture, tmp_path / "out.png")
    before = (tmp_path / "out.png").read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OutputError, match="no space left"):
        save_picture(picture, tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes() == before


@pytest.mark.parametrize("name", ["out", "out.xyz", "absent/out.png"])
def test_bad_output_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError):
        save_picture(Image.fromarray(gradient()), tmp_path / name)
