"""Imported checkpoints of the released code give its numbers: entropy, tokenizer, sequences, teacher forcing."""

import json

import pytest
import torch
from dq_golden import GOLDEN, STAGE_2, load, model, released_inputs, teacher_forcing, with_starts

from dvq_rt.layout import ORDERS, TokenLayout
from training.checkpoint import load_checkpoint
from training.import_published import import_published, main
from training.losses import stacked_losses
from training.models.dqvae import spread, to_vectors
from training.models.router import patch_entropy
from training.thresholds import percentiles

LOSSES = {
    "position_loss": "position",
    "content_loss": "content",
    "coarse_position_loss": "position_0",
    "fine_position_loss": "position_1",
}


def test_entropy(check):
    """Protects the entropy formula on flat, dark and noisy patches, with the model's and the released table's bins."""
    g = load("a2_entropy_formula")
    check.close("model bins", patch_entropy(g["image"], 8), g["entropy"])
    check.close("table bins", patch_entropy(g["image"], 8, low=0.0), g["entropy_threshold_script"])


def test_threshold_table(check):
    """Protects the rule that turns sorted entropies into a percentile table, and the table's way into the model."""
    table = json.loads((GOLDEN / "a_dual_entropy" / "thresholds.json").read_text())
    want = torch.tensor([table[str(p)] for p in range(1, 100)])
    shuffled = load("a_dual_entropy", "threshold_source")["sorted_entropies"].flip(0)
    check.close("table", percentiles(shuffled), want, tolerance=0.0)
    tokenizer = model("a_dual_entropy").tokenizer
    check.close("buffer", tokenizer.entropy_thresholds, want, tolerance=0.0)
    check.close("threshold", tokenizer.thresholds()[0], torch.tensor(table["50"]), tolerance=0.0)


@pytest.mark.parametrize(("ratio", "percent"), [(0.5, 50), (0.55, 56), (0.56, 57), (0.3, 30), (0.01, 1), (0.99, 99)])
def test_fine_ratio(ratio, percent):
    """Protects the released truncation of the ratio, which shifts 0.55 and 0.56 by one key (spec Q12)."""
    case = GOLDEN / "a_dual_entropy"
    config = json.loads((case / "config.json").read_text())
    config["params"]["encoderconfig"]["params"]["router_config"]["params"]["fine_grain_ratito"] = ratio
    tokenizer = import_published(config, case / "model.ckpt").tokenizer
    table = json.loads((case / "thresholds.json").read_text())
    assert tokenizer.config.fine_percent == percent
    assert tokenizer.thresholds()[0] == torch.tensor(table[str(100 - percent)])


@torch.no_grad()
def test_tokenizer(check):
    """Protects every step of the tokenizer: encoder, router, merge, quantizer and its loss, decoder."""
    g, tokenizer = load("a_dual_entropy"), model("a_dual_entropy").tokenizer
    assert not tokenizer.training
    assert {p.dtype for p in tokenizer.parameters()} == {torch.float32}
    coarse, fine = tokenizer.encoder(g["image"])
    check.close("h_coarse", coarse, g["h_coarse"])
    check.close("h_fine", fine, g["h_fine"])
    encoding = tokenizer.encode(g["image"])
    check.close("entropy", encoding.scores, g["entropy"])
    check.same("grain", encoding.grain, g["grain_indices"])
    check.same("gate", torch.nn.functional.one_hot(encoding.grain, 2).permute(0, 3, 1, 2), g["gate"])
    check.same("codes", encoding.codes, g["codes"])
    grain = spread(encoding.grain)[:, None]
    check.close("h_merged", torch.where(grain == 0, spread(coarse), fine), g["h_merged"])
    h = tokenizer.features(g["image"]).merged
    check.close("h_pre_quant", h, g["h_pre_quant"])
    mask = 0.25 + 0.75 * grain.float()
    check.close("codebook_mask", mask, g["codebook_mask"], tolerance=0.0)
    quantized = tokenizer.quantizer(to_vectors(h), mask.flatten())
    values = quantized.values.view(2, 8, 8, -1).permute(0, 3, 1, 2)
    check.close("quant", values, g["quant"])
    check.close("emb_loss", quantized.loss[None], g["emb_loss"])
    check.close("reconstruction", tokenizer.decode(values), g["reconstruction"])
    check.close("decode_codes", tokenizer.decode_codes(g["codes"]), g["reconstruction"])
    forward = tokenizer(g["image"])
    check.close("forward", forward.images, g["reconstruction"])
    check.close("forward loss", forward.loss[None], g["emb_loss"])


@pytest.mark.parametrize("order", ORDERS)
def test_sequences(check, order):
    """Protects the sequences of code maps, all-coarse and all-fine ones included, in both orders, and the way back."""
    g = load("d_permuter")
    layout = TokenLayout(codebook_size=64, sides=(4, 8), order=order)
    for name, got in released_inputs(layout, list(zip(g["codes"], g["grain_indices"], strict=True))).items():
        check.same(name, got, g[f"{order}.{name}"])
    for row in range(5):
        parts = [g[f"{order}.{name}"][row] for name in ("coarse_content", "fine_content")]
        places = [g[f"{order}.{name}"][row] for name in ("coarse_position", "fine_position")]
        joint = torch.cat([places[0], places[1] + layout.position_offset(1)])
        codes, grain = layout.to_map(torch.cat(parts).tolist(), joint.tolist())
        check.same("back", torch.from_numpy(codes), g[f"{order}.back"][row])
        check.same("grain", torch.from_numpy(grain), g["grain_indices"][row])


def test_sequence_with_holes(check):
    """Protects the reading of a sequence that ends early: the rest is ignored, uncovered cells hold code 0."""
    g = load("d_permuter")
    layout = TokenLayout(codebook_size=64, sides=(4, 8))
    content = torch.cat([g["hole.coarse_content"][0], g["hole.fine_content"][0]])
    joint = torch.cat([g["hole.coarse_position"][0], g["hole.fine_position"][0] + layout.position_offset(1)])
    codes, _ = layout.to_map(content.tolist(), joint.tolist())
    check.same("back", torch.from_numpy(codes), g["hole.back"][0])


@torch.no_grad()
@pytest.mark.parametrize("sample", ["sample0", "sample1", "sample2", "padded"])
@pytest.mark.parametrize("case", STAGE_2)
def test_teacher_forcing(check, case, sample):
    """Protects ids, embeddings, both stacks and the losses; in the padded batch pads are attended to as released."""
    g, layout, transformer = load(case, "teacher_forcing"), model(case).layout, model(case).transformer
    given = {k.removeprefix(f"{sample}.in."): v for k, v in g.items() if k.startswith(f"{sample}.in.")}
    rows = range(3) if sample == "padded" else [int(sample[-1])]
    ours = released_inputs(layout, [(g["codes"][i], g["grain_indices"][i]) for i in rows])
    for name, value in with_starts(
        layout, ours, g["labels"][rows] if layout.classes else torch.zeros(len(rows))
    ).items():
        check.same(name, value, given[name])
    inputs, targets = teacher_forcing(layout, given)
    position, content = transformer(**inputs)
    if sample != "padded":
        check.close("position logits", position, g[f"{sample}.position_logits"])
        check.close("content logits", content, g[f"{sample}.content_logits"])
    losses = stacked_losses(position, content, **targets)
    for theirs, ours_name in LOSSES.items():
        check.close(theirs, losses[ours_name][None], g[f"{sample}.{theirs}"])


@torch.no_grad()
@pytest.mark.parametrize("case", ["e_class2_entropy", "f_uncond"])
def test_images_to_losses(check, case):
    """Protects the whole way of training: images, codes, padded sequences, losses."""
    g, imported = load(case, "teacher_forcing"), model(case)
    encoding = imported.tokenizer.encode(g["image.x"])
    ours = released_inputs(imported.layout, list(zip(encoding.codes, encoding.grain, strict=True)))
    for name, value in ours.items():
        check.same(name, value, g[f"image.{name}"])
    labels = g["image.labels"] if imported.layout.classes else torch.zeros(2)
    inputs, targets = teacher_forcing(imported.layout, with_starts(imported.layout, ours, labels))
    losses = stacked_losses(*imported.transformer(**inputs), **targets)
    for theirs, ours_name in LOSSES.items():
        check.close(theirs, losses[ours_name][None], g[f"image.{theirs}"])


@pytest.mark.parametrize("case", ["a_dual_entropy", "e_class2_entropy", "e2_class_content_only"])
def test_command(case, tmp_path, capsys):
    """Protects the command: the folder it writes loads as the same model, and an existing folder stays as it is."""
    out = tmp_path / "checkpoint"
    arguments = [str(GOLDEN / case / "config.json"), str(GOLDEN / case / "model.ckpt"), "--out", str(out)]
    main(arguments)
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    written, imported = load_checkpoint(out), model(case)
    assert written.config() == imported.config()
    assert written.state_dict().keys() == imported.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(written.state_dict().values(), imported.state_dict().values(), strict=True)
    )
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        main(arguments)
    assert "already exists" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_yaml_with_a_model_section(tmp_path):
    """Protects the released file shape, a YAML file with ``model:`` and further sections; its paths start beside it."""
    import yaml

    case = GOLDEN / "a_dual_entropy"
    config = json.loads((case / "config.json").read_text())
    (tmp_path / "a.yml").write_text(yaml.safe_dump({"model": {"base_learning_rate": 1e-3, **config}, "data": {}}))
    (tmp_path / "thresholds.json").write_text(json.dumps({str(p): 0.5 for p in range(1, 100)}))
    imported = import_published(tmp_path / "a.yml", case / "model.ckpt")
    assert imported.tokenizer.thresholds()[0] == 0.5


def test_base_folder_and_own_first_stage(tmp_path):
    """Protects where paths start with a config given as a mapping, and the tokenizer's absence without its tensors."""
    case = GOLDEN / "f_uncond"
    config = json.loads((case / "config.json").read_text())
    assert import_published(config, case / "model.ckpt").tokenizer is not None
    alone = tmp_path / "model.ckpt"
    alone.write_bytes((case / "model.ckpt").read_bytes())
    assert import_published(config, alone).tokenizer is None
    assert import_published(config, alone, base=case).tokenizer is not None
