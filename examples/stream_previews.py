"""Watch one image grow: save its previews as an animation, coarse regions first.

python examples/stream_previews.py --every 8 --out growing.gif
"""

import argparse

import dvq_rt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--label", default="faces")
parser.add_argument("--every", type=int, default=8, help="tokens between two previews")
parser.add_argument("--out", default="growing.gif")
args = parser.parse_args()

generator = dvq_rt.Generator()
frames = []
for preview in generator.stream(labels=args.label, seed=1, every=args.every):
    print(f"{preview.progress:4.0%} of the codes", "(the finished image)" if preview.codes else "")
    frames.append(preview.image.resize((256, 256), resample=0))
frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=200, loop=0)
print(args.out)
