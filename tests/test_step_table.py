"""The table of the step: one place from which the traced graph, the manifest, the loop and PyTorch's twin derive."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import small_model, small_transformer

from dvq_rt import step
from dvq_rt.bench import middle_state
from dvq_rt.decoding import DecodeLoop, Request
from dvq_rt.engine import Engine, run_alone
from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams
from dvq_rt.step import CONTROL, STATE, Port, StepTable
from export.to_onnx import export_onnx
from runtimes.errors import ConfigError, EngineError
from runtimes.onnxruntime import OnnxRuntimeBackend
from training.torch_program import decode_loop

LAYOUT = TokenLayout(8, (2, 4), classes=3, null_label=True)
TABLE = StepTable.of(LAYOUT, caches=4, heads=2, width=3)


def test_round_trip() -> None:
    """A table comes back from what a manifest says of it, with symbolic and with fixed slots."""
    assert StepTable.from_dict(LAYOUT, TABLE.to_dict()) == TABLE
    assert StepTable.from_dict(LAYOUT, TABLE.to_dict(slots=4)) == TABLE
    assert [port.output for port in TABLE.outputs if port.role == step.REPORT] == [
        *("position_logits", "content_logits", "position_logprob", "content_logprob"),
        *("position_logmass", "content_logmass"),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["inputs"].pop(3), "step.inputs: done is missing; a step of this layout has"),
        (lambda d: d["inputs"].append({"name": "extra", "dtype": "bool", "shape": ["B"]}), "extra is .*no such tensor"),
        (lambda d: d["inputs"][4].update(dtype="int64"), r"cells is \('int64', .*has \('int32'"),
        (lambda d: d["outputs"][5].update(shape=["B", 9]), "position_logits is .*this layout has"),
        (lambda d: d["outputs"][-1].update(name="other"), "cache_3_out is missing"),
    ],
)
def test_another_interface(change: Any, words: str) -> None:
    """An interface with a tensor too few, too many or of another kind is refused by the tensor's name."""
    values = TABLE.to_dict()
    change(values)
    with pytest.raises(ConfigError, match=words):
        StepTable.from_dict(LAYOUT, values)


def test_an_engine_of_another_layout(class_engine: Path, generator: Any) -> None:
    """A manifest whose layout is not its step's does not open as an engine, and says which tensor tells."""
    other = replace(generator.layout, codebook_size=16)
    with pytest.raises(EngineError, match=r"its manifest contradicts itself: step\.outputs: content_logits is"):
        Engine(class_engine, replace(generator.manifest, layout=other), OnnxRuntimeBackend(threads=1))


def test_a_control_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One more entry of the table is an input of the exported graph, listed by its manifest, has a buffer in the
    engine's loop and in PyTorch's, and gets its value from the sampling parameters of each slot."""
    warmth = Port("warmth", CONTROL, "float32", idle=7, setting=lambda params, _: params.temperature * 2)
    places = [i for i, port in enumerate(step.PORTS) if port.role == CONTROL]
    monkeypatch.setattr(step, "PORTS", (*step.PORTS[: places[-1] + 1], warmth, *step.PORTS[places[-1] + 1 :]))

    manifest = export_onnx(small_model(("a", "b")), tmp_path / "engine", slots=2)
    assert {"name": "warmth", "dtype": "float32", "shape": ["B"]} in manifest.step["inputs"]
    engine = Engine.open(tmp_path / "engine", threads=1)
    assert engine.program("step").inputs["warmth"].dtype == "float32"
    written: list[tuple[int, float]] = []

    class Noted(DecodeLoop):
        def control(self, name: str, slot: int, value: Any) -> None:
            if name == "warmth":
                written.append((slot, value))
            super().control(name, slot, value)

    loop = Noted(engine.backend, engine.program("step"), engine.table, 2)
    events = list(run_alone(loop, [Request(0, SamplingParams(temperature=t)) for t in (0.5, 1.5)]))
    assert len(events) == 2 and written == [(0, 1.0), (1, 3.0)]

    net = small_transformer(LAYOUT)
    torch_loop = decode_loop(net, 2)
    assert "warmth" in [port.name for port in torch_loop.table.inputs]
    assert len(list(run_alone(torch_loop, [Request(0, SamplingParams())]))) == 1
    assert set(middle_state(engine.table, 2, 3)) == {port.name for port in engine.table.role(STATE)}
    assert np.array_equal(warmth.idle_values(2), [7, 7])
