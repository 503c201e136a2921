"""Draw many images with a progress bar, in parts, so that memory does not grow with their number.

Image i is the same in whatever parts it is drawn: give several machines ranges of their own with --first.

python examples/bulk.py --n 1000 --out images
"""

import argparse

from tqdm import tqdm

import dvq_rt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--first", type=int, default=0, help="number of the first image")
parser.add_argument("--n", type=int, default=64)
parser.add_argument("--part", type=int, default=32, help="images that are in memory at once")
parser.add_argument("--out", default="images")
args = parser.parse_args()

end = args.first + args.n
with dvq_rt.Generator() as generator, tqdm(total=args.n, unit="image") as bar:
    for first in range(args.first, end, args.part):
        samples = generator.sample(min(args.part, end - first), labels="faces", first=first)
        samples.save(args.out)  # 00000.png, 00001.png, ... by the number of each image
        bar.update(len(samples))
