"""Every configuration file of both released repositories, by its values, is read as ours; one of ours is like it.

The files are written out here as trees of the values that matter; ``test_published_configs.py`` has what is refused.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dvq_rt.files import read_dataclass
from training.checkpoint import family_config
from training.config import read_config
from training.loop import TrainConfig
from training.models.dqvae import DQVAE
from training.models.mqvae import MQVAE
from training.models.transformer import TransformerConfig
from training.objective import StageOneConfig
from training.published.configs_dq import released_tokenizer, released_transformer
from training.published.configs_mq import released_mq_tokenizer, released_mq_transformer
from training.published.presets import PRESETS
from training.train_transformer import StageTwoConfig

Tree = dict[str, Any]
STAGE_1 = "models.stage1_dynamic.dqvae_"
STAGE_2 = "models.stage2_dynamic.dqtransformer_"
MODULES = "modules.dynamic_modules."


def node(target: str, **params: Any) -> Tree:
    return {"target": target, "params": params}


def decoder(target: str, **more: Any) -> Tree:
    sizes = {"ch": 128, "in_ch": 256, "out_ch": 3, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 2}
    return node(target, **sizes, resolution=256, attn_resolutions=[32], **more)


def encoder(target: str, mult: list[int], sides: list[int], **more: Any) -> Tree:
    sizes = {"ch": 128, "ch_mult": mult, "num_res_blocks": 2, "attn_resolutions": sides, "z_channels": 256}
    return node(target, **sizes, dropout=0.0, in_channels=3, resolution=256, **more)


def quantizer(target: str, **more: Any) -> Tree:
    sizes = {"codebook_size": 1024, "codebook_dim": 256, "commitment_beta": 0.25, "decay": 0.99}
    return node(target, **sizes, channel_last=False, restart_unused_codes=True, **more)


def dq_tokenizer(target: str, enc: Tree, loss: Tree | None = None) -> Tree:
    return node(
        f"{STAGE_1}{target}",
        encoderconfig=enc,
        decoderconfig=decoder(
            f"{MODULES}DecoderPositional.Decoder", latent_size=32, window_size=2, position_type="fourier+learned"
        ),
        lossconfig=loss or node("modules.losses.vqperceptual.DummyLoss"),
        vqconfig=quantizer("modules.vector_quantization.quantize2_mask.VectorQuantize2", accept_image_fmap=True),
        quant_before_dim=256,
        quant_after_dim=256,
        quant_sample_temperature=0.0,
        image_key="image",
        monitor="val_rec_loss",
        warmup_epochs=0.1,
        scheduler_type="linear-warmup_cosine-decay",
    )


def feature(target: str, enc: str, mult: list[int], sides: list[int], router: str, budget: str, **values: Any) -> Tree:
    gate = {"num_channels": 256, "normalization_type": "group-32", "gate_type": "2layer-fc-SiLu"}
    section = node(f"{MODULES}budget.BudgetConstraint_{budget}", **values)
    enc_node = encoder(f"{MODULES}{enc}", mult, sides, resamp_with_conv=True)
    enc_node["params"]["router_config"] = node(f"{MODULES}{router}", **gate)
    loss = node("modules.losses.vqperceptual_multidisc.VQLPIPSWithDiscriminator", budget_loss_config=section)
    return dq_tokenizer(target, enc_node, loss)


def entropy() -> Tree:
    table = "scripts/tools/thresholds/entropy_thresholds_imagenet_train_patch-16.json"
    router = node(f"{MODULES}RouterDual.DualGrainFixedEntropyRouter", json_path=table, fine_grain_ratito=0.5)
    enc = encoder(
        f"{MODULES}EncoderDual.DualGrainEncoder",
        [1, 1, 2, 2, 4],
        [16, 32],
        resamp_with_conv=True,
        update_router=False,
        router_config=router,
    )
    return dq_tokenizer("dual_entropy.DualGrainVQModel", enc)


def dual() -> Tree:
    values = {"target_ratio": 0.5, "gamma": 10.0, "min_grain_size": 16, "max_grain_size": 32, "calculate_all": True}
    return feature(
        "dual_feat.DualGrainVQModel",
        "EncoderDual.DualGrainEncoder",
        [1, 1, 2, 2, 4],
        [16, 32],
        "RouterDual.DualGrainFeatureRouter",
        "RatioMSE_DualGrain",
        **values,
    )


def triple() -> Tree:
    values = {"target_fine_ratio": 0.3, "target_median_ratio": 0.3, "gamma": 1.0}
    sizes = {"min_grain_size": 8, "median_grain_size": 16, "max_grain_size": 32}
    return feature(
        "triple_feat.TripleGrainVQModel",
        "EncoderTriple.TripleGrainEncoder",
        [1, 1, 2, 2, 4, 4],
        [8, 16, 32],
        "RouterTriple.TripleGrainFeatureRouter",
        "NormedSeperateRatioMSE_TripleGrain",
        **values,
        **sizes,
    )


def transformer(target: str, labels: int, starts: tuple[str, Tree], first: Tree) -> Tree:
    extra = labels or 1
    pads = {"content_pad_code": 1024, "coarse_position_pad_code": 256, "fine_position_pad_code": 1024}
    ends = {"content_eos_code": 1025, "coarse_position_eos_code": 257, "fine_position_eos_code": 1025}
    sizes = {"coarse_position_size": 258 + extra, "fine_position_size": 1026 + extra, "segment_size": 2}
    drops = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    stack = {"vocab_size": 1026 + extra, "block_size": 2048, "position_layer": 6, "content_layer": 18}
    return node(
        f"{STAGE_2}{target}.Dualformer",
        transformer_config=node(
            f"{MODULES}stackgpt.StackGPT", **stack, n_head=8, n_embd=1024, **sizes, **drops, **pads
        ),
        first_stage_config=first,
        permuter_config=node(
            f"{MODULES}permuter.DualGrainSeperatePermuter",
            coarse_hw=16,
            fine_hw=32,
            fine_position_order="row-first",
            **pads,
            **ends,
        ),
        content_loss_weight=1.0,
        position_loss_weight=1.0,
        activate_sos_for_fine_sequence=True,
        weight_decay=0.01,
        warmup_epochs=0,
        monitor="val_loss",
        **{starts[0]: starts[1]},
    )


CLASSES = (
    "class_cond_stage_config",
    node(
        f"{MODULES}label_provider.ClassAwareSOSProvider",
        n_classes=1000,
        threshold_content=1026,
        threshold_coarse_position=258,
        threshold_fine_position=1026,
        coarse_seg_sos=0,
        fine_seg_sos=1,
    ),
)
NONE = (
    "uncond_stage_config",
    node(
        f"{MODULES}label_provider.PositionAwareSOSProvider",
        coarse_sos=1026,
        coarse_pos_sos=258,
        fine_sos=1026,
        fine_pos_sos=1026,
        coarse_seg_sos=0,
        fine_seg_sos=1,
    ),
)
CONTENT = (
    "class_cond_stage_config",
    node(
        f"{MODULES}label_provider.ClassForContentOnlyPositionAwareSOSProvider",
        n_classes=1000,
        threshold=1026,
        coarse_pos_sos=258,
        fine_pos_sos=1026,
        coarse_seg_sos=0,
        fine_seg_sos=1,
    ),
)


def mq_tokenizer(ratio: float) -> Tree:
    masker = {"topk_ratio": ratio, "input_token_num": 1024, "input_dim": 256, "patch_size": 8, "codebook_dim": 256}
    demasker = {"output_dim": 256, "codebook_dim": 256, "height_and_width": 32, "n_layer": 8, "mask_init_value": 0.02}
    more = {"double_z": False, "out_ch": 3}
    return node(
        "models.stage1_masked.mqvae.MaskedVectorQuantizationModel",
        encoder_config=encoder("modules.diffusionmodules.model.Encoder", [1, 1, 2, 2], [32], **more),
        decoder_config=decoder("modules.masked_quantization.decoder.Decoder", dropout=0.0, give_pre_end=False),
        masker_config=node(
            "modules.masked_quantization.masker_vanilla_refine.VanillaMasker", score_pred_net_mode="2layer", **masker
        ),
        demasker_config=node("modules.masked_quantization.demasker_vanilla.VanillaDemasker", **demasker),
        lossconfig=node("modules.losses.vqperceptual.VQLPIPSWithDiscriminator", disc_weight=0.75),
        vqconfig=quantizer(
            "modules.vector_quantization.quantize2.VectorQuantize2", accept_image_fmap=False, commit_loss_legacy=True
        ),
        image_key="image",
    )


def stackformer(target: str, vocabulary: int, **more: Any) -> Tree:
    stack = {"vocab_size": vocabulary, "position_size": 1025, "block_size": 1024, "position_layer": 12}
    drops = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "add_absolute_position": True}
    return node(
        f"models.stage2_masked.{target}",
        monitor="val_loss",
        weight_decay=0.01,
        warmup_epochs=0,
        position_value_permuter_config={"target": "modules.masked_quantization_stage2.permuter.raster_scan_permuter"},
        transformer_config=node(
            "modules.masked_quantization_stage2.stackedgpt.ReverseStackedPositionGPT",
            **stack,
            value_layer=12,
            n_head=16,
            n_embd=1024,
            **drops,
        ),
        first_stage_config=mq_tokenizer(0.25),
        ignore_keys=[],
        first_stage_key="image",
        pkeep=1.0,
        sos_pos_token=1024,
        loss_position_weight=1.0,
        height_and_weight=32,
        add_absolute_position=True,
        **more,
    )


IMAGES, GPUS = 1_281_167, 8
DQ_STAGE_1 = {"adversarial_weight": 1.0, "adversarial_cap": 0.75}
MQ_STAGE_1 = {"adversarial_weight": 0.75, "adversarial_cap": 1.0}


def check_schedule(training: TrainConfig, per_gpu: int, epochs: int) -> None:
    """The released recipe: ImageNet, eight GPUs, half a cosine to 0, mirrored images, no clipping."""
    batch = GPUS * per_gpu
    assert (training.batch_size, training.steps) == (batch, epochs * (IMAGES // batch))
    assert training.flip and training.clip >= 1e9


@pytest.mark.parametrize(
    ("name", "config", "per_gpu", "balance"),
    [
        ("dq_dual_entropy_tokenizer", entropy(), 30, DQ_STAGE_1),
        ("dq_dual_feature_tokenizer", dual(), 30, DQ_STAGE_1),
        ("dq_triple_feature_tokenizer", triple(), 30, DQ_STAGE_1),
        ("mq_tokenizer", mq_tokenizer(0.30), 4, MQ_STAGE_1),
    ],
)
def test_own_configs_of_stage_1(name: str, config: Tree, per_gpu: int, balance: Tree) -> None:
    """Sizes, losses and schedule of the configuration that trains each published tokenizer here; of the released faults
    only the counting of copies (spec Q18) is put right."""
    ours = read_config(name, {"tokenizer": dict, "training": TrainConfig, "stage": StageOneConfig}, [])
    sizes, training, stage = dict(ours["tokenizer"]), ours["training"], ours["stage"]
    family = sizes.pop("family", "dq")
    tokenizer = read_dataclass(family_config(family), sizes, name, defaults=True)
    if family == "dq":
        assert tokenizer == replace(released_tokenizer(config, "config").config, mask_weighted=True)
    else:
        assert tokenizer == released_mq_tokenizer(config, "config")
    check_schedule(training, per_gpu, 50)
    assert training.lr == pytest.approx(4.5e-6 * GPUS * per_gpu) and training.betas == (0.5, 0.9)
    assert training.warmup == round(0.1 * (IMAGES // training.batch_size)) and training.weight_decay == 0
    assert {field: getattr(stage, field) for field in balance} == balance
    assert (stage.picture, stage.perceptual, stage.adversarial) == ("l1", "lpips", "hinge")
    assert (stage.perceptual_weight, stage.quantizer_weight, stage.warmup_fraction) == (1, 1, 0)
    assert (stage.adversarial_start, stage.discriminator_width, stage.discriminator_layers) == (0, 64, 3)


@pytest.mark.parametrize(
    ("name", "released", "per_gpu", "epochs"),
    [
        (
            "dq_class_transformer",
            released_transformer(transformer("class2_entropy", 1000, CLASSES, entropy())),
            30,
            100,
        ),
        (
            "dq_unconditional_transformer",
            released_transformer(transformer("uncond_entropy", 0, NONE, entropy())),
            30,
            100,
        ),
        (
            "mq_class_transformer",
            released_mq_transformer(
                stackformer("stackformer_class.ClassTransformer", 2024, n_classes=1000, cond_stage_key="class_label")
            ),
            4,
            50,
        ),
        (
            "mq_unconditional_transformer",
            released_mq_transformer(stackformer("stackformer_uncond.ReverseStackformer", 1025, sos_token=1024)),
            4,
            50,
        ),
    ],
)
def test_own_configs_of_stage_2(name: str, released: Any, per_gpu: int, epochs: int) -> None:
    """Sizes and schedule of the configuration that trains each published transformer here. The position table is as
    long as an image can be, no longer."""
    ours = read_config(name, {"transformer": dict, "training": TrainConfig, "stage": StageTwoConfig}, [])
    training, stage = ours["training"], ours["stage"]
    sizes = {**ours["transformer"], "block_size": released.config.block_size}
    assert read_dataclass(TransformerConfig, sizes, name, defaults=True) == released.config
    check_schedule(training, per_gpu, epochs)
    assert (training.lr, training.betas, training.weight_decay, training.warmup) == (5e-4, (0.9, 0.95), 0.01, 0)
    assert stage.order == released.layout.order and stage.label_dropout == 0
    assert bool(stage.labels) == (released.layout.classes == 0)


@pytest.mark.parametrize(
    ("config", "sides", "parameters", "fields"),
    [
        (entropy(), (16, 32), 0, {"router": "entropy", "fine_percent": 50}),
        (dual(), (16, 32), 264_706, {"router": "feature", "fine_percent": 50, "budget": 20, "router_gate": "silu"}),
        (triple(), (8, 16, 32), 594_435, {"fine_percent": 30, "median_percent": 30, "budget": 1, "grains": 3}),
    ],
)
def test_dq_stage_1(config: Tree, sides: tuple[int, ...], parameters: int, fields: Tree) -> None:
    """The three DQ-VAEs, with the number of values in their routers."""
    released = released_tokenizer(config, "config").config
    assert released.sides == sides and {name: getattr(released, name) for name in fields} == fields
    names = {name: p.numel() for name, p in DQVAE(released).named_parameters() if name.startswith("router.")}
    assert sum(names.values()) == parameters


@pytest.mark.parametrize(
    ("config", "classes", "sides"),
    [
        (transformer("class2_entropy", 1000, CLASSES, entropy()), 1000, (16, 32)),
        (transformer("uncond_entropy", 0, NONE, entropy()), 0, (16, 32)),
    ],
)
def test_dq_stage_2(config: Tree, classes: int, sides: tuple[int, ...]) -> None:
    """Both DQ-Transformers that have a file."""
    released = released_transformer(config)
    assert (released.layout.classes, released.layout.sides) == (classes, sides)
    assert (released.config.position_blocks, released.config.content_blocks) == (6, 18)
    assert released_tokenizer(released.first_stage, "first_stage_config").config.sides == sides


@pytest.mark.parametrize(
    ("name", "config"),
    [("dq_class_p6c18", entropy()), ("dq_feature_class_p6c18", dual()), ("dq_triple_class_p6c18", triple())],
)
def test_presets(name: str, config: Tree) -> None:
    """Presets have the published sizes, and their vocabularies."""
    with torch.device("meta"):
        made = PRESETS[name]()
    released = released_tokenizer(config, "config").config
    assert made.tokenizer is not None and made.transformer is not None
    assert made.tokenizer.config == replace(released, mask_weighted=True, budget=made.tokenizer.config.budget)
    layout = made.transformer.layout
    assert layout.sides == released.sides and layout.content_vocabulary == layout.position_head == 2026
    assert layout.position_table == sum(side**2 + 1002 for side in layout.sides)


def test_dq_stage_2_with_a_feature_router() -> None:
    """The class model whose first stage has a learned router: it cannot decode codes in the released code, here it
    can."""
    config = transformer("class", 1000, CONTENT, dual())
    sizes = config["params"]["transformer_config"]["params"]
    sizes |= {"coarse_position_size": 259, "fine_position_size": 1027}
    released = released_transformer(config)
    assert not released.layout.label_in_position
    assert released_tokenizer(released.first_stage, "first_stage_config").config.router == "feature"


def test_mq() -> None:
    """The MQ-VAE and both Stackformers."""
    tokenizer = released_mq_tokenizer(mq_tokenizer(0.30), "config")
    assert tokenizer.kept == 307 and isinstance(MQVAE(tokenizer), MQVAE)
    for config, classes in (
        (stackformer("stackformer_class.ClassTransformer", 2024, n_classes=1000, cond_stage_key="class_label"), 1000),
        (stackformer("stackformer_uncond.ReverseStackformer", 1025, sos_token=1024), 0),
    ):
        released = released_mq_transformer(config)
        assert (released.layout.kept, released.layout.classes) == (256, classes)
