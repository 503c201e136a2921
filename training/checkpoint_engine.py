"""A checkpoint as an engine: what is done with engines can be done with it, by PyTorch and more slowly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dvq_rt.engine import Engine
from dvq_rt.manifest import Manifest
from runtimes.errors import CheckpointError
from runtimes.protocol import Array
from training.checkpoint import Model, load_checkpoint
from training.models.tokenizer import EveryGrain, Tokenizer
from training.step import step_table
from training.torch_program import SIDE_BY_SIDE, TorchDevice, TorchProgram


class CheckpointEngine(Engine):
    """Encodes, draws, forces and decodes with a checkpoint's modules; ``Generator.over`` makes a generator of it.

    Raises:
        CheckpointError: see ``load_checkpoint``; it holds one stage only, or a model that reads prompts.
    """

    def __init__(self, path: str | Path) -> None:
        model = load_checkpoint(path)
        if model.text is not None:
            raise CheckpointError(f"{path} reads prompts, which a checkpoint cannot be given here; judge its tokenizer")
        self._tokenizer, net = model.both()
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
    vae, net = model.both()
    return Manifest(
        layout=net.layout,
        family=model.family,
        image_size=vae.config.image_size,
        step=step,
        class_names=model.class_names,
        defaults=model.defaults,
        tokenizer=vae.routing(),
        **of_engine,
    )
