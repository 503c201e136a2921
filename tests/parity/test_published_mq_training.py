"""Training as the released MQ code does it: the quantizer's updates, both objectives, their gradients, the schedule."""

import copy
import math

import pytest
import torch
from mq_golden import (
    GOLDEN,
    GRADIENT,
    IMAGES,
    LOGITS,
    LOSS,
    MAPS,
    PURE,
    extra,
    load,
    model,
    teacher_forcing,
    to_ours,
    to_released,
)

from training.loop import TrainConfig, make_optimizer, schedule
from training.losses import adaptive_weight, hinge_loss, stacked_losses
from training.models.discriminator import PatchDiscriminator
from training.models.quantizer import EMAQuantizer
from training.objective import Objective, StageOneConfig, starts
from training.published.weights import QUANTIZER_NAMES, tokenizer_sources, transformer_sources

RATES = {"stage1_linear_warmup": math.inf, "stage1_and_2_warmup_cosine": None}


@pytest.mark.parametrize("case", ["quantizer_ema", "quantizer_restart_inactive"])
def test_quantizer_updates(check, case):
    """Protects the moving averages over two steps: each quantizes with the codebook before it, and passes the gradient
    straight through; with restarts on, codes in use stay where they are."""
    options = extra(case, "config")["model"]["params"]
    size, dim = options["codebook_size"], options["codebook_dim"]
    state = torch.load(GOLDEN / case / "model.ckpt", weights_only=True)["state_dict"]
    names = {
        ours.removeprefix("quantizer."): theirs.removeprefix("quantize.") for ours, theirs in QUANTIZER_NAMES.items()
    }
    restart = 1.0 if options["restart_unused_codes"] else 0.0
    quantizer = EMAQuantizer(size, dim, beta=options["commitment_beta"], decay=options["decay"], restart_below=restart)
    quantizer.load_state_dict({ours: state[theirs][:size] for ours, theirs in names.items()})
    given, g = load(case, "inputs"), load(case)
    for step, name, training in (("eval", "x1", False), ("step1", "x1", True), ("step2", "x2", True)):
        quantizer.train(training)
        x = given[name].clone().requires_grad_()
        out = quantizer(x.transpose(1, 2).flatten(0, 1))
        values = out.values.view(2, -1, dim).transpose(1, 2)
        check.same("codes", out.codes.view(2, -1), g[f"{step}.codes"])
        check.close("x_q", values.detach(), g[f"{step}.x_q"], **PURE)
        check.close("loss", out.loss.detach()[None], g[f"{step}.loss"], **LOSS)
        if step == "step1":
            ((values * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() + out.loss).backward()
            check.close("grad_x", x.grad, g["step1.grad_x"], **PURE)
        if training:
            for ours, theirs in names.items():
                check.close(ours, getattr(quantizer, ours), g[f"after{step[-1]}.{theirs}"][:size], **PURE)


def test_tokenizer_step(check):
    """Protects the objective of stage 1 in training mode: picture loss, adversarial loss with its adaptive weight,
    commitment loss, the gradient of every parameter; then the discriminator's loss; and what both passes leave behind
    in the codebook and in the batch statistics. The released code runs the tokenizer once per optimizer, so twice."""
    case, options = "mqvae_train", extra("mqvae_train", "config")["model"]["params"]["lossconfig"]["params"]
    g, x, logs = load(case), load(case, "inputs")["image"], extra(case)["logs"]
    vae = copy.deepcopy(model("mqvae_refine").tokenizer).train()
    state = torch.load(GOLDEN / case / "model.ckpt", weights_only=True)["state_dict"]
    stage = StageOneConfig(
        warmup_fraction=0,
        quantizer_weight=options["codebook_weight"],
        picture="l1",
        adversarial_weight=options["disc_weight"],
        adversarial_cap=options["disc_weight_max"],
        adversarial_start=0,
        discriminator_width=options["disc_ndf"],
        discriminator_layers=options["disc_num_layers"],
    )
    objective = Objective(
        stage, starts(stage, 1), vae.config.codebook_size, vae.get_parameter("decoder.conv_out.weight")
    )
    discriminator = objective.discriminator
    assert discriminator is not None
    discriminator.load_state_dict({name.removeprefix("loss.discriminator."): t for name, t in state.items()})
    sources = {ours: parts[0].name for ours, parts in tokenizer_sources(vae).items()}

    def check_state(key):
        got = {sources[ours]: tensor for ours, tensor in vae.state_dict().items()}
        got |= {f"loss.discriminator.{name}": tensor for name, tensor in discriminator.state_dict().items()}
        wanted = {name.removeprefix(key): tensor for name, tensor in g.items() if name.startswith(key)}
        assert wanted
        for name, want in wanted.items():
            want = want[:-1] if name == "quantize.codebook.weight" else want
            if want.dtype.is_floating_point:
                check.close(name, got[name], want, **MAPS)
            else:
                check.same(name, got[name], want)

    def check_tokens(key, out):
        """The codes in the order of their importance, and with it the places."""
        places = out.scores.detach().flatten(1).sort(1, descending=True).indices[:, : vae.config.kept]
        check.same(f"{key}.codes", out.codes.view(2, -1), g[f"{key}.codes"])
        check.same(f"{key}.sample_index", places, g[f"{key}.sample_index"])
        check.same(f"{key}: kept", out.grain.flatten(1).gather(1, places), torch.zeros_like(places))

    outputs: list = []
    hook = vae.register_forward_hook(lambda module, args, out: outputs.append(out))
    parts = objective.losses(vae, x, 0)
    hook.remove()
    check_tokens("A", outputs[0])
    check.close("A.reconstruction", outputs[0].images.detach(), g["A.reconstruction"], **IMAGES)
    check.close("nll_loss", parts["picture"].detach(), torch.tensor(logs["ae"]["train_nll_loss"]), **LOSS)
    named = {"qloss": "commitment", "g_loss": "adversarial", "d_weight": "adversarial_weight", "aeloss": "loss"}
    for theirs, ours in named.items():
        check.close(f"A.{theirs}", parts[ours].detach()[None], g[f"A.{theirs}"], **LOSS)
    parts["loss"].backward()
    gradients = {sources[name]: parameter.grad for name, parameter in vae.named_parameters()}
    check_gradients(check, gradients, {n.removeprefix("A.grad."): t for n, t in g.items() if n.startswith("A.grad.")})
    check_norms(check, gradients, logs["grad_l2_norms"])
    check_state("A.after.")

    with torch.no_grad():
        out = vae(x)
    check_tokens("B", out)
    check.close("B.qloss", out.loss[None], g["B.qloss"], **LOSS)
    real, fake = discriminator(x), discriminator(out.images)
    check.close("B.logits_real_mean", real.mean().detach()[None], g["B.logits_real_mean"], **LOGITS)
    check.close("B.logits_fake_mean", fake.mean().detach()[None], g["B.logits_fake_mean"], **LOGITS)
    check.close("B.discloss", hinge_loss(real, fake).detach()[None], g["B.discloss"], **LOSS)
    check_state("B.after.")


def check_gradients(check, got, wanted):
    assert wanted
    for name, want in wanted.items():
        check.close(f"gradient of {name}", got[name].view_as(want), want, **GRADIENT)


def check_norms(check, got, wanted):
    """The gradient norm of every parameter. Those of biases that a normalisation or the softmax cancels are rounding
    noise, and are compared on the scale of their weight's."""
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        scale = want if want > 1e-5 else wanted[name.replace(".bias", ".weight")]
        check.close(f"norm of {name}", got[name].norm(), torch.tensor(want), **GRADIENT, scale=scale)


def test_adaptive_weight_is_capped():
    """Protects against a blind discriminator, whose gradient vanishes: its weight ends at the configured most."""
    weight = torch.ones(4, requires_grad=True)
    picture = weight.sum()
    for push, want in ((2.0, 0.375), (0.5, 1.0), (0.0, 1.0)):
        got = adaptive_weight(picture, weight.sum() * push, weight, 0.75)
        assert got.item() == pytest.approx(want, rel=1e-3) and not got.requires_grad
    assert adaptive_weight(picture, weight.sum() * 0.5, weight, 0.75, most=1.2).item() == pytest.approx(1.2)


def test_published_discriminator():
    """Protects the released sizes of the discriminator: parameters, and logits per 70-pixel patch."""
    discriminator = PatchDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    numbers = {int(name.split(".")[1]) for name, _ in discriminator.named_parameters()}
    assert numbers == {0, 2, 3, 5, 6, 8, 9, 11}
    assert discriminator.eval()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def released_gradients(transformer):
    """The gradients of a stacked transformer under the released names and in the released order of ids."""
    out = {}
    parameters = dict(transformer.named_parameters())
    for name, parts in transformer_sources(transformer).items():
        rows = parameters[name].grad.split([part.shape[part.name == "pos_emb"] for part in parts])
        out.update({part.name: grad for part, grad in zip(parts, rows, strict=True)})
    for name in ("value_emb.weight", "value_head.1.weight"):
        out[name] = to_released(transformer.layout, out[name], 0)
    return out


def test_transformer_gradients(check):
    """Protects the losses in training mode, weighted as configured, and the gradient of every parameter."""
    case = "stackformer_uncond"
    g, want, transformer = load(case), extra(case)["train_mode"], copy.deepcopy(model(case).transformer).train()
    inputs, targets = teacher_forcing(transformer.layout, to_ours(transformer.layout, g["tf_idx"]), g["tf_pos"])
    losses = stacked_losses(*transformer(**inputs), **targets)
    factor = extra(case, "config")["model"]["params"]["loss_position_weight"]
    total = losses["content"] + factor * losses["position"]
    for name, value in (("value_loss", losses["content"]), ("position_loss", losses["position"]), ("total", total)):
        check.close(name, value.detach(), torch.tensor(want[name]), **LOSS)
    total.backward()
    gradients = released_gradients(transformer)
    prefix = "train_grad."
    check_gradients(check, gradients, {n.removeprefix(prefix): t for n, t in g.items() if n.startswith(prefix)})
    check_norms(check, gradients, want["grad_l2_norms"])


@pytest.mark.parametrize("case", ["stackformer_class", "stackformer_uncond"])
def test_decayed_weights(case):
    """Protects the two groups of the optimizer: the same tensors decay as in the released code."""
    transformer = model(case).transformer
    names = {id(parameter): name for name, parameter in transformer.named_parameters()}
    sources, released = transformer_sources(transformer), extra(case)["optimizer"]
    groups = make_optimizer(transformer, TrainConfig(betas=released["betas"], weight_decay=0.01)).param_groups
    for group, want in zip(groups, released["groups"], strict=True):
        assert group["weight_decay"] == want["weight_decay"] and list(group["betas"]) == released["betas"]
        got = [part.name for parameter in group["params"] for part in sources[names[id(parameter)]]]
        assert sorted(got) == sorted(want["params"])


@pytest.mark.parametrize("name", RATES)
def test_schedule(check, name):
    """Protects the learning rate: warm-up of any length, cosine with a least value. Ours differs in the warm-up."""
    for row in extra("schedule")[name]:
        want = torch.tensor(row["multiplier"], dtype=torch.double)
        steps, least = row.get("max_steps", math.inf), row.get("multiplier_min", 0.0)
        got = [schedule(step, row["warmup_steps"], steps, least) for step in row["steps"]]
        check.close("multiplier", torch.tensor(got, dtype=torch.double), want, **PURE)
        if math.isfinite(steps) and not least:
            config = TrainConfig(steps=steps, lr=2e-3, warmup=0)
            got = [config.rate(step) for step in row["steps"]]
            check.close("rate", torch.tensor(got, dtype=torch.double), 2e-3 * want, **PURE)
