"""What a training takes, counted without making it; and the benchmark of steps."""

import numpy as np
import pytest
import torch
from small_models import MASKED, TOKENIZER, VARIANTS, small_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from training import plan
from training.bench import in_turns, line, stage_two
from training.data.tokens import padded_to
from training.footprint import Allocations, footprint, of_sizes, real, tokenizer_work, transformer_work
from training.loop import TrainConfig
from training.models.text import TextConfig
from training.models.transformer import TransformerConfig
from training.objective import StageOneConfig
from training.plan import mean_codes


def test_allocations_are_those_that_live_at_once() -> None:
    """Protects the count: a linear layer's output lives until its ReLU has replaced it, gradients last."""
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000))
        x = torch.empty(100, 1000)
        with Allocations() as counted:
            counted.ignore(net)
            y = net(x)
            assert counted.now == counted.most == 2 * 400_000
            y.sum().backward()
            del y
        assert counted.now == 2 * (4_000_000 + 4_000)
        assert counted.now < counted.most <= counted.now + 3 * 400_000


@pytest.mark.parametrize("sizes", [TOKENIZER, VARIANTS["triple feature"], MASKED], ids=["dq", "triple", "mq"])
def test_counts_are_those_of_the_real_tokenizer(sizes: object) -> None:
    """Protects that nothing is guessed: parameters as made, gradients for each, memory that grows with the batch, and
    the same computation counted on real tensors."""
    stage = StageOneConfig(adversarial_weight=0.5, discriminator_width=8, discriminator_layers=1)
    one, four = (footprint(lambda make, b=b: tokenizer_work(sizes, stage, "fp32", b, make), 1) for b in (1, 4))
    parts, _, step = tokenizer_work(sizes, stage, "fp32", 1, real)
    assert one.parameters == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    step()
    assert all(p.grad is not None for p in parts["discriminator"].parameters())
    assert one.gradients == 4 * sum(one.parameters.values()) == one.optimizer // 2
    assert four.step - one.gradients > 3 * (one.step - one.gradients) > 0
    assert four.flops == pytest.approx(4 * one.flops, rel=0.01)


def test_half_precision_and_several_processes() -> None:
    layout = small_model().layout
    config = TransformerConfig(width=64, heads=4, block_size=layout.max_length)
    full, half = (
        footprint(lambda make, p=p: transformer_work(config, layout, p, 8, make), n)
        for p, n in (("fp32", 1), ("bf16", 2))
    )
    assert half.step < 0.9 * full.step and half.buckets == full.gradients and full.buckets == 0
    assert full.flops == pytest.approx(half.flops)


def test_prompts_count() -> None:
    """A transformer that reads prompts has more parameters and a larger step."""
    layout = small_model().layout
    config = TransformerConfig(width=32, heads=4, block_size=layout.max_length)
    plain, more = (
        footprint(lambda make, t=t: transformer_work(config, layout, "fp32", 2, make, t), 1)
        for t in (None, TextConfig(16, 300, 1))
    )
    assert more.gradients > plain.gradients and more.step > plain.step and more.flops > plain.flops


def test_a_published_model_is_planned_without_making_it(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["mq_unconditional_transformer", "--tokenizer", "mq_tokenizer", "--processes", "8", "--days", "10"])
    printed = capsys.readouterr().out
    assert (
        "a step of 4 images" in printed and "gradient exchange" in printed and "tokens a second, for 10 days" in printed
    )
    for arguments, message in (
        (["mq_class_transformer"], "--tokenizer"),
        (["mq_class_transformer", "--tokenizer", "mq_tokenizer"], "--labels"),
        (["mq_tokenizer", "--processes", "5"], "cannot be divided by 5 "),
        (["mq_tokenizer", "--days", "0"], "--days is 0"),
        (["nowhere"], "nowhere"),
    ):
        with pytest.raises(SystemExit):
            plan.main(arguments)
        assert message in capsys.readouterr().err


def test_codes_of_a_mean_image() -> None:
    assert mean_codes(TOKENIZER) == 16 * (1 + 3 * 0.5) and mean_codes(MASKED) == MASKED.kept
    assert mean_codes(VARIANTS["triple entropy"]) == pytest.approx(4 * (1 + 3 * 0.3 + 15 * 0.4))


def test_the_plain_loop_learns_from_the_same_tokens() -> None:
    """Protects the comparison: both loops count the same tokens over a round, the plain one with all sequences as long
    as the longest possible."""
    model = small_model()
    vae, net = model.both()
    net.requires_grad_(True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    images[::2] //= 64
    ours, plain = stage_two(vae, net, images, np.zeros(32, np.int64), TrainConfig(batch_size=2))
    assert sum(ours(step) for step in range(16)) == sum(plain(step) for step in range(16))
    batch = padded_to({"target_content": torch.zeros(2, 3), "content": torch.ones(2, 3)}, 5)
    assert batch["target_content"][0].tolist() == [0, 0, 0, -1, -1] and batch["content"].shape == (2, 5)


def test_turns_are_counted_alike() -> None:
    calls: list[str] = []

    def loop(name: str):
        return lambda step: calls.append(name) or 4

    rows = in_turns(loop("ours"), loop("plain"), 3, 2, "turns")
    assert len(rows) == 2 and calls.count("ours") == calls.count("plain") == 7
    assert line("stage 1", "images/s", [{"ours": 4.0, "plain": 2.0, "ratio": 2.0}])[-1] == "2.00 (2.00 to 2.00)"


def test_of_sizes_holds_no_numbers() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        net = of_sizes(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm2d(4)))
    assert all(getattr(t, "fake_mode", None) is mode for t in net.state_dict().values())
