"""Engines side by side on held-out images: ``python -m training.compare DATA ENGINE ENGINE ... --out PICTURE``.

Prints codes per image, bits per pixel, PSNR and SSIM of each engine, and draws originals above each engine's coded
cells and reconstructions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dvq_rt import Generator
from dvq_rt.images import grain_overlay
from runtimes.errors import ConfigError
from training.cli import guarded
from training.config import read_config
from training.judging.metrics import cost, fidelity, through
from training.judging.report import enlarged, pick, save_picture, sheet, table
from training.loop import TrainConfig
from training.objective import StageOneConfig
from training.train_tokenizer import held_out_folder

COLUMNS = 10


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.compare", description=__doc__)
    parser.add_argument("data", help="folder of images that the engines' models were trained on")
    parser.add_argument("engines", nargs="+", metavar="ENGINE", help="engine folder, demo:dq or demo:mq")
    parser.add_argument("--out", required=True, help="picture to write")
    parser.add_argument("--tokenizer-config", default="emoji_tokenizer", help="stage 1, for its held-out images")
    args = parser.parse_args(argv)
    sections: dict[str, Any] = {"tokenizer": dict, "training": TrainConfig, "stage": StageOneConfig}
    first = read_config(args.tokenizer_config, sections, [])
    generators = [Generator(engine) for engine in args.engines]
    sizes = {generator.manifest.image_size for generator in generators}
    if len(sizes) > 1:
        raise ConfigError(f"the engines make images of {sorted(sizes)} pixels; compare engines of one size")
    folder = held_out_folder(args.data, sizes.pop(), first["training"], first["stage"])
    folder.check_held_out()
    images, _ = folder.load(folder.val)
    shown = pick(len(images), COLUMNS)
    pictures = [("original", [enlarged(images[i]) for i in shown])]
    rows = []
    for name, generator in zip(args.engines, generators, strict=True):
        codes, decoded = through(generator, images, name)
        spent, kept = cost(codes, folder.size), fidelity(images, decoded)
        rows.append([name, spent["codes"], spent["bits_per_pixel"], f"{kept['psnr']:.2f}", kept["ssim"]])
        scale, sides = pictures[0][1][0].width // folder.size, generator.layout.sides
        overlays = [grain_overlay(images[i], codes[i].grain, sides, scale).convert("RGB") for i in shown]
        pictures.append((f"{name}: codes", overlays))
        pictures.append((f"{name}: decoded", [enlarged(decoded[i]) for i in shown]))
    save_picture(Path(args.out), sheet(pictures))
    print(table(["engine", "codes per image", "bits per pixel", "PSNR, dB", "SSIM"], rows))
    print(Path(args.out))


if __name__ == "__main__":
    main()
