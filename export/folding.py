"""The bias of query, key and value in the weights, so that on CUDA no kernel of its own adds it.

The entries of a normalized token sum to zero. So a layer norm that multiplies by 1 and adds ``SHIFT`` gives entries
that sum to ``SHIFT * C`` whatever the token is, and a bias spread over a row of the weights comes out of the product:

    W (gamma x + beta) + b  =  (W gamma - mean of each row + (W beta + b) / (SHIFT C)) (x + SHIFT)

Only rounding differs.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from training.checkpoint import Model
from training.models.transformer import Block

SHIFT = 0.25
"""A power of two, exact in every format. Smaller ones make the bias's part of the weights larger, larger ones round the
normalized token more coarsely."""


def fold_projection_biases(model: Model) -> Model:
    """A copy of a whole model whose blocks project to query, key and value without a bias."""
    model = copy.deepcopy(model)
    _, net = model.both()
    with torch.no_grad():
        for block in (*net.position_blocks, *net.content_blocks):
            assert isinstance(block, Block)
            fold(block.ln1, block.attn.qkv)
    return model


def fold(norm: nn.LayerNorm, layer: nn.Linear) -> None:
    """Change, in place, a norm and the layer that alone reads it, which loses its bias."""
    weight, gamma, beta, bias = (t.double() for t in (layer.weight, norm.weight, norm.bias, layer.bias))
    total = bias + weight @ beta
    weight = weight * gamma
    weight = weight - weight.mean(1, keepdim=True) + total[:, None] / (SHIFT * layer.in_features)
    layer.weight.copy_(weight)
    layer.register_parameter("bias", None)
    norm.weight.fill_(1)
    norm.bias.fill_(SHIFT)
