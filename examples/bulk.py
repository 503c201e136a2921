"""Draw many images with a progress bar, in parts, so that memory does not grow with their number.

python examples/bulk.py --n 1000 --out images
"""

import argparse
from pathlib import Path

from tqdm import tqdm

import dvq_rt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=64)
parser.add_argument("--part", type=int, default=32, help="images per part; each part has a seed of its own")
parser.add_argument("--out", default="images")
args = parser.parse_args()

generator = dvq_rt.Generator()
with tqdm(total=args.n, unit="image") as bar:
    for seed, start in enumerate(range(0, args.n, args.part)):
        count = min(args.part, args.n - start)
        samples = generator.sample(
            count, labels="faces", seed=seed, progress=lambda done, _, start=start: bar.update(start + done - bar.n)
        )
        samples.save(Path(args.out) / f"part-{seed:04d}")
