"""Keep some labels of a trained model, so that an engine offers only what it draws well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dvq_rt.layout import TokenLayout
from runtimes.errors import ExportError
from training.checkpoint import Model
from training.models.transformer import StackedTransformer


def keep_labels(model: Model, names: Sequence[str]) -> Model:
    """The same model with fewer labels, in the order of ``names``; what it computes for them does not change.

    Only the rows of the other labels' start tokens leave the embedding tables and the heads.

    Raises:
        ExportError: a name is unknown or given twice, or the model has no named labels.
    """
    vae, net = model.both()
    layout = net.layout
    if not names or not set(names) <= set(model.class_names) or len(set(names)) != len(names):
        raise ExportError(f"labels {list(names)} must be different ones of {list(model.class_names)}")
    kept = [model.class_names.index(name) for name in names] + [layout.classes] * layout.null_label
    smaller = replace(layout, classes=len(names))

    content = rows(layout.content_sos, kept)
    local = [positions(layout, s, kept) for s in range(layout.segments)]
    joint = torch.cat([ids + layout.position_offset(s) for s, ids in enumerate(local)])
    kept_rows = {
        "content_emb.weight": content,
        "content_head.linear.weight": content,
        "position_emb.weight": joint,
        "position_head.linear.weight": local[-1],
    }
    result = StackedTransformer(net.config, smaller, model.text)
    result.load_state_dict({k: v[kept_rows[k]] if k in kept_rows else v for k, v in net.state_dict().items()})
    return model.with_parts(vae, result, tuple(names)).eval()


def rows(start: int, kept: Sequence[int]) -> Tensor:
    """Ids below the first start id, and the start ids of the kept labels, int64."""
    return torch.cat([torch.arange(start), start + torch.tensor(kept, dtype=torch.long)])


def positions(layout: TokenLayout, segment: int, kept: Sequence[int]) -> Tensor:
    """Local position ids that stay, int64."""
    return rows(layout.position_sos(segment), kept if layout.label_in_position else [0])
