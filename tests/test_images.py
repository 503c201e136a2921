"""Pictures to arrays and back, grids and overlays."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dvq_rt.images import MAX_PIXELS, grain_overlay, grid, to_array, to_uint8
from runtimes.errors import InputError


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bytes_survive_the_round_trip():
    """All 256 values come back exactly, so that reconstruction errors are the model's and not ours."""
    picture = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    array = to_array(picture, 16)
    assert array.dtype == np.float32 and array.shape == (3, 16, 16) and array.flags.c_contiguous
    assert array.min() == -1 and array.max() == 1
    np.testing.assert_array_equal(to_uint8(array[None])[0], picture)


def test_to_uint8_clips_and_refuses_nan():
    """Values beyond [-1, 1] saturate; NaN, which would become any byte, is an error."""
    images = np.zeros((1, 3, 1, 2), dtype=np.float32)
    images[0, :, 0] = [-7.0, np.inf]
    assert to_uint8(images).tolist() == [[[[0, 0, 0], [255, 255, 255]]]]
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        to_uint8(images)
    with pytest.raises(InputError, match="shape"):
        to_uint8(images[0])


def test_path_image_and_array_agree(tmp_path):
    """The same pixels give the same numbers whichever way they come in."""
    picture = noise(20, 20)
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    expected = to_array(picture, 20)
    for given in (path, str(path), Image.fromarray(picture), Image.open(path)):
        np.testing.assert_array_equal(to_array(given, 20), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_formats(tmp_path, kind):
    """Each format that we name can be read."""
    path = tmp_path / "picture"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path, kind)
    assert np.abs(to_array(path, 8)[:, 4, 4] - [1, -1, -1]).max() < 0.05


def test_other_formats_are_refused(tmp_path):
    """A file outside the allow-list is not parsed, whatever its name says."""
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png.*PNG, JPEG"):
        to_array(tmp_path / "a.png", 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    """Hidden colours under transparent pixels do not leak into the picture."""
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    if mode == "LA":
        picture = Image.new("LA", (4, 4), (10, 0))
    elif mode == "P":
        picture = Image.new("P", (4, 4), 0)
        picture.putpalette([200, 10, 10] * 256)
        picture.info["transparency"] = 0
    np.testing.assert_array_equal(to_array(picture, 4), np.ones((3, 4, 4), dtype=np.float32))


def test_grey_palette_and_bitmap_modes():
    """Pictures with one channel are taken as grey."""
    for mode, value, expected in (("L", 51, -0.6), ("1", 255, 1.0), ("P", 255, 1.0)):
        array = to_array(Image.new("L", (4, 4), value).convert(mode), 4)
        assert array.shape == (3, 4, 4) and np.abs(array - expected).max() < 1e-6


@pytest.mark.parametrize("mode", ["F", "I", "I;16", "CMYK", "YCbCr", "LAB", "HSV"])
def test_exotic_modes_are_refused(mode):
    """A mode whose conversion would be a guess is refused by name, with the way out."""
    with pytest.raises(InputError, match=rf"mode {mode}.*convert"):
        to_array(Image.new(mode, (8, 8)), 8)


def test_centre_crop_and_resize():
    """The shorter side is kept whole and the centre is used; the picture is not squeezed."""
    picture = np.zeros((10, 30, 3), dtype=np.uint8)
    picture[:, 10:20] = 255
    np.testing.assert_array_equal(to_array(picture, 10), np.ones((3, 10, 10), dtype=np.float32))
    assert to_array(picture, 5).min() > 0.85  # the filter sees a little of the neighbours
    assert to_array(picture.transpose(1, 0, 2).copy(), 40).min() > -0.2
    assert to_array(noise(3, 50_000), 8).shape == (3, 8, 8)


def test_orientation_mark_is_obeyed(tmp_path):
    """A camera's turned photograph is coded as its owner sees it."""
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "turned.png"
    Image.fromarray(picture).save(path, exif=exif)
    np.testing.assert_array_equal(to_array(path, 8), to_array(picture[::-1, ::-1].copy(), 8))


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_500, 10_000), (8_001, 8_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_files_are_refused_before_decoding(tmp_path, size):
    """A decompression bomb costs nothing: the header alone decides, also beyond Pillow's own limits."""
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(InputError, match=rf"huge\.png is {size[0]} x {size[1]} pixels.*64 megapixels"):
        to_array(path, 64)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_open_image_is_refused_before_decoding():
    """An image object that is open but not decoded is measured first, too."""
    opened = Image.open(io.BytesIO(png_header(10_000, 10_000)))
    with pytest.raises(InputError, match="10000 x 10000"):
        to_array(opened, 64)
    with pytest.raises(InputError, match="64000001"):
        to_array(np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (1, MAX_PIXELS + 1, 3)), 64)


def test_unreadable_inputs_are_named(tmp_path):
    """Missing, empty, cut and foreign inputs give our error with the file's name."""
    with pytest.raises(InputError, match=r"nowhere\.png does not exist"):
        to_array(tmp_path / "nowhere.png", 8)
    with pytest.raises(InputError, match="not a file"):
        to_array(tmp_path, 8)
    path = tmp_path / "cut.png"
    Image.fromarray(noise(32, 32)).save(path)
    data = path.read_bytes()
    for end in range(0, len(data) - 16, 97):
        path.write_bytes(data[:end])
        with pytest.raises(InputError, match=r"cut\.png"):
            to_array(path, 8)
    for bad in (noise(4, 4).astype(np.float32), noise(4, 4)[..., :2], noise(4, 4)[:0], noise(4, 4)[..., 0]):
        with pytest.raises(InputError, match=r"uint8 \[H, W, 3\]"):
            to_array(bad, 4)
    with pytest.raises(InputError, match="bytes"):
        to_array(data, 8)
    with pytest.raises(InputError, match="size is 0"):
        to_array(noise(4, 4), 0)


def test_grid_places_pictures_in_reading_order():
    """Sample i is found where the reader looks for it, and the rest is white."""
    pictures = np.stack([np.full((4, 6, 3), value, dtype=np.uint8) for value in (10, 20, 30)])
    made = np.asarray(grid(pictures, columns=2, gap=1))
    assert made.shape == (11, 15, 3)
    assert made[1:5, 1:7].max() == 10 and made[1:5, 8:14].min() == 20 and made[6:10, 1:7].max() == 30
    assert made[6:10, 8:14].min() == 255 and made[0].min() == 255
    assert grid(pictures, gap=0).size == (12, 8)
    assert grid(pictures, columns=9, gap=0).size == (18, 4)
    for bad in (pictures[:0], pictures[0], pictures.astype(float)):
        with pytest.raises(InputError, match="grid needs"):
            grid(bad)
    with pytest.raises(InputError, match="columns is 0"):
        grid(pictures, columns=0)
    with pytest.raises(InputError, match="gap is -1"):
        grid(pictures, gap=-1)


def test_overlay_marks_the_fine_cells():
    """Cells keep their places: the fine corner is tinted and subdivided, coarse cells keep their colours inside."""
    picture = np.full((16, 16, 3), 255, dtype=np.uint8)
    grain = np.array([[0, 0], [0, 1]])
    made = np.asarray(grain_overlay(picture, grain, (2, 4), scale=4))
    assert made.shape == (64, 64, 3)
    changed = (made != 255).any(axis=2)
    assert changed[32:, 32:].all() and changed[32, :].all()
    assert not changed[1:32, 1:32].any()
    assert (made[48, 33:] != made[47, 33:]).any() and (made[16, :32] == made[15, :32]).all()
    with pytest.raises(InputError, match="grain has shape"):
        grain_overlay(picture, np.zeros((3, 3), int), (2, 4))
    with pytest.raises(InputError, match=r"-1\.\.1"):
        grain_overlay(picture, grain + 1, (2, 4))
    masked = np.asarray(grain_overlay(picture, grain - 1, (2,), scale=4))  # only the last cell has a code
    assert masked[:32].max() < 120 and masked[33:, 33:].min() == 255
    with pytest.raises(InputError, match="scale is 0"):
        grain_overlay(picture, grain, (2, 4), scale=0)
