"""Prepare the demo data: emoji as a folder of small PNG files, one sub-folder per Unicode class.

``python -m training.prepare_emoji OUT_DIR [--styles 3d flat] [--archive FILE.tgz ...] [--size 64]
[--classes group|subgroup]`` takes the npm packages from given archives or fetches them with ``npm pack``, and writes
``OUT_DIR/<class>/<codepoints>.png`` and ``OUT_DIR/captions.json`` (relative path to Unicode name). Images of the flat
style are in ``flat-<class>``, and their captions end in ", flat".
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from PIL import Image

from dvq_rt.files import new_folder, open_regular
from dvq_rt.progress import progress_bar
from runtimes.errors import DataError, guard
from training.cli import guarded

Classes = Literal["group", "subgroup"]


class Style(NamedTuple):
    """Emoji drawn alike: the npm package; its images, by a pattern of their paths and in words; what stands before
    their classes and behind their captions; and whether all of them must be in the table."""

    package: str
    member: re.Pattern[str]
    images: str
    prefix: str = ""
    suffix: str = ""
    whole: bool = True


STYLES = {
    "3d": Style(
        "@lobehub/fluent-emoji-3d@1.1.0", re.compile(r"package/assets/([0-9a-z_-]+)\.webp"), "package/assets/*.webp"
    ),
    "flat": Style(
        "emoji-datasource-google@16.0.0",
        re.compile(r"package/img/google/64/([0-9a-z-]+)\.png"),
        "package/img/google/64/*.png",
        "flat-",
        ", flat",
        whole=False,
    ),
}
"""Microsoft's Fluent Emoji (MIT), and Google's Noto Emoji (Apache 2.0; flags are in the public domain) with 64 pixels,
which has emoji of Unicode 16 that the table of Unicode 15 lacks."""

_MAX_MEMBER_BYTES = 1 << 20
_EXPANSION = 4  # times its own size, to which an archive of pictures may unpack: they are compressed already
_MAX_SIDE = 1024
_UNKEYED = {0xFE0F, 0xE007F}  # variation selector and cancel tag: file names carry them or not, so keys never do


class Emoji(NamedTuple):
    """One row of the table: group and subgroup are folder names, name is Unicode's, skin tone included."""

    group: str
    subgroup: str
    name: str


def emoji_key(stem: str) -> str | None:
    """The table's key of a file name without its ending (``0031-fe0f-20e3`` gives ``31-20e3``), None if not hex."""
    try:
        points = [int(part, 16) for part in re.split("[-_]", stem)]
    except ValueError:
        return None
    return "-".join(f"{point:x}" for point in points if point not in _UNKEYED)


def load_table() -> dict[str, Emoji]:
    """Unicode's classes and names by key (see ``emoji_key``), from the table that ships with this package."""
    text = resources.files("training").joinpath("emoji.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith(("#", "codepoints")))
    return {key: Emoji(group, subgroup, name) for key, group, subgroup, name in rows}


class _Bounded:
    """A file of which only so much is read at a time as a real package needs: ``tarfile`` reads a header whole, however
    long it says it is."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_MEMBER_BYTES:
            raise ValueError(f"it has a part of {size} bytes")
        return self._file.read(size)


def _open_tar(file: Any) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8")


def read_archive(archive: Path, style: Style) -> Iterator[tuple[str, bytes]]:
    """Yield (file name without ending, bytes) of every image in the package, one at a time; nothing is extracted to
    disk.

    Raises DataError when the archive cannot be read, holds no images, or an image of an implausible size, or unpacks to
    far more than images do.
    """
    empty, mend = True, f"give the .tgz that `npm pack {style.package}` writes"
    with (
        guard(DataError, f"cannot read the archive {archive}", mend),
        open_regular(archive) as file,
        gzip.open(file) as plain,
        _open_tar(_Bounded(plain)) as tar,
    ):
        most = _EXPANSION * os.fstat(file.fileno()).st_size + _MAX_MEMBER_BYTES
        for member in tar:
            if member.offset_data + member.size > most:
                raise DataError(f"{archive} unpacks to more than {most} bytes; this is not {style.package}")
            match = style.member.fullmatch(member.name)
            if match is None or not member.isreg():
                continue
            if member.size > _MAX_MEMBER_BYTES:
                raise DataError(
                    f"{archive}: {member.name} has {member.size} bytes, more than the {_MAX_MEMBER_BYTES} allowed; "
                    f"this is not {style.package}"
                )
            stream = tar.extractfile(member)
            assert stream is not None  # a regular member has a stream
            empty = False
            yield match[1], stream.read()
    if empty:
        raise DataError(f"{archive} holds no {style.images}; {mend}")


def fetch_archive(package: str, folder: Path) -> Path:
    """Fetch a package into ``folder``, which it makes, with the npm client and return the path of the .tgz."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm is not installed; install it, or get {package} elsewhere and give it with --archive")
    folder.mkdir()
    done = subprocess.run([npm, "pack", package], cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        tail = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise DataError(
            f"`npm pack {package}` failed with exit status {done.returncode}: {tail or 'no message'}; "
            "mend npm's access to its registry, or give the package with --archive"
        )
    return archives[0]


def render(data: bytes, size: int) -> Image.Image:
    """Encoded RGBA image to RGB of ``size`` x ``size``: on white first, then padded to a square and resized (Lanczos).

    Compositing before resizing weights colours by alpha, so transparent pixels leave no dark fringe.
    Raises ValueError or OSError when the bytes are no image or more than 1,024 pixels wide or high.
    """
    with Image.open(io.BytesIO(data), formats=["WEBP", "PNG"]) as image:
        if max(image.size) > _MAX_SIDE:
            raise ValueError(f"image of {image.width} x {image.height} pixels")
        rgba = image.convert("RGBA")
    side = max(rgba.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def prepare(
    archives: Mapping[str, Path], out: Path, *, size: int = 64, classes: Classes = "subgroup", progress: bool = True
) -> tuple[int, int]:
    """Write ``out/<class>/<codepoints>.png`` and ``out/captions.json`` from the packages' .tgz.

    Args:
        archives: the npm package of each style, by names of ``STYLES``.
        out: a folder that does not exist yet; it appears complete or not at all.
        size: side of the square images, 8 to 256 pixels.
        classes: Unicode's groups or subgroups as class names.
        progress: show a progress bar.

    Returns the number of images and of classes. Raises DataError when ``out`` exists, ``size`` or ``classes`` is out of
    range, an archive is not its package, or a file in one that should be in the table whole is no emoji of it.
    """
    _check_request(out, size, classes)
    captions: dict[str, str] = {}
    with new_folder(out, error=DataError) as work:
        for name, archive in archives.items():
            captions |= _write_style(STYLES[name], archive, work, size, classes, progress)
        text = json.dumps(captions, ensure_ascii=False, indent=0, sort_keys=True)
        (work / "captions.json").write_text(text + "\n", encoding="utf-8")
    return len(captions), len({path.split("/")[0] for path in captions})


def _write_style(
    style: Style, archive: Path, work: Path, size: int, classes: Classes, progress: bool
) -> dict[str, str]:
    """Write the images of one package, and return their captions."""
    table, captions = load_table(), dict[str, str]()
    unknown: list[str] = []
    for stem, data in progress_bar(read_archive(archive, style), desc="emoji", unit="image", disable=not progress):
        emoji = table.get(emoji_key(stem) or "")
        if emoji is None:
            unknown.append(stem)
            continue
        relative = f"{style.prefix}{getattr(emoji, classes)}/{stem}.png"
        captions[relative] = emoji.name + style.suffix
        with guard(DataError, f"{archive}: the image {stem} cannot be read", f"use {style.package}"):
            picture = render(data, size)
        target = work / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        found = f"{archive}: {len(unknown)} files are no emoji that training/emoji.tsv knows: "
        found += f"{', '.join(unknown[:10])}{more}; "
        if style.whole or not captions:
            raise DataError(f"{found}use {style.package}, or add them to the table")
        print(f"{found}they are left out", file=sys.stderr)
    return captions


def _check_request(out: Path, size: int, classes: str) -> None:
    if os.path.lexists(out):
        raise DataError(f"{out} already exists; remove it or choose another folder")
    if not 8 <= size <= 256:
        raise DataError(f"size {size} is out of range; choose 8 to 256 pixels")
    if classes not in get_args(Classes):
        raise DataError(f"classes {classes!r} is unknown; choose one of {', '.join(get_args(Classes))}")


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.prepare_emoji", description="Prepare the emoji demo set.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to make; must not exist")
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=["3d"], help="sets of emoji (3d)")
    packages = ", ".join(f"{style.package} ({name})" for name, style in STYLES.items())
    parser.add_argument(
        "--archive", type=Path, nargs="+", metavar="FILE.tgz", help=f"of each style {packages}; default: npm pack"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default 64)")
    parser.add_argument("--classes", choices=get_args(Classes), default="subgroup", help="what makes a class")
    args = parser.parse_args(argv)
    _check_request(args.out, args.size, args.classes)
    if len(set(args.styles)) < len(args.styles):
        raise DataError(f"--styles {' '.join(args.styles)} names a style twice; give each once")
    if args.archive and len(args.archive) != len(args.styles):
        raise DataError(f"--archive has {len(args.archive)} files for {len(args.styles)} styles; give one for each")
    with tempfile.TemporaryDirectory() as folder:
        archives = args.archive or [fetch_archive(STYLES[name].package, Path(folder, name)) for name in args.styles]
        named = dict(zip(args.styles, archives, strict=True))
        count, class_count = prepare(named, args.out, size=args.size, classes=args.classes)
    print(f"{count} images, {class_count} classes: {args.out}")


if __name__ == "__main__":
    main()
