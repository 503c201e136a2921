"""Code images, keep the codes in a file and decode them: reconstructions above the cells that have codes.

python examples/encode_decode.py cat.jpg dog.png --engine demo:mq --codes codes.npz --out coded.png
"""

import argparse

import numpy as np

import dvq_rt
from dvq_rt.images import grain_overlay, grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", nargs="+")
parser.add_argument("--engine", default="demo:dq", help="demo:dq, demo:mq or an engine folder")
parser.add_argument("--codes", default="codes.npz")
parser.add_argument("--out", default="coded.png")
args = parser.parse_args()

generator = dvq_rt.Generator(args.engine)
dvq_rt.save_codes(args.codes, generator.encode(args.images))
codes = dvq_rt.load_codes(args.codes)
decoded = generator.decode(codes)
scale = max(1, 256 // decoded.shape[1])
cells = [grain_overlay(image, c.grain, c.layout.sides, scale) for image, c in zip(decoded, codes, strict=True)]
pictures = np.concatenate([decoded.repeat(scale, 1).repeat(scale, 2), np.stack([np.asarray(cell) for cell in cells])])
grid(pictures, columns=len(codes)).save(args.out)
for path, c in zip(args.images, codes, strict=True):
    print(f"{path}: {c.length} codes, {c.bits_per_pixel(decoded.shape[1]):.3f} bits per pixel")
