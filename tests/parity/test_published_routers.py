"""The feature routers of the released code: its two DQ-VAEs with one, their budgets, and a pass of training."""

import copy
import json

import pytest
import torch
from dq_golden import GOLDEN, load, model
from released import changed, config_of, imported, state_of

from training.models import dqvae
from training.models.dqvae import to_vectors
from training.models.router import GRAINS, budget_loss, draw_gate

CASES = {"b_dual_feature": 2, "c_triple": 3}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_tokenizer(check, case):
    """Protects encoder, router, merge, mask, quantizer, decoder, and the decoding of codes alone, which the released
    code cannot do for these models."""
    g, tokenizer, grains = load(case), model(case).tokenizer, CASES[case]
    maps = tokenizer.encoder(g["image"])
    for name, got in zip(GRAINS[grains], maps, strict=True):
        check.close(f"h_{name}", got, g[f"h_{name}"])
    check.close("gate", tokenizer.router(maps).permute(0, 3, 1, 2), g["gate"])
    encoding = tokenizer.encode(g["image"])
    check.same("grain", encoding.grain, g["grain_indices"])
    check.same("codes", encoding.codes, g["codes"])
    check.close("h_merged", tokenizer.merge(maps, encoding.grain), g["h_merged"])
    h = tokenizer.features(g["image"]).merged
    check.close("h_pre_quant", h, g["h_pre_quant"])
    weights = tokenizer.copy_weights(encoding.grain)
    check.close("codebook_mask", weights[:, None], g["codebook_mask"], tolerance=0.0)
    quantized = tokenizer.quantizer(to_vectors(h), weights.flatten())
    check.close("quant", quantized.values.view(1, *h.shape[2:], -1).permute(0, 3, 1, 2), g["quant"])
    check.close("emb_loss", quantized.loss[None], g["emb_loss"])
    forward = tokenizer(g["image"])
    check.close("reconstruction", forward.images, g["reconstruction"])
    check.close("decode_codes", tokenizer.decode_codes(g["codes"]), g["reconstruction"])
    assert forward.budget is None  # never outside training


@pytest.mark.parametrize("kind", ["hard", "soft", "raw_logits"])
@pytest.mark.parametrize("name", ["dual_all", "dual_one", "triple"])
def test_budget(check, name, kind):
    """Protects the budget's value and gradient, with the factors that the released code puts on its terms."""
    g, section = load("g_training", "budget"), json.loads((GOLDEN / "g_training" / "budget_config.json").read_text())
    params = section[name]["params"]
    if name == "triple":
        ratios, factors = (params["target_median_ratio"], params["target_fine_ratio"]), (1.0, params["gamma"])
    else:
        ratios, factors = (params["target_ratio"],), (params["gamma"] * (1 + params["calculate_all"]),)
    gate = g[f"{name}.{kind}.gate"].permute(0, 2, 3, 1).clone().requires_grad_()
    loss = budget_loss(gate, ratios, factors)
    loss.backward()
    check.close("loss", loss.detach()[None], g[f"{name}.{kind}.loss"])
    check.close("gradient", gate.grad.permute(0, 3, 1, 2), g[f"{name}.{kind}.grad"])


def test_router_in_training(check, monkeypatch):
    """Protects the drawn gate, its way into the features and the budget, and the gradients of the router and the whole
    encoder.

    The gradients of key biases, and of biases whose sum only meets norms of one channel a group, are zero but for
    rounding, so the encoder's biases are compared on the scale of their weights' gradient.
    """
    g, tokenizer = load("g_training", "router_train"), copy.deepcopy(model("b_dual_feature").tokenizer).train()
    monkeypatch.setattr(dqvae, "gumbel_noise", lambda _: g["gumbel_noise"])
    maps = tokenizer.encoder(g["image"])
    logits = tokenizer.router(maps)
    check.close("router_logits", logits.detach(), g["router_logits"])
    gate = draw_gate(logits, g["gumbel_noise"])
    check.close("gate", gate.detach().permute(0, 3, 1, 2), g["gate"])
    features = tokenizer.features(g["image"])
    check.same("grain", features.grain, g["grain_indices"])
    check.close("gate of features", features.gate.detach(), gate.detach(), tolerance=0.0)
    merged = tokenizer.merge(maps, gate.argmax(-1), gate)
    check.close("h_merged", merged.detach(), g["h_merged"])
    check.close("codebook_mask", tokenizer.copy_weights(features.grain)[:, None], g["codebook_mask"], tolerance=0.0)
    budget = budget_loss(gate, (0.5,), (20.0,))
    check.close("budget", budget.detach()[None], g["budget_loss"])
    (0.01 * (merged * g["w"]).sum() + budget).backward()
    for name, parameter in tokenizer.router.named_parameters():
        check.close(f"gradient of {name}", parameter.grad, g[f"grad.router.{name}"])
    for name, parameter in tokenizer.encoder.named_parameters():
        scale = g[f"grad_norm.{name.replace('bias', 'weight')}"].item()
        check.close(f"norm of {name}", parameter.grad.norm()[None], g[f"grad_norm.{name}"], scale=scale)


@pytest.mark.parametrize("case", CASES)
def test_plain_codebook(check, case, tmp_path):
    """Protects the codebook without moving averages, the one with which the released feature models ran in stage 2."""
    g, state = load(case), state_of(case)
    table = state.pop("quantize.codebook.weight")[:-1]
    state = {name: tensor for name, tensor in state.items() if not name.startswith("quantize.")}
    state |= {"quantize.embedding.weight": table, "quantize.initted": torch.ones(1)}
    state["quantize.cluster_size"] = torch.zeros(1, len(table))
    sizes = {"codebook_size": len(table), "codebook_dim": table.shape[1], "kmeans_init": True}
    target = "modules.vector_quantization.quantize_codebook_mask.MaskVectorQuantize"
    config = changed(case, "vqconfig", {"target": target, "params": sizes})
    tokenizer = imported(case, tmp_path, state, config).tokenizer
    encoding = tokenizer.encode(g["image"])
    check.same("codes", encoding.codes, g["codes"])
    check.close("decoded", tokenizer.decode_codes(encoding.codes).detach(), g["reconstruction"])


@pytest.mark.parametrize(
    ("case", "section", "fields"),
    [
        ("b_dual_feature", {"target_ratio": 0.3, "gamma": 4}, {"fine_percent": 30.0, "budget": 8.0}),
        ("b_dual_feature", {"target_ratio": 0.3, "gamma": 4, "calculate_all": False}, {"budget": 4.0}),
        ("c_triple", {"target_fine_ratio": 0.2, "target_median_ratio": 0.5}, {"median_percent": 50.0, "budget": 1.0}),
    ],
)
def test_budget_section(case, section, fields, tmp_path):
    """Protects the shares and the factor with which training of an imported model goes on."""
    names = ("RatioMSE_DualGrain", "NormedSeperateRatioMSE_TripleGrain")
    target = f"modules.dynamic_modules.budget.BudgetConstraint_{names[case == 'c_triple']}"
    config = config_of(case)
    config["params"]["lossconfig"] = {"params": {"budget_loss_config": {"target": target, "params": section}}}
    tokenizer = imported(case, tmp_path, config=config).tokenizer
    assert {name: getattr(tokenizer.config, name) for name in fields} == fields
    assert not tokenizer.router_biases.any()  # the largest logit, as released
