"""Training as the released code does it: the quantizer's updates, and the transformer's losses and gradients."""

import json

import pytest
import torch
from dq_golden import GOLDEN, load, teacher_forcing

from dvq_rt.layout import TokenLayout
from training.losses import stacked_losses
from training.models.dqvae import to_vectors
from training.models.quantizer import EMAQuantizer
from training.models.transformer import StackedTransformer
from training.published.configs_dq import transformer_config
from training.published.weights import load_transformer, transformer_sources

STATE = {"codebook": "weight", "cluster_size": "cluster_size_ema", "embed_sum": "embed_ema"}


def start_of(g, setting, decay):
    """The quantizer's state before step 0, worked out from the state after step 1.

    The reference file holds that last state three times: its snapshots shared memory with the live buffers. The moving
    averages are linear in the recorded inputs, so they can be run backwards; the codebook rows that step 0 used are in
    its output, and the few others, which no input is near, may be any far ones.
    """
    final = {ours: g[f"{setting}.step1.after.codebook.{theirs}"][:16].double() for ours, theirs in STATE.items()}
    cluster_size, embed_sum = final["cluster_size"], final["embed_sum"]
    for step in (f"{setting}.step1", f"{setting}.step0"):
        codes, x = g[f"{step}.codes"].flatten(), to_vectors(g[f"{step}.x"]).double()
        count = torch.zeros(16, dtype=torch.double).index_add_(0, codes, torch.ones(len(codes), dtype=torch.double))
        total = torch.zeros(16, 8, dtype=torch.double).index_add_(0, codes, x)
        cluster_size = (cluster_size - (1 - decay) * count) / decay
        embed_sum = (embed_sum - (1 - decay) * total) / decay
    codebook = final["codebook"].clone()
    codebook[g[f"{setting}.step0.codes"].flatten()] = to_vectors(g[f"{setting}.step0.quant"]).double()
    return {"codebook": codebook.float(), "cluster_size": cluster_size.float(), "embed_sum": embed_sum.float()}


@pytest.mark.parametrize(("setting", "restart_below"), [("restart_off", 0.0), ("restart_on_not_triggered", 1.0)])
def test_quantizer_updates(check, setting, restart_below):
    """Protects the moving averages over two steps: each step quantizes with the codebook before it, counts every copy
    of a coarse vector as released (``mask_weighted=False``), and passes the gradient straight through."""
    g = load("g_training", "vq")
    beta, decay = (round(value, 6) for value in g["beta_decay"].tolist())
    quantizer = EMAQuantizer(16, 8, beta=beta, decay=decay, restart_below=restart_below, mask_weighted=False)
    quantizer.load_state_dict(start_of(g, setting, decay))
    quantizer.train()
    for step in (f"{setting}.step0", f"{setting}.step1"):
        x = g[f"{step}.x"].clone().requires_grad_()
        out = quantizer(to_vectors(x), g[f"{step}.mask"].flatten())
        values = out.values.view(2, 6, 6, 8).permute(0, 3, 1, 2)
        ((values * g[f"{step}.w"]).sum() + out.loss).backward()
        check.same("codes", out.codes.view(2, 6, 6), g[f"{step}.codes"])
        check.close("quant", values.detach(), g[f"{step}.quant"])
        check.close("loss", out.loss.detach()[None], g[f"{step}.loss"])
        check.close("x_grad", x.grad, g[f"{step}.x_grad"])
    for ours, theirs in STATE.items():
        check.close(ours, getattr(quantizer, ours), g[f"{setting}.step1.after.codebook.{theirs}"][:16])


def test_transformer_gradients(check):
    """Protects the losses in training mode and the gradient of every parameter.

    Two differences are expected and put aside: the released pad embeddings take no gradient, so ours are zeroed first;
    and the key biases' gradient is zero but for rounding (softmax ignores a shift of all scores), so it is compared on
    the scale of the key weights' gradient. The manifest states no noise for these tensors; they meet the tolerance of
    forward values.
    """
    g = load("g_training", "transformer")
    section = json.loads((GOLDEN / "g_training" / "transformer_config.json").read_text())
    layout = TokenLayout(codebook_size=20, sides=(3, 6))
    transformer = StackedTransformer(transformer_config(section, layout), layout)
    ckpt = GOLDEN / "g_training" / "transformer.ckpt"
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    load_transformer(transformer, {k.removeprefix("transformer."): v for k, v in state.items()}, str(ckpt))
    transformer.train()
    inputs, targets = teacher_forcing(layout, {k.removeprefix("in."): v for k, v in g.items() if k.startswith("in.")})
    losses = stacked_losses(*transformer(**inputs), **targets)
    for theirs, ours in {
        "position_loss": "position",
        "content_loss": "content",
        "coarse_position_loss": "position_0",
        "fine_position_loss": "position_1",
        "total": "loss",
    }.items():
        check.close(theirs, losses[ours].detach()[None], g[theirs])
    losses["loss"].backward()

    gradients = {}
    parameters = dict(transformer.named_parameters())
    for name, sources in transformer_sources(transformer).items():
        rows = [source.shape[source.name == "pos_emb"] for source in sources]  # pos_emb has a leading 1
        parts = parameters[name].grad.split(rows)
        gradients.update({source.name: part.clone() for source, part in zip(sources, parts, strict=True)})
    gradients["content_emb.weight"][layout.content_pad] = 0
    gradients["content_coarse_pos_emb.weight"][layout.position_pad(0)] = 0
    gradients["content_fine_pos_emb.weight"][layout.position_pad(1)] = 0
    norms = [name.removeprefix("grad_norm.") for name in g if name.startswith("grad_norm.")]
    assert sorted(norms) == sorted(gradients)
    for name in norms:
        scale = g[f"grad_norm.{name.replace('key.bias', 'key.weight')}"].item()
        check.close(f"norm of {name}", gradients[name].norm()[None], g[f"grad_norm.{name}"], scale=scale)
    for name in [name.removeprefix("grad.") for name in g if name.startswith("grad.")]:
        check.close(f"gradient of {name}", gradients[name], g[f"grad.{name}"])
