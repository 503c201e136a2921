"""Draw from several threads with one generator, as a web server does. The threads share a batch, and every image is
the one that its seed and label give alone.

python examples/threads.py --n 8 --out threads.png
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import dvq_rt
from dvq_rt.images import grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=8, help="requests of one image each")
parser.add_argument("--out", default="threads.png")
args = parser.parse_args()

generator = dvq_rt.Generator()
with ThreadPoolExecutor(max_workers=4) as pool:
    requests = [pool.submit(generator.sample, 1, "clocks", seed) for seed in range(args.n)]
    images = np.concatenate([request.result().to_numpy() for request in requests])
grid(images).save(args.out)
assert (images[-1] == generator.sample(1, "clocks", seed=args.n - 1).to_numpy()[0]).all()  # as if drawn alone
print(args.out)
