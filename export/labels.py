"""Keep some labels of a trained model, so that an engine offers only what it draws well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from runtimes.errors import ExportError
from training.checkpoint import Model
from training.models.transformer import StackedTransformer
from training.warm_start import relabelled


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
    result = StackedTransformer(net.config, replace(layout, classes=len(names)), model.text)
    result.load_state_dict(relabelled(result, names, net, model.class_names))
    return model.with_parts(vae, result, tuple(names)).eval()
