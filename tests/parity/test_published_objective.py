"""The released objective of stage 1: perceptual distance, adversarial loss with its capped weight, both sides."""

import json
import math
from pathlib import Path

import torch
from dq_golden import GOLDEN, load
from torch import Tensor, nn

from training.models.perceptual import LPIPS
from training.models.tokenizer import Reconstruction
from training.objective import Objective, StageOneConfig, starts
from training.perceptual import LINEAR_FILE, VGG_FILE, load_perceptual


def formula(shape: tuple[int, ...], ordinal: int, kind: str) -> Tensor:
    """A parameter as the reference's ``lpips_formula.json`` defines it."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    wave = torch.sin(0.001 * i * i + 0.7 * i + ordinal)
    values = {
        "weight": lambda: wave * math.sqrt(6 / (shape[1] * 9)),
        "bias": lambda: 0.1 * wave,
        "linear": lambda: 0.1 * wave.abs(),
    }
    return values[kind]().float().view(shape)


def write_weights(folder: Path) -> None:
    """The two published files, under their published names of files and tensors, with the formula's weights."""
    vgg, linear, shapes = {}, {}, LPIPS().vgg.state_dict()
    order = json.loads((GOLDEN / "g_training" / "lpips_formula.json").read_text())["parameter_order"]
    for ordinal, name in enumerate(order):
        if name.startswith("lin"):
            width = (64, 128, 256, 512, 512)[int(name[3])]
            linear[name] = formula((1, width, 1, 1), ordinal, "linear")
        else:
            _, _, number, kind = name.split(".")
            ours = f"features.{number}.{kind}"
            vgg[ours] = formula(tuple(shapes[ours].shape), ordinal, kind)
    assert vgg.keys() == shapes.keys()
    torch.save({**vgg, "classifier.0.bias": torch.zeros(4)}, folder / VGG_FILE)
    torch.save(linear, folder / LINEAR_FILE)


def test_lpips(check, tmp_path):
    """Protects LPIPS, number for number, by way of the files that it is published in."""
    write_weights(tmp_path)
    g, net = load("g_training", "lpips"), load_perceptual("lpips", str(tmp_path))
    assert net is not None
    check.close("value", net(g["input"], g["target"]), g["value"].flatten())
    files = [str(tmp_path / name) for name in (VGG_FILE, LINEAR_FILE)]
    by_files = load_perceptual("lpips", files)
    assert by_files is not None and torch.equal(by_files(g["input"], g["target"]), net(g["input"], g["target"]))
    check.close("of the same images", net(g["input"], g["input"]), torch.zeros(2))


class LastLayer(nn.Module):
    """A tokenizer of which only the last convolution is real."""

    def __init__(self, g: dict[str, Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 3, 3, padding=1)
        self.conv.load_state_dict({"weight": g["last_layer_weight"], "bias": g["last_layer_bias"]})
        self.features, self.commitment = g["features"], g["codebook_loss"][0]

    def forward(self, images: Tensor, *, quantize: bool) -> Reconstruction:
        nothing = torch.zeros(len(images), 1, 1)
        return Reconstruction(self.conv(self.features), self.commitment, None, nothing, nothing)


def test_adversarial_objective(check):
    """Protects the whole objective as released: L1, the adversarial loss with its weight at the cap, the commitment
    loss, the gradient of the last layer; then the discriminator's hinge loss and gradient; and the batch statistics
    that both turns leave behind."""
    g, options = load("g_training", "gan"), json.loads((GOLDEN / "g_training" / "gan_config.json").read_text())
    stage = StageOneConfig(
        warmup_fraction=0,
        quantizer_weight=options["codebook_weight"],
        picture="l1",
        adversarial=options["disc_loss"],
        adversarial_weight=options["disc_weight"],
        adversarial_cap=options["disc_weight_max"],
        adversarial_start=0,
        discriminator_width=options["disc"]["ndf"],
        discriminator_layers=options["disc"]["n_layers"],
    )
    tokenizer = LastLayer(g)
    objective = Objective(stage, starts(stage, 1), 16, tokenizer.conv.weight)
    assert objective.discriminator is not None
    objective.discriminator.load_state_dict(
        {name.removeprefix("disc."): tensor for name, tensor in g.items() if name.startswith("disc.")}
    )
    parts = objective.losses(tokenizer, g["image"], 0)
    parts["loss"].backward()
    logged = {"loss": "total_loss", "picture": "rec_loss", "adversarial": "g_loss", "adversarial_weight": "d_weight"}
    for ours, theirs in logged.items():
        check.close(ours, parts[ours].detach()[None], g[f"log.train_{theirs}"])
    check.close("generator loss", parts["loss"].detach()[None], g["generator_loss"])
    check.close("gradient of the last layer", tokenizer.conv.weight.grad, g["generator_grad_last_layer"])
    assert all(p.grad is None for p in objective.discriminator.parameters())

    loss = objective.critic_loss()
    assert loss is not None
    loss.backward()
    check.close("discriminator loss", loss.detach()[None], g["disc_loss"])
    first = objective.discriminator.get_parameter("main.0.weight")
    check.close("gradient of the discriminator", first.grad, g["disc_grad_first_conv"])
    state, after = objective.discriminator.state_dict(), "disc_after."
    for name, want in ((n.removeprefix(after), t) for n, t in g.items() if n.startswith(after)):
        (check.close if want.dtype.is_floating_point else check.same)(name, state[name], want)
