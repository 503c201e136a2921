"""Pictures to arrays and back, grids and overlays."""

import io
import os
import struct
import sys
import types
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from dvq_rt import images
from dvq_rt.images import (
    FINEST,
    MAX_PIXELS,
    grain_overlay,
    grid,
    image_list,
    image_size,
    open_rgb,
    psnr,
    segment_colours,
    square,
    to_array,
    to_uint8,
)
from runtimes.errors import DataError, InputError


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, more: bytes = b"") -> bytes:
    """A PNG that declares a size and holds no pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + more
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    """A picture as a file in memory."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def pixel(source: Any, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    return open_rgb(source).getpixel(place)


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_formats(tmp_path, kind):
    """Each format that we name can be read."""
    path = tmp_path / "picture"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path, kind)
    assert np.abs(to_array(path, 8)[:, 4, 4] - [1, -1, -1]).max() < 0.05


def test_other_formats_are_refused(tmp_path):
    """A file outside the allow-list is not parsed, whatever its name says."""
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.png", "PPM")
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


def test_every_mode_has_one_meaning():
    """Deep greys are scaled and not cut, floats count from 0 to 1, and other colours are converted."""
    half = {
        "I;16": Image.fromarray(np.full((4, 4), 32768, np.uint16)),
        "I;16B": Image.fromarray(np.full((4, 4), 32768, ">u2")),
        "I": Image.fromarray(np.full((4, 4), 32768, np.int32)),
        "F": Image.fromarray(np.full((4, 4), 0.5, np.float32)),
        "CMYK": Image.new("CMYK", (4, 4), (127, 127, 127, 0)),
        "YCbCr": Image.new("YCbCr", (4, 4), (128, 128, 128)),
        "HSV": Image.new("HSV", (4, 4), (0, 0, 128)),
        "LAB": Image.new("RGB", (4, 4), (128, 128, 128)).convert("LAB"),
        "PA": Image.new("RGB", (4, 4), (128, 128, 128)).convert("P", palette=Image.Palette.ADAPTIVE).convert("PA"),
    }
    for mode, image in half.items():
        assert image.mode == mode
        assert pixel(image) == pytest.approx((128, 128, 128), abs=1), mode
    greys = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(open_rgb(Image.fromarray(greys)))[..., 0], np.arange(256).reshape(16, 16))
    floats = np.linspace(-0.001, 1.001, 16, dtype=np.float32).reshape(4, 4)  # rounding may pass the ends
    assert [pixel(Image.fromarray(floats), place) for place in ((0, 0), (3, 3))] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_files(kind):
    """16 bits a channel, grey or colour, keep their brightness when they come from a file."""
    assert pixel(saved(Image.fromarray(np.full((4, 4), 51200, np.uint16)), kind)) == (199, 199, 199)
    if kind == "PNG":
        row = b"\0" + struct.pack(">HHH", 51200, 256, 65535) * 2
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")
        assert pixel(io.BytesIO(data)) == pytest.approx((199, 1, 255), abs=1)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.full((2, 2), 65536, np.int32)), "mode I and .*values run from 65536 to 65536.*65535"),
        (Image.fromarray(np.array([[-1, 5]], np.int32)), r"values run from -1 to 5.*convert\('RGB'\)"),
        (Image.fromarray(np.array([[0, 200]], np.float32)), r"mode F and .*from 0 to 200, .* in 0\.\.1;"),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), "from nan to nan"),
        (Image.fromarray(np.array([[0, np.inf]], np.float32)), "from 0 to inf"),
        (Image.new("La", (2, 2)), "mode La and cannot be decoded"),
    ],
)
def test_what_would_be_a_guess_is_refused(image, words):
    """Values beyond a mode's range, and modes without a conversion, are refused by name, with the way out."""
    with pytest.raises(InputError, match=words):
        to_array(image, 8)


def test_colour_profiles_become_srgb():
    """A profile's colours are converted, those of sRGB keep every byte, broken or unfitting profiles do nothing."""
    picture = Image.fromarray(noise(32, 32))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "TIFF"):
        kept = open_rgb(saved(picture, kind, icc_profile=srgb))
        assert kept.tobytes() == picture.tobytes()
    swapped = swapped_profile(srgb)
    for profile, mode, given, wanted in (
        (swapped, "RGB", (250, 20, 20), (20, 250, 20)),
        (swapped, "RGBA", (250, 20, 20, 255), (20, 250, 20)),
        (swapped, "P", (250, 20, 20), (20, 250, 20)),
        (swapped, "L", 200, (200, 200, 200)),
        (swapped, "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        (swapped[:300], "RGB", (250, 20, 20), (250, 20, 20)),
        (b"nonsense", "RGB", (250, 20, 20), (250, 20, 20)),
        ("text", "RGB", (250, 20, 20), (250, 20, 20)),
        (srgb, "CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ):
        image = Image.new("RGB", (4, 4), given).quantize() if mode == "P" else Image.new(mode, (4, 4), given)
        image.info["icc_profile"] = profile
        assert pixel(image) == pytest.approx(wanted, abs=12), (mode, profile[:20])
    half = Image.new("RGBA", (4, 4), (250, 20, 20, 128))
    half.info["icc_profile"] = swapped
    assert pixel(half) == pytest.approx((137, 252, 137), abs=12)


def swapped_profile(srgb: bytes) -> bytes:
    """The sRGB profile with red and green exchanged."""
    return srgb.replace(b"rXYZ", b"tmp ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmp ", b"gXYZ", 1)


def test_first_frame_of_animations():
    """Of what moves the beginning is coded."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        assert pixel(saved(frames[0], kind, save_all=True, append_images=frames[1:])) == pytest.approx(
            (255, 0, 0), abs=4
        )


def test_heic_needs_a_plugin(monkeypatch):
    """Without pillow-heif a HEIC file is refused with the way out; with it such a file is read."""
    file = io.BytesIO(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(InputError, match="HEIC or AVIF; install pillow-heif"):
        open_rgb(file)

    def register() -> None:
        reader = lambda file, name: Image.new("RGB", (3, 5), "lime")  # noqa: E731
        monkeypatch.setitem(Image.OPEN, "HEIF", (reader, lambda head: head[4:12] == b"ftypheic"))

    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    images.readers.cache_clear()
    try:
        assert open_rgb(file).size == image_size(file) == (3, 5) and pixel(file) == (0, 255, 0)
    finally:
        images.readers.cache_clear()


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_marks(orientation):
    """Each of the eight marks turns the picture as its owner sees it; others turn nothing."""
    picture = noise(6, 4)
    turned = {
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture),
    }.get(orientation, picture)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(np.asarray(open_rgb(saved(Image.fromarray(picture), kind, exif=exif))), turned)


def test_broken_exif_turns_nothing():
    """A picture is read even if what is written about it cannot be."""
    picture = Image.fromarray(noise(6, 4))
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM", b"rubbish", "text", 3):
        picture.info["exif"] = exif
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert open_rgb(picture).tobytes() == picture.tobytes()


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


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_500, 10_000), (8_193, 8_192)])
def test_huge_files_are_refused_before_decoding(tmp_path, size):
    """A decompression bomb costs nothing: the header alone decides, also beyond Pillow's own limits."""
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(InputError, match=rf"huge\.png is {size[0]} x {size[1]} pixels.*67 megapixels"):
        to_array(path, 64)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_open_image_is_refused_before_decoding():
    """An image object that is open but not decoded is measured first, too."""
    opened = Image.open(io.BytesIO(png_header(10_000, 10_000)))
    with pytest.raises(InputError, match="10000 x 10000"):
        to_array(opened, 64)
    with pytest.raises(InputError, match="67108865"):
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
    for bad in (noise(4, 4).astype(np.float32), noise(4, 4)[..., :2], noise(4, 4)[:0], noise(4, 4)[..., 0, 0]):
        with pytest.raises(InputError, match=r"uint8 \[H, W, 3\]"):
            to_array(bad, 4)
    with pytest.raises(InputError, match="bytes"):
        to_array(data, 8)
    with pytest.raises(InputError, match="size is 0"):
        to_array(noise(4, 4), 0)


def webp_header(width: int, height: int, kind: bytes) -> bytes:
    """The beginning of a WebP file of one of its three kinds."""
    if kind == b"VP8X":
        body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little")
    else:
        body = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    body = kind + struct.pack("<I", len(body)) + body.ljust(20, b"\0")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def gif_header(width: int, height: int) -> bytes:
    """A GIF whose one frame has no pixels."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x00\x3b"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame


@pytest.mark.parametrize("size", [(16_383, 16_383), (16_383, 12_001), (9_001, 9_000)])
def test_huge_files_of_every_format(tmp_path, size):
    """The cap holds for each format, says the size, and comes before the reader makes room for the picture."""
    files = {f"{kind.decode().strip()}.webp": webp_header(*size, kind) for kind in (b"VP8X", b"VP8L", b"VP8 ")}
    files["a.gif"] = gif_header(*size)
    files["a.bmp"] = b"BM" + bytes(12) + struct.pack("<IiiHH", 40, *size, 1, 24) + bytes(24)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258], tags[259], tags[262], tags[273] = *size, 8, 1, 1, 8
    files["a.tiff"] = b"II*\0\x08\0\0\0" + tags.tobytes(8)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        for function in (open_rgb, image_size):
            with pytest.raises(InputError, match=rf"{name} is {size[0]} x {size[1]} pixels.*scale it down"):
                function(tmp_path / name)


def test_huge_tiles_are_refused():
    """A small picture whose file has tiles of gigabytes makes no room for them."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: 8, 257: 8, 258: 8, 259: 5, 262: 1, 322: 40_000, 323: 40_000, 324: 8, 325: 9}.items():
        tags[tag] = value
    with pytest.raises(InputError, match="a tile of the image is 40000 x 40000 pixels"):
        open_rgb(io.BytesIO(b"II*\0\x08\0\0\0" + tags.tobytes(8)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_what_pillow_refuses_in_its_own_ways():
    """Readers raise nearly anything on odd files; it is our error with the file's name and the cause."""
    bomb = zlib.compress(bytes(1 << 26))
    text = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(80))
    files = {
        "text": png_header(4, 4, chunk(b"zTXt", b"key\0\0" + bomb)),
        "texts": png_header(4, 4, text),
        "international text": png_header(4, 4, chunk(b"iTXt", b"key\0\1\0\0\0" + bomb)),
        "profile": png_header(4, 4, chunk(b"iCCP", b"icc\0\0" + bomb)),
        "no chunks": b"\x89PNG\r\n\x1a\n",
        "bad checksum": png_header(4, 4)[:29] + b"abcd" + png_header(4, 4)[33:],
        "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
        "gif": b"GIF89a\x04\0\x04\0\xf7",
        "tiff": b"II*\0\xff\xff\xff\x7f",
        "bmp": b"BM" + bytes(40),
        "webp": webp_header(4, 4, b"VP8 "),
        "avif": b"\0\0\0\x1cftypavif" + bytes(60),
    }
    assert len(bomb) < 1 << 17
    for name, data in files.items():
        with pytest.raises(InputError, match=r"the image .*(damaged|decoded)") as caught:
            open_rgb(io.BytesIO(data))
        assert caught.value.__cause__ is not None, name
        with pytest.raises(DataError):
            open_rgb(io.BytesIO(data), error=DataError)


def test_flipped_bytes_are_errors_of_ours():
    """Whatever one wrong byte makes of a file of any format, the answer is a picture or an InputError."""
    picture = Image.fromarray(noise(9, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"):
            data = bytearray(saved(picture, kind).getvalue())
            for place in range(0, len(data), 5):
                data[place] ^= 0xFF
                with suppress(InputError):
                    assert open_rgb(io.BytesIO(data)).mode == "RGB"
                data[place] ^= 0xFF


def test_paths_that_are_none(tmp_path):
    """Names that no file can have, folders, pipes, devices and sparse giants are refused at once, by name."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    for bad in ("a\0b.png", "\udcff\ud800.png", "", tmp_path, tmp_path / "pipe.png", tmp_path / "dangling.png"):
        for function in (open_rgb, image_size):
            with pytest.raises(InputError, match="does not exist or is not a file"):
                function(bad)
    with (tmp_path / "big.png").open("wb") as file:
        file.write(png_header(4, 4))
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"big\.png: it has 1099511627776 bytes; at most"):
        image_size(tmp_path / "big.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    Image.fromarray(noise(4, 4)).save(tmp_path / "real.png")
    assert image_size(tmp_path / "link.png") == (4, 4)


class Pipe(io.RawIOBase):
    """A stream that can be read only once."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.data.readinto(buffer)


def test_files_in_memory():
    """Binary files are read from their start, whether they can be rewound or not, and stay open."""
    picture = noise(8, 8)
    file = saved(Image.fromarray(picture), "PNG")  # stands at its end
    for source in (file, io.BufferedReader(Pipe(file.getvalue()))):
        np.testing.assert_array_equal(np.asarray(open_rgb(source)), picture)
        assert not source.closed
    for bad, words in (
        (io.StringIO("text"), "the image is a text file; open it in binary mode"),
        (io.BytesIO(), "the image is damaged or of another format"),
        (file.getvalue(), "the image is a bytes; give a path"),
        (types.SimpleNamespace(read=lambda n: 1 // 0), "cannot read the image: .*zero"),
    ):
        with pytest.raises(InputError, match=words):
            open_rgb(bad)


def test_arrays():
    """Grey, colour and transparent bytes are taken from anything that numpy can see as an array."""
    grey, clear = noise(4, 4)[..., 0], np.dstack([noise(4, 4), np.zeros((4, 4), np.uint8)])
    for one in (grey, grey[..., None]):
        np.testing.assert_array_equal(np.asarray(open_rgb(one)), np.repeat(grey[..., None], 3, 2))
    assert np.asarray(open_rgb(clear)).min() == 255
    assert open_rgb(np.asfortranarray(noise(4, 6))[::-1]).size == (6, 4)

    class Tensor:
        def __init__(self, values: Any) -> None:
            self.values = values

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            if isinstance(self.values, Exception):
                raise self.values
            return self.values

    np.testing.assert_array_equal(np.asarray(open_rgb(Tensor(noise(4, 4)))), noise(4, 4))
    for bad in (
        *(Tensor(RuntimeError("on another device")), Tensor(TypeError()), Tensor(noise(4, 4).astype(float)), None, 3),
        *(np.zeros((3, 8, 8), np.uint8), np.zeros((1, 4, 4, 3), np.uint8), np.uint8(3), np.zeros((4, 4), bool)),
        *(np.zeros((4, 4), np.uint16), np.array(["a.png"]), np.zeros((0, 4, 3), np.uint8), object(), [1], {}),
    ):
        for function in (open_rgb, image_size, lambda value: to_array(value, 4)):
            with pytest.raises(InputError, match="the image"):
                function(bad)
    for size in (None, "8", 1.5, True, -1, 10**9):
        with pytest.raises(InputError, match="size is"):
            to_array(noise(4, 4), size)


def test_torch_tensors():
    """A byte tensor is a picture or several; a float one is refused."""
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(noise(4, 4))
    np.testing.assert_array_equal(np.asarray(open_rgb(tensor)), noise(4, 4))
    assert len(image_list(torch.stack([tensor] * 3))) == 3
    for bad in (tensor.float(), tensor.float().requires_grad_(), tensor.to("meta")):
        with pytest.raises(InputError, match="the image"):
            open_rgb(bad)


def test_one_or_many(tmp_path):
    """What is plainly one picture or several is taken as such, in order; what has no order is refused."""
    one, many = noise(4, 4), np.stack([noise(4, 4, seed) for seed in range(3)])
    for single in (one, one[..., 0], "a.png", tmp_path, Image.fromarray(one), io.BytesIO(), None, 3, b"bytes"):
        assert len(image_list(single)) == 1
    assert [r.tolist() for r in image_list(many)] == many.tolist()
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for several in (paths, tuple(paths), iter(paths), (Path(path) for path in paths), np.array(paths)):
        assert [str(path) for path in image_list(several)] == paths
    assert image_list([]) == [] and image_list(np.zeros((0, 4, 4, 3), np.uint8)) == []

    def failing() -> Any:
        yield one
        raise OSError("the disk is gone")

    for bad, words in (({"a": one}, "dict"), ({"a.png"}, "set"), (failing(), "the disk is gone")):
        with pytest.raises(InputError, match=words):
            image_list(bad)


def test_square():
    """The centre square alone is resized, so the result is what ``to_array`` codes."""
    picture = Image.fromarray(noise(40, 60))
    pixels = square(picture, 16)
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, to_uint8(to_array(picture, 16)[None])[0])
    np.testing.assert_array_equal(square(picture, 40), np.asarray(picture)[:, 10:50])


def test_psnr():
    """Equal pictures have no noise; one step of 255 everywhere is 0 dB."""
    picture = noise(4, 4)
    assert psnr(picture, picture) == float("inf")
    assert psnr(np.zeros_like(picture), np.full_like(picture, 255)) == 0
    assert psnr(np.zeros((10, 10), np.uint8), np.eye(10, dtype=np.uint8) * 51) == pytest.approx(23.98, abs=0.01)


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


def test_overlay_of_any_number_of_grains():
    """Each of n segments has a colour of its own, and with two and three they are those that pictures always had."""
    for count in range(1, 8):
        assert len({*segment_colours(count)}) == count
    assert segment_colours(3) == [images.COARSEST, images.BETWEEN, FINEST] and segment_colours(2)[1] == FINEST
    picture = np.full((16, 16, 3), 128, dtype=np.uint8)
    made = np.asarray(grain_overlay(picture, np.array([[0, 1], [2, -1]]), (2, 4, 8), scale=4))
    cells = made.reshape(2, 32, 2, 32, 3).swapaxes(1, 2).reshape(4, -1, 3)
    assert len({tuple(np.rint(cell.mean(0)).astype(int)) for cell in cells}) == 4
    rows = [made[r * 32 + 5, c * 32 + 1 : c * 32 + 32, 0].astype(int) for r, c in ((0, 0), (0, 1), (1, 0))]
    lines = [np.count_nonzero(np.diff(row)) for row in rows]
    assert lines == [0, 2, 6]  # inside a cell of one, two and four codes a side
    for bad in (None, "grain", [[0, 5], [0, 0]]):
        with pytest.raises(InputError, match="grain"):
            grain_overlay(picture, bad, (2, 4, 8))
