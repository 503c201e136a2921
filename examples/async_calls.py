"""Draw in a program on asyncio, as a web server of one's own does: calls share a batch, and no thread waits.

python examples/async_calls.py --n 4 --out async.png
"""

import argparse
import asyncio

import numpy as np

import dvq_rt
from dvq_rt.asynchronous import AsyncGenerator
from dvq_rt.images import grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=4, help="calls of one image each")
parser.add_argument("--out", default="async.png")
args = parser.parse_args()


async def main() -> None:
    engine = AsyncGenerator(dvq_rt.Generator())
    async for preview in engine.stream(1, "hearts", seed=1, every=64):
        print(f"{preview.progress:4.0%} of the codes")
    samples = await asyncio.gather(*(engine.sample(1, "clocks", seed) for seed in range(args.n)))
    grid(np.concatenate([s.to_numpy() for s in samples])).save(args.out)
    engine.close()


asyncio.run(main())
