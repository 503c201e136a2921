"""A checkpoint as an engine: what is done with engines can be done with it, by PyTorch and more slowly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dvq_rt.engine import Engine
from dvq_rt.generator import Generator
from dvq_rt.manifest import Manifest
from dvq_rt.prompts import BYTES
from runtimes.errors import InputError
from runtimes.protocol import Array
from training.checkpoint import CONFIG, TEXT_TOKENIZER, Model, load_checkpoint
from training.frozen_text import frozen_of
from training.models.tokenizer import EveryGrain, Tokenizer
from training.sampling import embed_prompts
from training.step import step_table
from training.torch_program import SIDE_BY_SIDE, TorchDevice, TorchProgram


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder is a checkpoint's."""
    return (Path(path) / CONFIG).is_file()


def open_model(path: str | Path) -> Generator:
    """An engine folder, a demo's name, or a checkpoint of both stages; errors as of both."""
    return Generator.over(CheckpointEngine(path)) if is_checkpoint(path) else Generator(path)


def named(models: Sequence[str]) -> dict[str, str]:
    """Path by name, of NAME=PATH or PATH.

    Raises:
        InputError: two have the same name.
    """
    pairs = [(text.partition("=")[0], text.partition("=")[2]) if "=" in text else (text, text) for text in models]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise InputError(f"the models are named {names}; give each a name of its own, NAME=PATH")
    return dict(pairs)


class CheckpointEngine(Engine):
    """Encodes, draws, forces and decodes with a checkpoint's modules; ``Generator.over`` makes a generator of it.

    Raises:
        CheckpointError: see ``load_checkpoint`` and ``frozen_of``; or it holds one stage only.
    """

    def __init__(self, path: str | Path) -> None:
        self.model = model = load_checkpoint(path)
        self._tokenizer, net = model.both()
        self._frozen = frozen_of(model)
        table = step_table(net)
        self._step = TorchProgram(net)
        manifest = manifest_of(
            model,
            table.to_dict(None),
            slots=SIDE_BY_SIDE,
            precision="fp32",
            weights="fp32",
            tools={"torch": torch.__version__},
            parameters={"transformer": sum(p.numel() for p in net.parameters())},
        )
        super().__init__(Path(path), manifest, TorchDevice())  # type: ignore[arg-type]

    def program(self, name: str) -> Any:
        return self._step if name == "step" else _Module(self._tokenizer, name)

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return embed_prompts(self.model.both()[1], [self.read(ids)])[0]

    def read(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """A prompt's token ids as the model takes them: those, or its frozen encoder's features."""
        return ids if self._frozen is None else self._frozen.of(ids)


class _Module:
    """The encoder or the decoder behind ``Program.run``."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.outputs = ("images",) if name == "decoder" else EveryGrain._fields

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        if self.name == "decoder":
            return {"images": self.tokenizer.decode_maps(torch.from_numpy(inputs["codes"])).numpy()}
        out = self.tokenizer.encode_grains(torch.from_numpy(inputs["images"]))
        return {name: part.numpy() for name, part in out._asdict().items() if names is None or name in names}


def manifest_of(model: Model, step: dict[str, Any], **of_engine: Any) -> Manifest:
    """The manifest of a model as an engine, whose fields that do not follow from the model are given by name.

    Args:
        step: its interface, see ``StepTable.to_dict``.
    """
    (vae, net), text = model.both(), model.text
    reads: dict[str, Any] = {}
    if text is not None:
        name = BYTES if model.text_tokenizer == BYTES else TEXT_TOKENIZER
        reads = {"kind": "prefix", "max": text.length, "tokenizer": name, "empty": text.empty}
    return Manifest(
        layout=net.layout,
        family=model.family,
        image_size=vae.config.image_size,
        step=step,
        class_names=model.class_names,
        defaults=model.defaults,
        tokenizer=vae.routing(),
        conditioning=reads,
        **of_engine,
    )
