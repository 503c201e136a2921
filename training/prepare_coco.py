"""Captioned images of COCO for stage 2: ``python -m training.prepare_coco ANNOTATIONS.json IMAGES OUT_DIR``.

Takes a captions file of COCO, such as ``captions_train2014.json``, and the folder of its images, and writes
``OUT_DIR/images.txt``, the list that training takes, and ``OUT_DIR/captions.json``, the captions of each image. The
images stay where they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dvq_rt.files import new_folder, read_json
from runtimes.errors import DataError, guard
from training.cli import guarded
from training.data.listing import some

MOST_BYTES = 1 << 30


def prepare(annotations: Path, images: Path, out: Path) -> tuple[int, int]:
    """Write the list and the captions.

    Args:
        annotations: an object with ``images``, each with ``id`` and ``file_name``, and ``annotations``, each with
            ``image_id`` and ``caption``.
        images: the folder of the images.
        out: a folder that does not exist yet.

    Returns:
        number of images and of captions.

    Raises:
        DataError: the file is no such thing, an image is missing, or ``out`` exists.
    """
    content: Any = read_json(annotations, error=DataError, most=MOST_BYTES)
    with guard(DataError, f"{annotations} is no file of captions as COCO has them"):
        files = {row["id"]: str(row["file_name"]) for row in content["images"]}
        captions: dict[str, list[str]] = {}
        for row in content["annotations"]:
            if text := " ".join(str(row["caption"]).split()):
                captions.setdefault(files[row["image_id"]], []).append(text)
    if not captions:
        raise DataError(f"{annotations} has no captions; give a captions_*.json of COCO")
    folder = images.resolve()
    if missing := [name for name in sorted(captions) if not (folder / name).is_file()]:
        raise DataError(f"{images} lacks {len(missing)} of {len(captions)} captioned images: {some(missing)}")
    there = {(folder / name).as_posix(): texts for name, texts in sorted(captions.items())}
    with new_folder(out, error=DataError) as work:
        (work / "images.txt").write_text("".join(f"{path}\n" for path in there), encoding="utf-8")
        (work / "captions.json").write_text(json.dumps(there, ensure_ascii=False, indent=0), encoding="utf-8")
    return len(there), sum(map(len, there.values()))


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.prepare_coco", description="Prepare captions of COCO.")
    parser.add_argument("annotations", type=Path, help="captions_train2014.json, or another of its kind")
    parser.add_argument("images", type=Path, help="folder of the images")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to make; must not exist")
    args = parser.parse_args(argv)
    count, texts = prepare(args.annotations, args.images, args.out)
    print(f"{count} images, {texts} captions: {args.out / 'images.txt'}")


if __name__ == "__main__":
    main()
