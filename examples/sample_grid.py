"""Draw images of some labels and save them in one picture, a row per label.

python examples/sample_grid.py --labels faces,hearts --n 6 --out grid.png
"""

import argparse

import dvq_rt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--labels", default="faces,hearts,flags", help="names, separated by commas")
parser.add_argument("--n", type=int, default=6, help="images per label")
parser.add_argument("--out", default="grid.png")
args = parser.parse_args()

generator = dvq_rt.Generator()
labels = [label for label in args.labels.split(",") for _ in range(args.n)]
samples = generator.sample(labels=labels, seed=3, params=dvq_rt.SamplingParams(temperature=0.7, guidance=2.0))
samples.grid(columns=args.n).save(args.out)
print(f"{args.out}: {len(samples)} images of {sorted(set(labels))}")
