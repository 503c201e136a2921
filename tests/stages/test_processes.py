"""One training on many processes, in other precisions, with averaged weights and kept checkpoints."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_models import MASKED, TOKENIZER
from small_runs import ADVERSARIAL, STAGE_1, log, losses
from small_runs import MASKED as MASKED_RUN
from torch import nn
from two_processes import FEATURE, difference, job, run

from runtimes.errors import ConfigError, DvqError
from training import loop, processes, train_tokenizer, train_transformer
from training.checkpoint import load_checkpoint, load_training_state
from training.learner import Learner
from training.loop import TrainConfig, make_optimizer
from training.models.dqvae import DQVAE
from training.models.mqvae import MQVAE
from training.models.tokenizer import Tokenizer
from training.models.transformer import Attention, TransformerConfig

SHORT = ("steps=8", "validate_every=8", "picture_every=8", "checkpoint_every=4", "lr=0.001")
STAGE = ADVERSARIAL["stage"] | {"warmup_fraction": 0.25, "adversarial_start": 0.25}
"""The codebook and the discriminator start at the third of eight steps."""


@pytest.fixture
def work(data: Path, tmp_path: Path) -> Path:
    """A folder for runs, with pictures."""
    (tmp_path / "data").symlink_to(data)
    return tmp_path


def test_two_processes_train_as_one(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a batch on each of two processes gives the losses of the whole on one, to rounding: batch normalisation of
    scorer and discriminator, adaptive weight, start and restarts of the codebook, learned router, dropout, and in stage
    2 sequences of different lengths, some with hints. A run may go on with another number of processes. What cannot be
    divided is refused by both, in one sentence."""
    sizes = {"width": 32, "heads": 4, "position_blocks": 1, "content_blocks": 1}
    two = {"transformer": sizes, "stage": {"min_psnr": 0, "given": 0.5}}
    names = ("masked", "routed", "second")

    def jobs(count: int) -> list[list[str]]:
        masked = job(f"masked{count}", {**MASKED_RUN, "stage": STAGE}, work, *SHORT, "ema=0.5")
        routed = job(
            f"routed{count}", {**STAGE_1, "tokenizer": FEATURE | {"restart_below": 8}, "stage": STAGE}, work, *SHORT
        )
        second = job(f"second{count}", two, work, *SHORT, "accumulate=2", tokenizer="routed1")
        return [masked, routed, second]

    monkeypatch.setattr(loop, "READ_EVERY", 1)
    for arguments in jobs(1):
        (train_transformer if "--tokenizer" in arguments else train_tokenizer).main(arguments)
    with pytest.raises(SystemExit):
        run(2, [*jobs(2), job("odd", STAGE_1, work, "batch_size=7")], work / "output", every=1)
    text = (work / "output").read_text()
    assert text.count("training.batch_size is 7, the images of all 2 processes and all 1 parts") == 2
    assert "such as 8" in text
    for name in names:
        assert len(losses(work / f"{name}2")) == 8  # each row once, of process 0
        assert difference(work / f"{name}1", work / f"{name}2")[0] < 1e-5, name
    one, other = (load_file(work / f"masked{count}" / "checkpoint" / "model.safetensors") for count in (1, 2))
    for name in ("tokenizer.quantizer.cluster_size", "tokenizer.decoder.conv_out.weight"):  # a buffer and an average
        assert torch.allclose(one[name], other[name], atol=1e-4), name
    train_tokenizer.main([*jobs(2)[0], "--resume", "--set", "training.steps=9"])
    state = load_training_state(work / "masked2" / "checkpoint")
    assert state.step == 9 and state.values["processes"] == 1
    assert "resumed with 1 processes instead of 2" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [TOKENIZER, replace(TOKENIZER, router="feature", router_norm_groups=8), MASKED])
def test_bfloat16(sizes: object) -> None:
    """Under autocast the networks compute in bfloat16, the codebook in float32: search, averages and loss."""
    torch.manual_seed(0)
    vae: Tokenizer = MQVAE(sizes) if sizes is MASKED else DQVAE(sizes)  # type: ignore[arg-type]
    if sizes is TOKENIZER:
        vae.get_buffer("entropy_thresholds").fill_(1.0)
    before = vae.quantizer.embed_sum.clone()
    with torch.autocast("cpu", torch.bfloat16):
        out = vae.train()(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert out.images.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert out.scores.dtype == torch.float32 and (out.budget is None or out.budget.dtype == torch.float32)
    assert not torch.equal(vae.quantizer.embed_sum, before) and vae.quantizer.embed_sum.dtype == torch.float32
    (out.images.float().mean() + out.loss).backward()


def test_bfloat16_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast on a CPU only the projections of attention compute in bfloat16; what lies between them is in
    float32, whose kernels are faster there."""
    kernel, read = F.scaled_dot_product_attention, []

    def recorded(*rows: torch.Tensor, **options: object) -> torch.Tensor:
        read.extend(row.dtype for row in rows)
        out: torch.Tensor = kernel(*rows, **options)  # type: ignore[arg-type]
        read.append(out.dtype)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    torch.manual_seed(0)
    attention, x = Attention(TransformerConfig(width=32, heads=4)), torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    assert read == [torch.float32] * 4 and out.dtype == torch.bfloat16
    want = attention(x).detach()
    assert float((out.detach() - want).abs().max()) < 2**-6 * float(want.abs().max())  # a few roundings of 2**-8 each


def test_options_together(work: Path) -> None:
    """bfloat16, two parts a batch, averaged weights and kept checkpoints: the run's checkpoint has the average, its
    training state the weights that learn, and a killed run ends with the same of both. Older copies go."""
    options = ("precision=bf16", "accumulate=2", "ema=0.5", "keep_last=2", "checkpoint_every=2")
    config = {**ADVERSARIAL, "stage": STAGE}
    whole, cut = (job(name, config, work, *SHORT, *options) for name in ("whole", "cut"))
    train_tokenizer.main(whole)
    assert sorted(path.name for path in (work / "whole").glob("step-*")) == ["step-6", "step-8"]
    assert load_training_state(work / "whole" / "step-6").step == 6
    shutil.copytree(work / "whole", work / "cut")
    for name in ("step-8", "checkpoint"):
        shutil.rmtree(work / "cut" / name)
    (work / "cut" / "step-6").rename(work / "cut" / "checkpoint")
    train_tokenizer.main([*cut, "--resume"])
    kept = [load_file(work / run / "checkpoint" / "model.safetensors") for run in ("whole", "cut")]
    states = [load_training_state(work / run / "checkpoint").tensors for run in ("whole", "cut")]
    for one, other in (kept, states):
        assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)
    weights = {k.removeprefix("weights."): v for k, v in states[0].items() if k.startswith("weights.")}
    assert weights and not torch.equal(weights["decoder.conv_out.weight"], kept[0]["tokenizer.decoder.conv_out.weight"])
    assert log(work / "whole") == log(work / "cut")
    load_checkpoint(work / "whole" / "best")


class OneProcess:
    """What a Learner needs of Accelerate."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self.scaler = scaler

    def prepare_model(self, module: nn.Module, device_placement: bool) -> nn.Module:
        return module


@pytest.mark.parametrize("scaled", [False, True])
def test_steps_are_left_out_on_the_device(scaled: bool) -> None:
    """The fused optimizer of GPUs, run here on the CPU: a gradient that is not finite changes neither weights nor
    moments nor the count of steps, and the scale of float16 falls."""
    net = nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    learner = Learner(net, optimizer, OneProcess(scaler), clip=1e9)  # type: ignore[arg-type]

    def step(factor: float) -> float:
        learner.backward(net(torch.ones(1, 2)).sum() * factor, 1)
        norm = float(learner.step(0.1))
        if scaler:
            scaler.update()
        return norm

    assert step(1.0) == pytest.approx(math.sqrt(3))
    before = {name: tensor.clone() for name, tensor in (*net.state_dict().items(), *learner.tensors().items())}
    assert not math.isfinite(step(math.nan))
    after = {**net.state_dict(), **learner.tensors()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert scaler is None or scaler.get_scale() == 4.0
    step(1.0)
    assert not torch.equal(net.weight, before["weight"])


def test_usual_optimizer_on_the_cpu() -> None:
    """The fused one rounds differently, so runs on CPUs keep the one that they always had."""
    assert not make_optimizer(nn.Linear(2, 2), TrainConfig()).defaults["fused"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp8"}, r"training.precision is 'fp8'; it must be one of \['fp32', 'bf16', 'fp16'\]"),
        ({"tracker": "paper"}, "training.tracker is 'paper'"),
        ({"ema": 1.0}, r"training.ema is 1.0; it must be in \[0, 1\)"),
        ({"accumulate": 0}, "training.accumulate is 0"),
        ({"keep_last": -1}, "training.keep_last is -1"),
    ],
)
def test_wrong_options(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)  # type: ignore[arg-type]


def test_parts_of_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size is 8.* and all 3 parts .*multiple of 3, such as 9"):
        TrainConfig(batch_size=8, accumulate=3).check_parts()


def test_devices_that_are_not_there(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device that was asked for is used or refused, never replaced."""
    for name in ("cuda", "mps"):
        if not getattr(torch, "cuda" if name == "cuda" else "mps").is_available():
            with pytest.raises(SystemExit):
                train_tokenizer.main([*job("run", STAGE_1, work), "--device", name])
            assert f"--device is {name}, but PyTorch" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--device is 'tpu'; it must be one of \['cuda', 'mps', 'cpu'\]"):
        processes.start("tpu")
    with pytest.raises(ConfigError, match=r"training\.precision is fp16, which needs a GPU; on a CPU choose bf16"):
        processes.start("cpu", "fp16")
    assert not (work / "run").exists()


def test_failures_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What process 0 alone does fails for all: process 1 raises the text that it is told, instead of waiting."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "number", lambda: 1)

    def told(box: list[object], src: int) -> None:
        box[:] = [None, "cannot write run/checkpoint: No space left on device"]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", told)
    with pytest.raises(DvqError, match="cannot write run/checkpoint: No space left on device"):
        processes.on_first(lambda: pytest.fail("process 1 did it"))
