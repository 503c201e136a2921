"""Ask the model which label fits an image best: the label under which the image's tokens are most likely.

python examples/compare_labels.py --label hearts --n 2
"""

import argparse

import dvq_rt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--label", default="hearts", help="label of the images that are drawn and then judged")
parser.add_argument("--n", type=int, default=3)
args = parser.parse_args()

generator = dvq_rt.Generator()
codes = generator.sample(n=args.n, labels=args.label, seed=5).codes
scores = {label: generator.score(codes, labels=label) for label in generator.class_names}
for i in range(args.n):
    totals = {label: scores[label][i].total for label in scores}
    best = max(totals, key=totals.__getitem__)
    print(f"image {i}: {best} ({totals[best]:.0f} nats), drawn as {args.label} ({totals[args.label]:.0f} nats)")
