"""A transformer that starts from another one's weights, and may have more labels, prompts and given tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dvq_rt.layout import TokenLayout
from runtimes.errors import CheckpointError, short
from training.checkpoint import Model, digest, load_strictly
from training.models.transformer import StackedTransformer
from training.run import say

NEW = ("text.", "given_emb")
"""Beginnings of the names of weights that the other one may lack."""


def begin_from(model: Model, before: Model, source: str) -> None:
    """Give a model the transformer of another one of its sizes and code layout. Labels keep their weights by name; what
    only this model has (labels, prompts, given tokens) starts as in a new one.

    Raises:
        CheckpointError: sizes or layout are others.
    """
    (tokenizer, net), (other_tokenizer, other) = model.both(), before.both()
    if net.layout != replace(other.layout, classes=net.layout.classes, null_label=net.layout.null_label):
        raise CheckpointError(f"{source} has the layout {other.layout}, this run {net.layout}; its tokens mean others")
    carried = relabelled(net, model.class_names, other, before.class_names)
    own = net.state_dict()
    carried |= {name: own[name] for name in own if name.startswith(NEW) and name not in carried}
    load_strictly(net, carried, f"the transformer of {source}")
    if digest(tokenizer) != digest(other_tokenizer):
        say(f"{source} was trained on the codes of another tokenizer, which the transformer has to learn anew")
    if lost := sorted(set(before.class_names) - set(model.class_names)):
        say(f"the labels {short(lost)} of {source} are gone")


def relabelled(
    net: StackedTransformer, names: Sequence[str], other: StackedTransformer, other_names: Sequence[str]
) -> dict[str, Tensor]:
    """The weights of another transformer, in whose tables the labels are those of ``net``, which keep their weights by
    name; the rows of labels that only ``net`` has are its own."""
    rows, other_rows = meanings(net.layout, names), meanings(other.layout, other_names)
    own = net.state_dict()
    return {
        name: moved(own[name], rows[name], tensor, other_rows[name]) if name in rows else tensor
        for name, tensor in other.state_dict().items()
    }


def meanings(layout: TokenLayout, names: Sequence[str]) -> dict[str, list[Hashable]]:
    """What the rows of the tables of a transformer stand for, by the tables' names."""
    starts: list[Hashable] = [("label", name) for name in names or [""]] + [("null",)] * layout.null_label
    starts_of_a_grid = starts if layout.label_in_position else [("start",)]
    content = [*range(layout.content_sos), *starts]
    local = [[*range(layout.position_sos(s)), *starts_of_a_grid] for s in range(layout.segments)]
    joint: list[Hashable] = [(s, row) for s, rows in enumerate(local) for row in rows]
    return {
        "content_emb.weight": content,
        "content_head.linear.weight": content,
        "position_emb.weight": joint,
        "position_head.linear.weight": local[-1],
    }


def moved(table: Tensor, rows: Sequence[Hashable], other: Tensor, other_rows: Sequence[Hashable]) -> Tensor:
    """A table [n, C] with the rows of another one that stand for the same; the rest is its own."""
    at = {meaning: row for row, meaning in enumerate(other_rows)}
    same = [(row, at[meaning]) for row, meaning in enumerate(rows) if meaning in at]
    if table.shape[1:] != other.shape[1:]:
        return other  # whose loading says what is wrong
    into, source = torch.tensor(same).T
    table = table.clone()
    table[into] = other[source]
    return table
