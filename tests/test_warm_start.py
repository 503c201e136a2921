"""A transformer that starts from another one's weights and has more labels, prompts and given tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import TOKENIZER, masked_model, small_model, small_transformer

from dvq_rt.layout import TokenLayout
from runtimes.errors import CheckpointError
from training.checkpoint import Model
from training.models.text import TextConfig
from training.models.transformer import StackedTransformer
from training.warm_start import begin_from


def grown(before: Model, names: tuple[str, ...]) -> Model:
    """An untrained model of the sizes of another one, with other labels, prompts and given tokens."""
    vae, net = before.both()
    layout = replace(net.layout, classes=len(names), null_label=True)
    config = replace(net.config, given=True)
    return Model(vae, StackedTransformer(config, layout, TextConfig(8, 256, 1)).eval(), names)


@pytest.mark.parametrize("before", [small_model(("a", "b")), masked_model(("a", "b"))], ids=["dq", "mq"])
def test_labels_keep_their_meaning(before: Model) -> None:
    """Without prompts and given tokens the logits are those of before to the bit, wherever a label has moved to."""
    after = grown(before, ("b", "new", "a"))
    begin_from(after, before, "before")
    old, new = before.both()[1], after.both()[1]
    grain = old.layout.random_grain(np.random.default_rng(0))
    for was, now in ((0, 2), (1, 0), (2, 3)):
        outs = []
        for net, label in ((old, was), (new, now)):
            codes = torch.arange(net.layout.cells).reshape(net.layout.sides[-1], -1) % 32
            tokens = net.layout.to_tokens(codes.numpy(), grain, label)
            rows = [torch.from_numpy(part)[None] for part in tokens]
            following = torch.from_numpy(net.layout.following(tokens))[None]
            outs.append(net(*(row[:, :-1] for row in rows), following))
        specials = old.layout.content_sos, old.layout.position_sos(old.layout.segments - 1)
        for one, two, most in zip(*outs, reversed(specials), strict=True):
            assert torch.equal(one[..., :most], two[..., :most])


def test_other_sizes_are_refused() -> None:
    before = small_model(("a", "b"))
    vae, net = before.both()
    wide = StackedTransformer(replace(net.config, width=64), net.layout)
    with pytest.raises(CheckpointError, match="the transformer of there does not fit"):
        begin_from(Model(vae, wide, ("a", "b")), before, "there")
    other = TokenLayout(32, TOKENIZER.sides, "region-first", 2, null_label=True)
    with pytest.raises(CheckpointError, match="has the layout"):
        begin_from(Model(vae, small_transformer(other), ("a", "b")), before, "there")
    text = StackedTransformer(net.config, net.layout, TextConfig(8, 256, 1))
    with pytest.raises(CheckpointError, match="text"):
        begin_from(before, Model(vae, text, ("a", "b")), "there")
