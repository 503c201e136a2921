"""Draw in a program on asyncio, as a web server of one's own does: calls share a batch, and no thread waits.

python examples/async_calls.py --n 4 --out async.png
"""

import argparse
import asyncio

from dvq_rt import Generator
from dvq_rt.asynchronous import AsyncGenerator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=4, help="clocks, drawn beside a face")
parser.add_argument("--out", default="async.png")
args = parser.parse_args()


async def main() -> None:
    engine = AsyncGenerator(Generator())
    async for preview in engine.stream(1, "hearts", seed=1, every=64):
        print(f"{preview.progress:4.0%} of the codes")
    clocks, _ = await asyncio.gather(engine.sample(args.n, "clocks"), engine.sample(1, "faces"))
    clocks.grid().save(args.out)
    engine.close()


asyncio.run(main())
