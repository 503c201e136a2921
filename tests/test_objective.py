"""The objective of stage 1: its terms, its networks' weights, and what a user can get wrong about them."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import MASKED, TOKENIZER
from torch import Tensor

from dvq_rt.files import read_dataclass
from runtimes.errors import CheckpointError, ConfigError
from training.checkpoint import load_checkpoint, load_training_state
from training.config import read_config
from training.loop import TrainConfig
from training.losses import ADVERSARIAL_LOSSES, PICTURE_LOSSES
from training.models.dqvae import DQVAE
from training.models.mqvae import MQVAE
from training.models.perceptual import LPIPS, EfficientNetDistance, EfficientNetLite0
from training.models.tokenizer import Tokenizer
from training.objective import Objective, StageOneConfig, starts
from training.perceptual import LINEAR_FILE, LITE0_FILE, LITE0_PACKAGE, VGG_FILE, load_perceptual
from training.train_tokenizer import train_tokenizer


def published_lite0(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the whole EfficientNet-Lite0 under the published names."""
    torch.manual_seed(seed)
    tensors = EfficientNetLite0((len(EfficientNetLite0.STAGES) - 1,)).state_dict()
    names = {
        name: ".".join(part if part.isdigit() else f"_{part}" for part in name.split(".")[:-1]) for name in tensors
    }
    whole = {f"{names[name]}.{name.rpartition('.')[2]}": tensor for name, tensor in tensors.items()}
    return {**whole, "_conv_head.weight": torch.zeros(2), "_bn1.bias": torch.zeros(2), "_fc.bias": torch.zeros(2)}


@pytest.fixture
def lite0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the published one, with random weights; the path of its file."""
    package = tmp_path / LITE0_PACKAGE
    (package / LITE0_FILE).parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.save(published_lite0(), package / LITE0_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, LITE0_PACKAGE, raising=False)
    return package / LITE0_FILE


def test_picture_losses() -> None:
    """L1 and L2 are means over all values; the multi-scale loss is what configurations without a choice get."""
    target, output = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), -0.5)
    assert PICTURE_LOSSES["l1"](target, output).item() == 0.5
    assert PICTURE_LOSSES["l2"](target, output).item() == 0.25
    assert PICTURE_LOSSES["multiscale"](target, output).item() == pytest.approx(4 * (0.5 + 0.25))
    assert StageOneConfig().picture == "multiscale" and StageOneConfig().perceptual == "none"


def test_non_saturating_loss() -> None:
    """The logistic pair: a blind discriminator pays 2 ln 2; a generator that is found out has a gradient of nearly 1,
    where the saturating form would have none."""
    generator, discriminator = ADVERSARIAL_LOSSES["non_saturating"]
    blind = torch.zeros(3, 1, 2, 2)
    assert discriminator(blind, blind).item() == pytest.approx(2 * math.log(2))
    logits = torch.tensor([-12.0], requires_grad=True)
    generator(logits).backward()
    assert logits.grad is not None and logits.grad.item() == pytest.approx(-1, abs=1e-4)


def tokenizer_of(family: str) -> Tokenizer:
    torch.manual_seed(1)
    vae: Tokenizer = DQVAE(TOKENIZER) if family == "dq" else MQVAE(MASKED)
    if isinstance(vae, DQVAE):
        vae.entropy_thresholds.fill_(1.0)
    return vae.train()


def images_of(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("family", ["dq", "mq"])
def test_all_terms_of_either_family(family: str, lite0: Path) -> None:
    """Picture, perceptual and adversarial loss make one loss. Its gradients are finite; the adversarial weight is a
    plain number, the perceptual network stays as it was, and the discriminator learns on its own turn only."""
    vae = tokenizer_of(family)
    stage = StageOneConfig(
        warmup_fraction=0,
        picture="l1",
        perceptual="efficientnet",
        perceptual_weight=0.5,
        adversarial="non_saturating",
        adversarial_weight=0.75,
        adversarial_start=0.5,
        discriminator_width=4,
        discriminator_layers=2,
    )
    last = vae.get_parameter("decoder.conv_out.weight")
    objective = Objective(stage, starts(stage, 10), 32, last, load_perceptual("efficientnet"))
    assert objective.discriminator is not None and objective.perceptual is not None
    before = {name: tensor.clone() for name, tensor in objective.perceptual.state_dict().items()}
    early = objective.losses(vae, images_of(), 4)
    assert "adversarial" not in early and objective.critic_loss() is None
    parts = objective.losses(vae, images_of(), 5)
    weight = parts["adversarial_weight"]
    assert not weight.requires_grad and 0 < weight <= stage.adversarial_cap
    total = parts["picture"] + 0.5 * parts["perceptual"] + weight * parts["adversarial"] + parts["commitment"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    parts["loss"].backward()
    gradients = [p.grad for p in vae.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert all(p.grad is None for p in objective.discriminator.parameters())
    judged = objective.critic_loss()
    assert judged is not None
    judged.backward()
    assert all(p.grad is not None for p in objective.discriminator.parameters())
    assert not objective.perceptual.training and not any(p.requires_grad for p in objective.perceptual.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.perceptual.state_dict().items())
    error = objective.error(images_of(), -images_of())
    flat = (2 * images_of()).abs().mean((1, 2, 3))
    assert torch.allclose(error["loss"], flat + 0.5 * error["perceptual"]) and error["loss"].shape == (4,)


def test_interrupted_run_goes_on(lite0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with every term, killed and resumed, has the losses of one that was not. Its checkpoint holds the tokenizer
    alone, its training state the discriminator too, and nothing holds the frozen network; the best checkpoint is the
    one whose error, the perceptual part included, is the smallest."""
    data, rng = tmp_path / "data" / "noise", np.random.default_rng(0)
    data.mkdir(parents=True)
    for n in range(12):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data / f"{n}.png")
    training = TrainConfig(steps=20, batch_size=4, warmup=2, validate_every=5, picture_every=20, checkpoint_every=10)
    terms = {"perceptual": "efficientnet", "adversarial_weight": 0.75, "adversarial_start": 0.25}
    stage = StageOneConfig(**terms, val_fraction=0.2, discriminator_width=4, discriminator_layers=2)

    def run(name: str, resume: bool = False) -> list[dict[str, Any]]:
        train_tokenizer(data.parent, tmp_path / name, TOKENIZER, training, stage, resume)
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "s"} for row in rows]

    whole = run("whole")
    with monkeypatch.context() as patch:
        losses = Objective.losses

        def fail(
            self: Objective, tokenizer: torch.nn.Module, images: Tensor, step: int, scale: float
        ) -> dict[str, Tensor]:
            if step == 13:
                raise RuntimeError("power cut")
            return losses(self, tokenizer, images, step, scale)

        patch.setattr(Objective, "losses", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            run("cut")
    assert run("cut", resume=True) == whole
    trained = [row["train"] for row in whole if "train" in row]
    assert all({"perceptual", "adversarial", "critic"} <= set(row) for row in trained)
    checked = {row["step"]: row["val"]["loss"] for row in whole if "val" in row and "loss" in row["val"]}
    state = load_training_state(tmp_path / "whole" / "best")
    assert (state.values["best"], state.step) == min((loss, step) for step, loss in checked.items())
    tokenizer = load_checkpoint(tmp_path / "whole" / "checkpoint").state_dict()
    assert {name.split(".")[0] for name in tokenizer} == {"tokenizer"}
    extra = {name.split(".")[0] for name in load_training_state(tmp_path / "whole" / "checkpoint").tensors}
    assert {name for name in extra if not name.isdigit()} == {"critic", "critic_optimizer"}
    torch.save(published_lite0(seed=1), lite0)
    with pytest.raises(ConfigError, match=r"not started with the stage.perceptual that efficientnet holds now"):
        run("cut", resume=True)


def test_perceptual_gradients_are_finite(lite0: Path) -> None:
    """Flat images, whose features vanish in places, and equal ones have finite gradients in both distances."""
    lpips = LPIPS()
    for weight in lpips.weights:
        torch.nn.init.ones_(weight)
    for bias in (p for name, p in lpips.vgg.named_parameters() if name.endswith("bias")):
        torch.nn.init.constant_(bias, -0.1)
    substitute = load_perceptual("efficientnet")
    assert substitute is not None
    for net in (lpips, substitute):
        for target, made in ((1.0, 1.0), (1.0, -1.0), (0.0, 1.0)):
            images = torch.full((1, 3, 16, 16), made, requires_grad=True)
            distance = net(torch.full((1, 3, 16, 16), target), images)
            distance.sum().backward()
            assert images.grad is not None and torch.isfinite(images.grad).all() and torch.isfinite(distance).all()
            assert (distance.item() == 0) == (target == made)


def test_real_substitute_ranks_errors_as_people_do() -> None:
    """With the published weights a picture that is moved by a pixel is nearer than one that is as wrong in pixels
    because it is blurred, and that nearer than one with noise."""
    pytest.importorskip(LITE0_PACKAGE)
    net = load_perceptual("efficientnet")
    assert net is not None
    axis = torch.arange(64)
    rings = ((axis[:, None] - 30) ** 2 + (axis - 34) ** 2).sqrt().div(3).sin().expand(1, 3, 64, 64)
    moved = rings.roll(1, -1)
    wrong = (moved - rings).square().mean()
    blurred = torch.nn.functional.avg_pool2d(rings, 5, 1, 2, count_include_pad=False)
    blurred = rings + (blurred - rings) * (wrong / (blurred - rings).square().mean()).sqrt()
    noise = torch.randn(rings.shape, generator=torch.Generator().manual_seed(0)) * wrong.sqrt()
    distances = [net(rings, other).item() for other in (moved, blurred, rings + noise)]
    assert distances == sorted(distances) and distances[1] > 1.5 * distances[0]


def test_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has no weights reads which files are wanted, where they are published, and what does without them."""
    vgg = tmp_path / VGG_FILE
    for weights in ("", str(tmp_path), (str(vgg),), (str(vgg), str(tmp_path / LINEAR_FILE))):
        with pytest.raises(ConfigError) as caught:
            load_perceptual("lpips", weights)
        for word in (VGG_FILE, LINEAR_FILE, "download.pytorch.org", "PyPI package lpips", "perceptual=efficientnet"):
            assert word in str(caught.value)
    with pytest.raises(ConfigError, match="no file .*" + VGG_FILE):
        load_perceptual("lpips", str(tmp_path))
    monkeypatch.setattr("training.perceptual.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dvq-rt\[perceptual\]'.*stage.perceptual=none"):
        load_perceptual("efficientnet")


def lpips_files() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    net = LPIPS()
    return net.vgg.state_dict(), {f"lin{i}.model.1.weight": w.detach() for i, w in enumerate(net.weights)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda vgg, linear: vgg.pop("features.28.bias"), "missing .*features.28.bias"),
        (lambda vgg, linear: vgg.update({"features.29.bias": torch.zeros(1)}), "unknown .*features.29.bias"),
        (lambda vgg, linear: vgg.update({"features.0.bias": torch.zeros(1)}), "wrong shape .*features.0.bias"),
        (lambda vgg, linear: linear.pop("lin4.model.1.weight"), "vgg.pth .*missing"),
        (lambda vgg, linear: linear.update(features=[1]), "vgg.pth does not hold named tensors"),
        (lambda vgg, linear: vgg.update(features=Path("x")), VGG_FILE + " cannot be read"),
    ],
)
def test_wrong_lpips_weights(spoil, message: str, tmp_path: Path) -> None:
    """Every tensor has its place or the file is refused by name, and no pickle is executed."""
    vgg, linear = lpips_files()
    spoil(vgg, linear)
    torch.save(vgg, tmp_path / VGG_FILE)
    torch.save(linear, tmp_path / LINEAR_FILE)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_perceptual("lpips", str(tmp_path))
    assert "download.pytorch.org" in str(caught.value)


def test_wrong_substitute_weights(lite0: Path) -> None:
    """The trunk takes its tensors from the whole published network; one that nobody knows is refused."""
    net = load_perceptual("efficientnet")
    assert isinstance(net, EfficientNetDistance)
    published = published_lite0()
    assert torch.equal(net.net.blocks[1].expand_conv.weight, published["_blocks.1._expand_conv.weight"])
    torch.save({**published, "_blocks.16._bn0.bias": torch.zeros(1)}, lite0)
    with pytest.raises(CheckpointError, match=r"unknown .*blocks.16.bn0.bias"):
        load_perceptual("efficientnet")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"picture": "l3"}, r"stage.picture is 'l3'; it must be one of \['multiscale', 'l1', 'l2'\]"),
        ({"perceptual": "vgg"}, "stage.perceptual is 'vgg'"),
        ({"adversarial": "wgan"}, "stage.adversarial is 'wgan'"),
        ({"perceptual_weight": 0}, "stage.perceptual_weight is 0; it must be above 0"),
        ({"perceptual_weight": math.nan}, "perceptual_weight is nan"),
        ({"adversarial_cap": -1}, "stage.adversarial_cap is -1"),
        ({"lpips_weights": 3}, "lpips_weights"),
    ],
)
def test_wrong_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_dataclass(StageOneConfig, values, "stage", defaults=True)


@pytest.mark.parametrize("value", ["lpips", "efficientnet", "none"])
def test_perceptual_term_by_command(value: str) -> None:
    """``--set stage.perceptual=NAME`` works with a configuration that has no section ``stage``."""
    settings = read_config(
        "emoji_tokenizer", {"tokenizer": dict, "training": dict, "stage": StageOneConfig}, [f"stage.perceptual={value}"]
    )
    assert settings["stage"] == StageOneConfig(perceptual=value)


def test_sharp_configuration_differs_in_the_objective_alone() -> None:
    """What docs/training.md compares are two objectives, not two tokenizers or trainings."""
    sections = {"tokenizer": dict, "training": TrainConfig, "stage": StageOneConfig}
    sharp, plain = (read_config(name, sections, []) for name in ("emoji_sharp_tokenizer", "emoji_tokenizer"))
    assert (sharp["tokenizer"], sharp["training"]) == (plain["tokenizer"], plain["training"])
    assert sharp["stage"].perceptual == "efficientnet" and sharp["stage"].adversarial_weight > 0
    sharp["stage"].check_size(sharp["tokenizer"]["image_size"])


def test_images_too_small_to_judge() -> None:
    with pytest.raises(ConfigError, match="needs images of 24 px; these have 16, use fewer layers"):
        StageOneConfig(adversarial_weight=1).check_size(16)
    with pytest.raises(ConfigError, match="needs images of 16 px; these have 8, use 'efficientnet'"):
        StageOneConfig(perceptual="lpips").check_size(8)
    StageOneConfig(adversarial_weight=1, perceptual="lpips").check_size(24)


def test_learning_rates() -> None:
    """The released schedules: warm-up and half a cosine, which may end above 0, or a constant."""
    cosine = TrainConfig(steps=100, warmup=10, lr=1.0, least_lr=0.2)
    assert [cosine.rate(step) for step in (4, 10, 55, 99)] == [0.5, 1.0, pytest.approx(0.5), 0.2]
    constant = TrainConfig(steps=100, warmup=10, lr=1.0, lr_schedule="constant")
    assert [constant.rate(step) for step in (4, 10, 99)] == [0.5, 1.0, 1.0]
    for wrong in ({"lr_schedule": "step"}, {"least_lr": 2.0, "lr": 1.0}, {"least_lr": -1.0}):
        with pytest.raises(ConfigError, match="training." + next(iter(wrong))):
            TrainConfig(**wrong)  # type: ignore[arg-type]
