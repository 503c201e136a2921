"""Access to the reference numbers in ``tests/data/golden/dq``, and their tokens as this project writes them."""

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dvq_rt.layout import TokenLayout
from training.checkpoint import Model
from training.import_published import import_published

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "dq"
STAGE_2 = ("e_class2_entropy", "e2_class_content_only", "f_uncond")


@lru_cache
def load(case: str, name: str = "io") -> dict[str, Tensor]:
    """The tensors of one file."""
    return load_file(GOLDEN / case / f"{name}.safetensors")


@lru_cache
def model(case: str) -> Model:
    """The case's imported checkpoint; tests share it and must not change it."""
    return import_published(GOLDEN / case / "config.json", GOLDEN / case / "model.ckpt")


def released_inputs(layout: TokenLayout, maps: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Code maps as the released code holds them: per segment content, local positions and segment ids, padded,
    without start tokens, int64 [B, n] each.

    Args:
        maps: per image its codes [side, side] and grain [hc, wc].
    """
    rows: dict[str, list[Tensor]] = {}
    for codes, grain in maps:
        tokens = [torch.from_numpy(x) for x in layout.to_tokens(codes.numpy(), grain.numpy())]
        content, position, segment = tokens
        for s, name in enumerate(("coarse", "fine")):
            mine = torch.nonzero(segment == s).flatten()[1:]
            rows.setdefault(f"{name}_content", []).append(content[mine])
            rows.setdefault(f"{name}_position", []).append(position[mine] - layout.position_offset(s))
            rows.setdefault(f"{name}_segment", []).append(segment[mine])
    pads = {
        "coarse_content": layout.content_pad,
        "fine_content": layout.content_pad,
        "coarse_position": layout.position_pad(0),
        "fine_position": layout.position_pad(1),
        "coarse_segment": 0,
        "fine_segment": 1,
    }
    return {
        name: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=pads[name])
        for name, parts in rows.items()
    }


def with_starts(layout: TokenLayout, tokens: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Start tokens put before what ``released_inputs`` returns."""
    out = {}
    for s, name in enumerate(("coarse", "fine")):
        start = torch.tensor([layout.start(s, int(label)) for label in labels])
        out[f"{name}_content"] = torch.cat([start[:, :1], tokens[f"{name}_content"]], 1)
        out[f"{name}_position"] = torch.cat([start[:, 1:], tokens[f"{name}_position"]], 1)
        out[f"{name}_seg"] = torch.full_like(out[f"{name}_content"], s)
    return out


def teacher_forcing(layout: TokenLayout, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The released transformer's arguments (start tokens in front, pads as ordinary tokens) as ours.

    Args:
        given: ``coarse_content``, ``coarse_position``, ``coarse_seg`` [B, Lc] and the same of ``fine`` [B, Lf].

    Returns:
        the arguments of ``StackedTransformer.forward`` and the targets of ``stacked_losses``, -1 at pads.
    """
    content = torch.cat([given["coarse_content"], given["fine_content"]], 1)
    local = torch.cat([given["coarse_position"], given["fine_position"]], 1)
    segment = torch.cat([given["coarse_seg"], given["fine_seg"]], 1)
    offsets = torch.tensor([layout.position_offset(s) for s in range(2)])
    pads = torch.tensor([layout.position_pad(s) for s in range(2)])
    joint = local + offsets[segment]
    inputs = {
        "content": content[:, :-1],
        "position": joint[:, :-1],
        "segment": segment[:, :-1],
        "following": joint[:, 1:],
    }
    targets = {
        "content": content.masked_fill(content == layout.content_pad, -1)[:, 1:],
        "position": local.masked_fill(local == pads[segment], -1)[:, 1:],
        "segment": segment[:, 1:],
    }
    return inputs, targets
