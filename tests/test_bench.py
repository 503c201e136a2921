"""The benchmark's logic; that something is fast is never asserted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small_model

from dvq_rt import bench, timing
from dvq_rt.__main__ import main
from dvq_rt.generator import Generator
from dvq_rt.layout import TokenLayout
from export import bench as export_bench
from runtimes.errors import InputError
from training.checkpoint import Model, save_checkpoint
from training.torch_program import decode_loop


def test_interleave_takes_turns() -> None:
    """Competitors alternate, every turn warms up unmeasured, and each round gives one number."""
    seen: list[str] = []
    found = timing.interleave({n: (lambda n=n: seen.append(n)) for n in "ab"}, 3, least=0, pause=0)
    assert "".join(seen) == "aabb" * 3
    assert {name: len(t.seconds) for name, t in found.items()} == {"a": 3, "b": 3}
    with pytest.raises(InputError, match="rounds is 0; it must be at least 1"):
        timing.interleave({}, 0)


def test_statistics() -> None:
    """Medians, the spread between quartiles, and ratios that are taken round by round."""
    slow, fast = timing.Timing((2.0, 4.0, 9.0, 4.0)), timing.Timing((1.0, 1.0, 3.0, 4.0))
    assert slow.median == 4 and slow.spread == pytest.approx((5.25 - 3.5) / 4)
    assert timing.ratio(slow, fast) == {"median": 2.5, "low": 1.0, "high": 4.0}


@pytest.mark.parametrize("steps", [17, 40, 66])
def test_given_requests_have_the_length(steps: int) -> None:
    """Covering images take about as many steps as asked; keeping ones have one length."""
    (request,) = bench.given_requests(TokenLayout(32, (4, 8)), [steps])
    assert request.forced is not None and abs(len(request.forced[0]) - 1 - steps) <= 3
    (request,) = bench.given_requests(TokenLayout(32, (4,), kept=5, first="content"), [steps])
    assert request.forced is not None and len(request.forced[0]) == 5


def test_engine_step_stays_at_its_length(generator: Generator) -> None:
    """Every run takes one token at the same length: the state is set anew, and no slot is done."""
    step = bench.EngineStep(generator.engine, 2, 20)
    for _ in range(3):
        step.run()
        assert step.loop.read("length").tolist() == [21, 21] and not step.loop.read("done").any()
    with pytest.raises(InputError, match=r"length is 67; this engine takes 0 to 66"):
        bench.EngineStep(generator.engine, 1, 67)


def test_step_bytes(generator: Generator, plain_generator: Generator, class_model: Model) -> None:
    """Weights without embedding tables, as they lie in memory; caches up to and with the new token."""
    assert class_model.transformer
    tables = generator.manifest.parameters["embeddings"]
    weights = 4 * (sum(p.numel() for p in class_model.transformer.parameters()) - tables)
    found = bench.step_bytes(generator.engine, 3, 9)
    assert weights < found["weights"] < 1.5 * weights  # tables of the grammar and the graph itself
    assert found["caches"] == 4 * 3 * 10 * 2 * 3 * 32
    assert bench.step_bytes(plain_generator.engine, 1, 0)["weights"] > weights / 2


def test_mixed_lengths_take_fewer_steps_when_slots_refill(generator: Generator) -> None:
    """Both ways draw all images; refilling needs fewer steps, and no fewer than the ideal."""
    found = bench.mixed_lengths(generator.engine, 1, images=12, slots=3)
    calls = found["calls"]
    assert 1 < calls["static"] / calls["continuous"] <= found["ideal"] * 1.1


def test_prompt_times() -> None:
    """Each token of a prompt takes one run of the step, and all slots read theirs at once."""
    engine = Generator("demo:dq", threads=1).engine
    rows = bench.prompt_times(engine, 2, 70, 1)
    assert [row["prompt"] for row in rows] == [0, 12, 32] and rows[0]["of_none"] == 1
    assert [row["calls"] - rows[0]["calls"] for row in rows] == [0, 12, 32]
    assert bench.prompt_times(Generator("demo:mq", threads=1).engine, 2, 70, 1) == []


def test_bench_command(class_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has a row for each measurement, the JSON all of them; parts of an image's time add up."""
    out = tmp_path / "bench.json"
    arguments = ["--rounds", "1", "--images", "1", "2", "--mixed", "--threads", "1", "--out", str(out)]
    assert main(["bench", str(class_engine), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in (
        "DRAM read",
        "token, b1",
        "token, b8",
        "1 image(s)",
        "8 image(s)",
        "decoder, b8",
        "sample(2)",
        "64 mixed, static",
    ):
        assert any(line.startswith(start) for line in lines), start
    result = json.loads(out.read_text())
    assert [row["images"] for row in result["growth"]] == [1, 2]
    for row in result["image"]:
        parts = [row[name] for name in ("step", "decoder", "host")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(row["median_s"], rel=1e-6)


# --- the PyTorch baselines -------------------------------------------------------------------------------------
def test_static_cache_equals_the_engine(class_model: Model, generator: Generator) -> None:
    """At one length, on zeroed caches, the baseline's logits are the engine's: both time the same work."""
    loops = [generator.engine.loop(2), decode_loop(class_model.both()[1], 2)]
    for loop in loops:
        loop.set_state(bench.middle_state(loop.table, 2, 30))
        loop.step()
    want, got = (loop.read("position_logits") for loop in loops)
    assert np.abs(got - want).max() <= 2e-4 * np.abs(want).max() and want.std() > 0.1


def test_export_bench_command(
    class_model: Model, class_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every baseline and engine has its row; two engines of one kind are refused."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "bench.json"
    save_checkpoint(class_model, checkpoint)
    threads = torch.get_num_threads()
    arguments = [str(checkpoint), "--engine", str(class_engine), "--rounds", "1", "--image-rounds", "1", "--slots", "2"]
    export_bench.main([*arguments, "--threads", "1", "--baselines", "uncached", "--eager-images", "--out", str(out)])
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    for name in ("uncached", "eager", "fp32", "uncached (integrated)"):
        assert f"| {name} |" in text
    result = json.loads(out.read_text())
    assert result["token"][0]["seconds"].keys() == {"uncached", "eager", "fp32"}
    base = result["image"][0]["uncached"]
    assert min(base["token_s"]) * result["image"][0]["steps"] < 2 * base["total_s"]
    with pytest.raises(SystemExit):
        export_bench.main([*arguments, "--engine", str(class_engine)])
    assert "two engines have fp32 weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *(["--slots", "0"], ["--slots", "2", "-1"], ["--rounds", "0"], ["--image-rounds", "-2"], ["--threads", "0"]),
        *(["--threads", "100000"], ["--length", "67"], ["--length", "-1"], ["--tokens", "0"], ["--tokens", "9", "68"]),
    ],
)
def test_bad_numbers_are_refused_before_work(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that cannot be had: an error that names option, value and range."""
    save_checkpoint(small_model(("ant", "bee", "cat")), tmp_path / "checkpoint")
    monkeypatch.setattr(export_bench, "open_engines", None)
    with pytest.raises(SystemExit):
        export_bench.main([str(tmp_path / "checkpoint"), "--engine", "nowhere", *option])
    assert f"error: {option[0]} is {option[-1]}; it must be an integer from" in capsys.readouterr().err
