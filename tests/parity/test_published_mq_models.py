"""Imported checkpoints of the released MQ code give its numbers: tokenizer, sequences, teacher forcing."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mq_golden import (
    GOLDEN,
    IMAGES,
    LOGITS,
    LOSS,
    MAPS,
    STAGE_2,
    extra,
    images,
    load,
    model,
    teacher_forcing,
    to_ours,
    to_released,
)

from dvq_rt.layout import TokenLayout
from training.checkpoint import load_checkpoint
from training.data.tokens import collate
from training.import_published import import_published, main
from training.losses import stacked_losses
from training.models.mqvae import MQVAE
from training.models.transformer import StackedTransformer
from training.published.configs_mq import (
    MQ_CLASS,
    MQ_UNCONDITIONAL,
    released_mq_tokenizer,
    released_mq_transformer,
    stack_config,
)
from training.published.presets import mq_class_v12p12
from training.published.weights import Source, load_transformer, transformer_sources
from training.train_transformer import batch_losses


@torch.no_grad()
@pytest.mark.parametrize("case", ["mqvae_refine", "mqvae_vanilla"])
def test_tokenizer(check, case, tmp_path):
    """Protects every step of the tokenizer with either scorer: encoder, scores, choice and order of the cells,
    projection, quantizer and its loss, de-mask module, decoder. The vanilla case keeps 28 cells with the weights of a
    stage-2 file that keeps 17: the kept ratio is the configuration's."""
    if case == "mqvae_refine":
        tokenizer = model(case).tokenizer
    else:
        state = torch.load(GOLDEN / "stackformer_class" / "model.ckpt", weights_only=True)["state_dict"]
        prefix = "first_stage_model."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        torch.save({"state_dict": state}, tmp_path / "model.ckpt")
        tokenizer = import_published(GOLDEN / case / "config.json", tmp_path / "model.ckpt").tokenizer
    assert not tokenizer.training
    image, g = load(case, "inputs")["image"], load(case)
    side, count = tokenizer.config.sides[0], len(image)
    h = tokenizer.encoder(image)
    check.close("enc_features", h, g["enc_features"], **MAPS)
    vectors, positions, scores = tokenizer.masker(h)
    check.close("scores_raster", scores.flatten(1), g["scores_raster"], **MAPS)
    check.close("sort_score", scores.flatten(1).gather(1, positions), g["sort_score"], **MAPS)
    check.same("sample_index", positions, g["sample_index"])
    check.close("prequant", vectors.transpose(1, 2), g["prequant"], **MAPS)
    quantized = tokenizer.quantizer(vectors.flatten(0, 1))
    check.same("codes", quantized.codes.view(positions.shape), g["codes"])
    check.close("quantized", quantized.values.view_as(vectors).transpose(1, 2), g["quantised"], **MAPS)
    check.close("quant_loss", quantized.loss[None], g["quant_loss"], **LOSS)
    encoding = tokenizer.encode(image)
    check.same("encode: codes", encoding.codes, g["codes"])
    check.same("encode: positions", encoding.positions, g["sample_index"])
    codes, grain = tokenizer.encode_maps(image)
    check.same("mask", grain.flatten(1) == 0, g["mask"].bool())
    check.same("code map", codes.flatten(1).gather(1, g["sample_index"]), g["codes"])
    check.same("remain_index", codes.flatten(1).gather(1, g["remain_index"]), torch.full_like(g["remain_index"], -1))
    stretched = grain.repeat_interleave(tokenizer.config.stride, 1).repeat_interleave(tokenizer.config.stride, 2)
    check.same("binary_map", stretched[:, None] == 0, g["binary_map"].bool())
    low, high = scores.min(), scores.max()  # over the batch, as released (Q8)
    stretched = scores.repeat_interleave(tokenizer.config.stride, 1).repeat_interleave(tokenizer.config.stride, 2)
    check.close("score_map", ((stretched - low) / (high - low))[:, None], g["score_map"], **MAPS)
    values = tokenizer.quantizer.lookup(codes.clamp_min(0)).permute(0, 3, 1, 2)
    assert values.shape == (count, tokenizer.config.code_dim, side, side)
    check.close("demasked", tokenizer.demasker(values, codes >= 0), g["demasked"], **IMAGES)
    check.close("decode_maps", tokenizer.decode_maps(codes), g["reconstruction"], **IMAGES)
    check.close("decode_codes", tokenizer.decode_codes(g["codes"], g["sample_index"]), g["reconstruction"], **IMAGES)
    forward = tokenizer(image)
    check.close("forward", forward.images, g["reconstruction"], **IMAGES)
    check.close("forward loss", forward.loss[None], g["quant_loss"], **LOSS)


def test_sequences(check):
    """Protects the raster order of training sequences, and the way back to a map from any order."""
    given, g = load("permuter", "inputs"), load("permuter")
    layout = TokenLayout(codebook_size=int(given["codes"].max()) + 1, sides=(16,), kept=64, first="content")
    for row in range(3):
        codes = torch.full((256,), -1).scatter(0, given["positions"][row], given["codes"][row]).view(16, 16)
        tokens = layout.to_tokens(codes.numpy(), codes.clamp_max(0).numpy())
        check.same("raster_codes", torch.from_numpy(tokens.content[1:]), g["raster_codes"][row])
        check.same("raster_positions", torch.from_numpy(tokens.position[1:]), g["raster_positions"][row])
        for order in ("raster", "identity"):
            back, grain = layout.to_map(g[f"{order}_codes"][row].tolist(), g[f"{order}_positions"][row].tolist())
            check.same(f"back from {order}", torch.from_numpy(back), codes)
            check.same(f"grain from {order}", torch.from_numpy(grain), codes.clamp_max(0))


@torch.no_grad()
def test_position_first(check):
    """Protects the transformer that draws the position first: logits and losses."""
    case = "stacked_position_gpt"
    given, g, layout = load(case, "inputs"), load(case), TokenLayout(29, (8,), label_in_position=False, kept=13)
    transformer = StackedTransformer(stack_config(extra(case, "config")["model"], layout), layout).eval()
    state = torch.load(GOLDEN / case / "model.ckpt", weights_only=True)["state_dict"]
    load_transformer(transformer, state, case)
    inputs, targets = teacher_forcing(layout, given["idx"], given["pos_idx"])
    position, content = transformer(**inputs)
    for name in ("position_logits", "sample_position"):
        check.close(name, position, g[name], **LOGITS)
    for name in ("value_logits", "sample_value"):
        check.close(name, content, g[name], **LOGITS)
    losses = stacked_losses(position, content, **targets)
    check.close("position_loss", losses["position"][None], g["position_loss"], **LOSS)
    check.close("value_loss", losses["content"][None], g["value_loss"], **LOSS)


@torch.no_grad()
@pytest.mark.parametrize("case", STAGE_2)
def test_teacher_forcing(check, case):
    """Protects the whole way of training: images, tokens in the released order and ids, logits, losses; and the images
    of the tokens. The labels' place in the vocabulary is ours, so ids and columns are moved."""
    g, imported = load(case), model(case)
    layout, transformer, tokenizer = imported.layout, imported.transformer, imported.tokenizer
    encoding = tokenizer.encode(images(case))
    codes, positions = encoding.codes, encoding.positions
    if case == "stackformer_class":  # it has the raster permuter, the other case has none
        positions, order = positions.sort(1)
        codes = codes.gather(1, order)
    check.same("z_indices", codes, g["z_indices"])
    check.same("z_positions", positions, g["z_positions"])
    labels = load(case, "inputs")["class_label"] if layout.classes else torch.zeros(len(codes), dtype=torch.long)
    starts = torch.tensor([layout.start(0, int(label)) for label in labels])
    content, position = torch.cat([starts[:, :1], codes], 1), torch.cat([starts[:, 1:], positions], 1)
    check.same("tf_idx", content, to_ours(layout, g["tf_idx"]))
    check.same("tf_pos", position, g["tf_pos"])
    check.same("c_indices", content[:, :1], to_ours(layout, g["c_indices"]))
    check.same("c_positions", position[:, :1], g["c_positions"])
    inputs, targets = teacher_forcing(layout, content, position)
    position_logits, content_logits = transformer(**inputs)
    check.close("tf_value_logits", to_released(layout, content_logits), g["tf_value_logits"], **LOGITS)
    check.close("tf_position_logits", position_logits, g["tf_position_logits"], **LOGITS)
    losses = stacked_losses(position_logits, content_logits, **targets)
    check.close("value_loss", losses["content"][None], g["value_loss"], **LOSS)
    check.close("position_loss", losses["position"][None], g["position_loss"], **LOSS)
    factor = extra(case, "config")["model"]["params"]["loss_position_weight"]
    total = torch.tensor(extra(case)["validation_total_loss"])
    check.close("total", losses["content"] + factor * losses["position"], total, **LOSS)
    check.close("recon_from_tokens", tokenizer.decode_codes(codes, positions), g["recon_from_tokens"], **IMAGES)


@torch.no_grad()
def test_our_training_batch(check):
    """Protects stage 2's own way from code maps to losses, which is the released one for the raster permuter."""
    case = "stackformer_class"
    imported, labels = model(case), load(case, "inputs")["class_label"].numpy()
    codes, grain = (part.numpy() for part in imported.tokenizer.encode_maps(images(case)))
    batch = collate(imported.layout, SimpleNamespace(codes=codes, grain=grain), torch.arange(3).numpy(), labels)
    losses = batch_losses(imported.transformer, batch)
    check.close("value_loss", losses["content"][None], load(case)["value_loss"], **LOSS)
    check.close("position_loss", losses["position"][None], load(case)["position_loss"], **LOSS)


@pytest.mark.parametrize("case", ["mqvae_refine", *STAGE_2])
def test_command(case, tmp_path, capsys, monkeypatch):
    """Protects the command: the folder it writes loads as the same model."""
    monkeypatch.chdir(GOLDEN)  # where the first stage's path starts
    out = tmp_path / "checkpoint"
    main([f"{case}/config.json", f"{case}/model.ckpt", "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    written, imported = load_checkpoint(out), model(case)
    assert written.config() == imported.config()
    ours, theirs = written.state_dict(), imported.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_recommended_positions():
    """Protects a model that was trained without a raster permuter from being sampled in raster order by default."""
    assert model("stackformer_uncond").defaults == {"positions": "drawn"}
    assert model("stackformer_uncond").layout.order == "importance"
    assert model("stackformer_class").defaults == {}


def published_config(target, **start):
    """A stage-2 configuration of the published sizes (spec/mq.md sections 1 and 7)."""
    config = copy.deepcopy(extra("stackformer_class", "config")["model"])
    top = config["params"]
    first = top["first_stage_config"]["params"]
    sections = {name: section["params"] for name, section in first.items() if "params" in section}
    trunk = {"ch": 128, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 2, "resolution": 256, "attn_resolutions": [32]}
    sections["encoder_config"].update(trunk, z_channels=256)
    sections["decoder_config"].update(trunk, in_ch=256)
    first["masker_config"]["target"] = "modules.masked_quantization.masker_vanilla_refine.VanillaMasker"
    sections["masker_config"].update(
        topk_ratio=0.25,
        input_token_num=1024,
        input_dim=256,
        patch_size=8,
        score_pred_net_mode="2layer",
        codebook_dim=256,
    )
    sections["demasker_config"].update(output_dim=256, codebook_dim=256, height_and_width=32, n_layer=8)
    sections["vqconfig"].update(codebook_size=1024, codebook_dim=256, restart_unused_codes=True)
    stack = top["transformer_config"]["params"]
    stack.update(position_size=1025, block_size=1024, position_layer=12, value_layer=12, n_head=16, n_embd=1024)
    stack["vocab_size"] = 1024 + start.get("n_classes", 1)
    del top["n_classes"]
    top.update(start, sos_pos_token=1024, height_and_weight=32)
    return {**config, "target": target}


@pytest.mark.parametrize(
    ("target", "start", "size"),
    [(MQ_CLASS, {"n_classes": 1000}, 309_606_400), (MQ_UNCONDITIONAL, {"sos_token": 1024}, 307_560_448)],
)
def test_published_sizes(target, start, size):
    """Protects the reading of the published configurations: the sizes are those of our preset, and both models have as
    many parameters as the released code's (section 7; of those its unused time projections are not ours)."""
    released = released_mq_transformer(published_config(target, **start))
    with torch.device("meta"):
        tokenizer = MQVAE(released_mq_tokenizer(released.first_stage, "first_stage_config"))
        transformer = StackedTransformer(released.config, released.layout)
        preset = mq_class_v12p12()
    assert sum(p.numel() for p in transformer.parameters()) == size
    codebook, unused = 1025 * 256, 1_181_952
    assert sum(p.numel() for p in tokenizer.parameters()) + codebook + unused == 36_938_886
    assert tokenizer.config.kept == released.layout.kept == 256
    sources = transformer_sources(transformer)
    assert Source("value_pos_emb.weight", (1025, 1024)) in sources["position_emb.weight"]
    if start.get("n_classes"):
        assert preset.layout == released.layout
        assert preset.tokenizer.config == tokenizer.config
        assert preset.transformer.config == replace(released.config, attention_dropout=0.0)
