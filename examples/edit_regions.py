"""Redraw a region of a drawn image: original, what is redrawn, and some results, one row for each region.

python examples/edit_regions.py --engine demo:mq --label hearts --out edits.png
"""

import argparse

import numpy as np

import dvq_rt
from dvq_rt.images import grid

REGIONS = {"lower half": (0, 32, 64, 64), "right half": (32, 0, 64, 64), "centre": (16, 16, 48, 48)}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--engine", default="demo:dq")
parser.add_argument("--label", default="faces")
parser.add_argument("--n", type=int, default=4)
parser.add_argument("--out", default="edits.png")
args = parser.parse_args()

generator, rows = dvq_rt.Generator(args.engine), []
original = generator.sample(1, args.label, seed=1)[0]
for name, (left, top, right, bottom) in REGIONS.items():
    edited = generator.edit(original, region=(left, top, right, bottom), labels=args.label, n=args.n)
    masked = np.array(original)
    masked[top:bottom, left:right] = 255
    rows += [np.array(original), masked, *edited.to_numpy()]
    print(f"{name}: drawn from the law of {edited.law}")
grid(np.stack(rows), args.n + 2).save(args.out)
