"""Three small engines, exported once: one with labels and fused attention, one without labels on standard operators,
and one that keeps some cells only."""

from pathlib import Path

import pytest
import torch
from small_models import masked_model, small_model

from dvq_rt.generator import Generator
from export.to_onnx import export_onnx, round_to_half
from training.checkpoint import Model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def class_model() -> Model:
    """Three labels and the null label, row-first."""
    return small_model(("ant", "bee", "cat"))


@pytest.fixture(scope="session")
def class_engine(class_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``class_model`` for ONNX Runtime's fused attention, float32 weights."""
    folder = tmp_path_factory.mktemp("engines") / "class"
    export_onnx(class_model, folder, slots=4)
    return folder


@pytest.fixture(scope="session")
def plain_model(plain_export: tuple[Model, Path]) -> Model:
    """No labels, region-first, weights rounded to float16."""
    return plain_export[0]


@pytest.fixture(scope="session")
def plain_engine(plain_export: tuple[Model, Path]) -> Path:
    """``plain_model`` on standard operators, float16 weights; what CUDA would run, run on the CPU."""
    return plain_export[1]


@pytest.fixture(scope="session")
def plain_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    model, folder = small_model(order="region-first", seed=1), tmp_path_factory.mktemp("engines") / "plain"
    round_to_half(model)
    export_onnx(model, folder, slots=4, target="cuda", weights="fp16")
    return model, folder


@pytest.fixture(scope="session")
def mq_model() -> Model:
    """MQ: 25 of 64 cells kept, content first, three labels and the null label."""
    return masked_model(("ant", "bee", "cat"))


@pytest.fixture(scope="session")
def mq_engine(mq_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mq_model`` for ONNX Runtime's fused attention, float32 weights."""
    folder = tmp_path_factory.mktemp("engines") / "masked"
    export_onnx(mq_model, folder, slots=4)
    return folder


@pytest.fixture(scope="session")
def mq_generator(mq_engine: Path) -> Generator:
    """Four slots, one thread."""
    return Generator(mq_engine, slots=4, threads=1)


@pytest.fixture(scope="session")
def generator(class_engine: Path) -> Generator:
    """Four slots, one thread."""
    return Generator(class_engine, slots=4, threads=1)


@pytest.fixture(scope="session")
def plain_generator(plain_engine: Path) -> Generator:
    """Four slots, one thread."""
    return Generator(plain_engine, slots=4, threads=1)
