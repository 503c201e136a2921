"""Models of the published sizes with random weights: ``python -m training.presets NAME --out DIR``.

Of both papers the weights of one model were released, a DQ-VAE of the sizes of ``dq_class_p6c18``'s tokenizer; of no
transformer and no MQ-VAE. Speed does not depend on the weights' values, so benchmarks and builds of engines use these.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runtimes.errors import ConfigError
from training.checkpoint import save_checkpoint
from training.cli import guarded
from training.published.presets import PRESETS, preset


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.presets", description=__doc__)
    parser.add_argument("name", choices=sorted(PRESETS))
    parser.add_argument("--out", required=True, help="checkpoint folder to write; it must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise ConfigError(f"{args.out} already exists; choose another --out")
    model = preset(args.name, args.seed)
    save_checkpoint(model, args.out)
    for name, part in zip(("tokenizer", "transformer"), model.both(), strict=True):
        print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
    print(args.out)


if __name__ == "__main__":
    main()
