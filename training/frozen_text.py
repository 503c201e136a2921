"""A frozen text encoder from a local folder: CLIP's or T5's, read by ``transformers`` (extra ``[train-text]``).

Its features take the place of embedded tokens; what is trained is a projection of them, and the blocks over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dvq_rt.files import open_regular, read_json
from runtimes.errors import BackendError, CheckpointError, guard, short
from training.checkpoint import TEXT_TOKENIZER, Model, digest

ENCODERS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
"""Class in ``transformers`` by the ``model_type`` of a folder's ``config.json``."""


class FrozenText(nn.Module):
    """ids int64 [B, L] and length int64 [B] -> features float [B, L, d], of no use beyond the length.

    Attributes:
        folder, tokenizer: where it was read from, and the content of its ``tokenizer.json``.
        features: d.
    """

    def __init__(self, encoder: nn.Module, folder: Path, tokenizer: str, features: int) -> None:
        super().__init__()
        self.encoder, self.folder, self.tokenizer, self.features = encoder, folder, tokenizer, features

    def forward(self, ids: Tensor, length: Tensor) -> Tensor:
        used = (torch.arange(ids.shape[1], device=ids.device) < length[:, None]).long()
        features: Tensor = self.encoder(input_ids=ids, attention_mask=used).last_hidden_state
        return features

    @torch.no_grad()
    def of(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features float32 [l, d] of one prompt's token ids int64 [l]."""
        if not len(ids):
            return np.zeros((0, self.features), np.float32)
        return self(torch.from_numpy(ids)[None], torch.tensor([len(ids)]))[0].float().numpy()


def load_frozen(folder: str | Path) -> FrozenText:
    """A text encoder of a folder as ``save_pretrained`` writes it, with its ``tokenizer.json``. Nothing is downloaded.

    Raises:
        CheckpointError: the folder is no such thing.
        BackendError: the package transformers is missing.
    """
    folder = Path(folder)
    try:
        import transformers
    except ImportError as error:
        raise BackendError("frozen text encoders need transformers; pip install 'dvq-rt[train-text]'") from error
    config: Any = read_json(folder / "config.json", error=CheckpointError, mend="give the folder of a text encoder")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ENCODERS:
        raise CheckpointError(f"{folder} holds a {short(kind)}; text encoders are {sorted(ENCODERS)}")
    with guard(CheckpointError, f"the text encoder in {folder} cannot be read"):
        load: Any = getattr(transformers, ENCODERS[kind]).from_pretrained
        encoder = load(folder, local_files_only=True, attn_implementation="eager").eval().requires_grad_(False)
        with open_regular(folder / TEXT_TOKENIZER) as file:
            tokenizer = file.read().decode()
    return FrozenText(encoder.float(), folder, tokenizer, int(encoder.config.hidden_size))


def describe_frozen(frozen: FrozenText) -> dict[str, str]:
    """What a checkpoint says of its frozen encoder, whose weights it does not hold."""
    return {"folder": str(frozen.folder.resolve()), "sha256": digest(frozen)}


def frozen_of(model: Model) -> FrozenText | None:
    """The frozen encoder of a model, from the folder that it names; None if it has none.

    Raises:
        CheckpointError: the folder is gone, or holds another one by now.
    """
    if not model.text_encoder:
        return None
    frozen = load_frozen(model.text_encoder["folder"])
    if digest(frozen) != model.text_encoder["sha256"]:
        raise CheckpointError(f"{frozen.folder} holds another text encoder than the model was trained with")
    return frozen
