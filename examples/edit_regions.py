"""Redraw a region of a drawn image: original, what is redrawn, and some results, one row for each region.

python examples/edit_regions.py --engine demo:mq --label hearts --out edits.png
"""

import argparse

import numpy as np

import dvq_rt
from dvq_rt.images import grid

REGIONS = {"lower half": (0, 2, 4, 4), "right half": (2, 0, 4, 4), "centre": (1, 1, 3, 3)}  # quarters of a side
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--engine", default="demo:dq")
parser.add_argument("--label", default="faces")
parser.add_argument("--n", type=int, default=4)
parser.add_argument("--out", default="edits.png")
args = parser.parse_args()

generator, rows = dvq_rt.Generator(args.engine), []
original = generator.sample(1, args.label, seed=1)[0]
for name, quarters in REGIONS.items():
    left, top, right, bottom = (quarter * original.width // 4 for quarter in quarters)
    edited = generator.edit(original, region=(left, top, right, bottom), labels=args.label, n=args.n)
    (masked := np.array(original))[top:bottom, left:right] = 255
    rows += [np.array(original), masked, *edited.to_numpy()]
    print(f"{name}: drawn from the law of {edited.law}")
grid(np.stack(rows), args.n + 2).save(args.out)
